"""The equations that a solver is given: checked, in columns of length one, in a precision to iterate in."""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from curvops.lengths import lengths
from curvops.matrix import Products
from curvops.solvers.solution import Solution

MOST_ITERATIONS = 1000  # unless the user says otherwise: a larger net would keep a solver busy for days


def default_tolerance(dtype: torch.dtype) -> float:
    """The largest relative residual that is accepted unless the user says otherwise: few digits are lost, and some are left."""
    return min(max(1e-6, 100 * torch.finfo(dtype).eps), 1e-2)


class System:
    """(A + δI) x = b, or the least-squares problem of A and b, for the time of a context.

    Columns of b are scaled to length one, so that norms of residuals are relative; half precisions iterate in single.

    Attributes:
        b: Right-hand sides ``[rows, K]``, each of length one or zero.
        products: Counted products with A.
        tolerance: Largest relative residual that is accepted.
        max_iterations: Most iterations.
        eps: Rounding of a product.
        largest: The most that A + δI has stretched a vector so far, a lower bound of its norm.
    """

    def __init__(
        self,
        title: str,
        matrix: Any,
        b: Any,
        *,
        damping: float,
        tolerance: float | None,
        max_iterations: int | None,
        preconditioner: Any = None,
        x0: Any = None,
        square: bool = True,
        symmetric: bool = False,
        progressbar: bool = False,
    ) -> None:
        self.products = Products(matrix, title, square=square, symmetric=symmetric, progressbar=progressbar)
        self.title, self.damping = title, _number(f"{title}: damping", damping)
        asked = default_tolerance(self.products.dtype) if tolerance is None else tolerance
        self.tolerance = _number(f"{title}: tolerance", asked)
        self.max_iterations = _limit(title, max_iterations, min(10 * max(self.products.shape), MOST_ITERATIONS))
        given = self.products.given(b, left=True)
        self._answer = given.answer
        self.dtype = torch.promote_types(self.products.dtype, torch.float32)
        self.eps = torch.finfo(self.products.dtype).eps
        columns = given.columns.to(self.dtype)
        self.largest = torch.zeros((), dtype=torch.float64, device=columns.device)
        if not torch.isfinite(columns).all():
            raise ValueError(
                f"{title}: expected a finite right-hand side, got entries that are infinite or no numbers."
            )
        # by the largest entry first, whose square may be no number of this dtype
        entries = _largest(columns)
        columns = columns / torch.where(entries > 0, entries, 1.0)
        norms = torch.where(entries > 0, lengths(columns), 1.0).to(self.dtype)
        self.b, self._scales = columns / norms, (norms, torch.where(entries > 0, entries, 1.0))
        self._x0 = None if x0 is None else self._start_from(x0, entries > 0)
        self.preconditioner = preconditioner
        self._diagonal, self._preconditioner = self._read(preconditioner)
        self._stack = ExitStack()

    def __enter__(self) -> System:
        for products in (self.products, self._preconditioner):
            if products is not None:
                self._stack.enter_context(products)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __call__(self, columns: Tensor) -> Tensor:
        """(A + δI) times columns."""
        found = self.undamped(columns)
        found = found + self.damping * columns if self.damping else found
        stretch = lengths(found) / lengths(columns).clamp(min=torch.finfo(torch.float64).tiny)
        self.largest = torch.maximum(self.largest, stretch.max()) if len(stretch) else self.largest
        return found

    def undamped(self, columns: Tensor) -> Tensor:
        """A times columns."""
        return self._finite(self.products(columns.to(self.products.dtype)))

    def adjoint(self, columns: Tensor) -> Tensor:
        """Aᵀ times columns."""
        return self._finite(self.products.adjoint(columns.to(self.products.dtype)))

    def preconditioned(self, columns: Tensor) -> Tensor:
        """M times columns, where M stands for the inverse of A + δI; the columns themselves without one."""
        if self._diagonal is not None:
            return self._diagonal * columns
        if self._preconditioner is None:
            return columns
        found = self._preconditioner(columns.to(self._preconditioner.device, self._preconditioner.dtype))
        return self._finite(found.to(columns.device), "the preconditioner's product")

    def start(self) -> tuple[Tensor, Tensor]:
        """The first x ``[columns, K]``, and its residual."""
        if self._x0 is None:
            return self.b.new_zeros(self.products.shape[1], self.b.shape[1]), self.b.clone()
        return self._x0.clone(), self.residual(self._x0)

    def residual(self, x: Tensor) -> Tensor:
        """b − (A + δI) x."""
        return self.b - self(x)

    def within_reach(self, x: Tensor) -> Tensor:
        """The relative residual to aim at for each column: the tolerance, or what rounding leaves if that is more."""
        return (self.eps * self.largest * lengths(x)).clamp(min=self.tolerance)

    def solution(self, x: Tensor, residual: Tensor, iterations: int, converged: bool, reason: str) -> Solution:
        """The answer in the user's format and scale."""
        norms, entries = self._scales
        given = (x * norms * entries).to(self.products.dtype)
        lost = _largest(given.to(self.dtype) / entries / norms - x)
        if converged and not (lost <= 10 * self.eps * _largest(x)).all():
            converged, reason = False, f"x has entries that {self.products.dtype} does not hold: scale the right side"
        return Solution(
            self._answer(given), lengths(residual).to(self.dtype), self.products.count, iterations, converged, reason
        )

    def _finite(self, found: Tensor, what: str = "a product with the matrix") -> Tensor:
        if not torch.isfinite(found).all():
            raise ValueError(
                f"{self.title}: {what} ({self.products.name}) has entries that are infinite or no numbers. Likely "
                "causes: a diverged model, or overflow in half precision."
            )
        return found.to(self.dtype)

    def _start_from(self, x0: Any, nonzero: Tensor) -> Tensor:
        columns = self.products.given(x0).columns
        if columns.shape[1] != self.b.shape[1]:
            raise ValueError(f"{self.title}: x0: expected {self.b.shape[1]} columns as b has, got {columns.shape[1]}.")
        if not torch.isfinite(columns).all():
            raise ValueError(f"{self.title}: x0: expected finite entries.")
        norms, entries = self._scales
        return columns.to(self.dtype) / entries / norms * nonzero

    def _read(self, preconditioner: Any) -> tuple[Tensor | None, Products | None]:
        """The preconditioner as a diagonal ``[D, 1]``, or as products."""
        what, size = f"{self.title}: preconditioner", self.products.shape[0]
        if isinstance(preconditioner, Tensor) and preconditioner.ndim == 1:
            if len(preconditioner) != size or not (torch.isfinite(preconditioner) & (preconditioner > 0)).all():
                raise ValueError(f"{what}: expected {size} finite positive entries, or a matrix of this size.")
            return preconditioner.detach().to(self.b).unsqueeze(1), None
        if preconditioner is None:
            return None, None
        products = Products(preconditioner, what)
        if products.shape[0] != size:
            raise ValueError(f"{what}: expected shape {self.products.shape}, got {products.shape}.")
        return None, products


def _largest(columns: Tensor) -> Tensor:
    """The largest absolute entry of each column, ``[K]``."""
    return columns.abs().amax(0) if len(columns) else columns.new_zeros(columns.shape[1])


def _number(what: str, value: float) -> float:
    if not (isinstance(value, (int, float, Tensor)) and math.isfinite(value) and value >= 0):
        raise ValueError(f"{what}: expected a finite number ≥ 0, got {value!r}.")
    return float(value)


def _limit(title: str, given: int | None, default: int) -> int:
    if given is None:
        return default
    if not isinstance(given, int) or isinstance(given, bool) or given < 1:
        raise ValueError(f"{title}: max_iterations: expected an integer ≥ 1, got {given!r}.")
    return given
