"""A number or a vector that was estimated, with its standard error."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from math import floor, log10
from typing import Any

import torch
from torch import Tensor

from curvops.display import card
from curvops.lengths import size_of


class Estimate(Tensor):
    """A tensor that says how sure it is; results of operations on it are plain tensors, and gradients pass through.

    Attributes:
        standard_error: The estimate's standard deviation over seeds, itself estimated; of the estimate's shape, zeros
            where it is exact.
        exact: Whether it is exact but for rounding.
        products: Products with the matrix that it took, one a column.
        method: Name of the method.

    Example:
        >>> import torch
        >>> Estimate.of(torch.tensor(12.3456), torch.tensor(0.412), products=30, method="Hutch++")
        Estimate(12.35 ± 0.41, Hutch++, 30 products)
    """

    standard_error: Tensor
    exact: bool
    products: int
    method: str

    @staticmethod
    def of(value: Tensor, error: Tensor, *, products: int, method: str, exact: bool = False) -> Estimate:
        """An estimate that shares a tensor's memory and graph."""
        found = value.as_subclass(Estimate)
        found.standard_error, found.exact, found.products, found.method = error.detach(), exact, products, method
        return found

    def part(self, index: Any) -> Estimate:
        """The estimate of some of the entries, from the same products, in memory of its own."""
        return self.like(self[index].clone(), self.standard_error[index].clone())

    def like(self, value: Tensor, error: Tensor) -> Estimate:
        """Another estimate from the same products."""
        return Estimate.of(value, error, **self._origin())

    def to_dtype(self, dtype: torch.dtype) -> Estimate:
        """The estimate in another precision."""
        return self.like(self.as_subclass(Tensor).to(dtype), self.standard_error.to(dtype))

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is Tensor.__repr__:
            return args[0]._text()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def __format__(self, specification: str) -> str:
        return format(self.item() if self.ndim == 0 and specification else str(self), specification)

    def _repr_html_(self) -> str:
        kind = "exact but for rounding" if self.exact else f"{self.method}, {self.products} products"
        return card(f"Estimate {self._figures()}", [("method", kind), ("entries", f"{self.dtype}, {self.device}")])

    def __deepcopy__(self, memo: dict[int, Any]) -> Estimate:
        plain, error = copy.deepcopy((self.as_subclass(Tensor), self.standard_error), memo)
        return self.like(plain, error)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return partial(Estimate.of, **self._origin()), (self.as_subclass(Tensor), self.standard_error)

    def _origin(self) -> dict[str, Any]:
        return {"products": self.products, "method": self.method, "exact": self.exact}

    def _text(self) -> str:
        kind = "exact" if self.exact else self.method
        cost = f", {self.products} products" if self.products else ""
        return f"Estimate({self._figures()}, {kind}{cost})"

    def _figures(self) -> str:
        if self.ndim == 0:
            return with_error(self.item(), 0 if self.exact else self.standard_error.item())
        shape = " × ".join(map(str, self.shape))
        if self.exact:
            return f"{shape} entries"
        return f"{shape} entries, ‖standard error‖ / ‖·‖ {relative_norm(self, self.standard_error):.2g}"


def relative_norm(value: Tensor, error: Tensor) -> float:
    """Norm of the standard errors relative to that of the values; 0 where there is no error at all."""
    norm = size_of(error).item()
    return norm and norm / max(size_of(value.detach()).item(), torch.finfo(value.dtype).tiny)


def with_error(value: float, error: float) -> str:
    """A number with two figures of its error, and no more of its own."""
    if not 1e-300 < error < float("inf"):
        return f"{value:.6g}{' ± inf' * (error > 1)}"
    digits = 1 - floor(log10(error))
    if 0 <= digits <= 6 and abs(value) < 1e6:
        return f"{value:.{digits}f} ± {error:.{digits}f}"
    own = max(0, digits + floor(log10(abs(value)))) if value else 0
    return f"{value:.{min(own, 15)}e} ± {error:.1e}"
