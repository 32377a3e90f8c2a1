"""Random vectors, and products with them that are checked, a bounded number of columns at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from curvops.lengths import PART, power_of_two
from curvops.matrix import Products, normal, seeded, signs

Distribution = Literal["rademacher", "normal"]

_ENTRIES = 2**24  # of the columns of one product: at most 64 MiB in single precision, unless one column is longer
_COLUMNS = 64


class Probes:
    """Random vectors for products with a matrix, and these products, in at least single precision.

    Vectors are drawn one after another, so that the first ten are the same however many follow.

    Args:
        products: The matrix's products.
        distribution: Independent signs ("rademacher") or standard normal numbers ("normal").
        seed: Seed of the generator.
    """

    def __init__(self, products: Products, seed: int, distribution: Distribution = "rademacher") -> None:
        kinds = {"rademacher": signs, "normal": normal}
        if distribution not in kinds:
            raise ValueError(f"distribution: expected 'rademacher' or 'normal', got {distribution!r}.")
        if not products.shape[1]:
            raise ValueError(f"{products.title}: expected a matrix with columns, got shape {products.shape}.")
        self.products, self._generator, self._entries = products, seeded(seed), kinds[distribution]
        self.distribution = distribution
        self.size = products.shape[1]
        self.dtype = torch.promote_types(products.dtype, torch.float32)
        self._width = self.width()
        #: takes the products, a few columns at a time
        self.through: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor] = lambda multiply, some: multiply(some)

    @property
    def random(self) -> Tensor:
        """The state of the generator, which may be set."""
        return self._generator.get_state()

    @random.setter
    def random(self, state: Tensor) -> None:
        self._generator.set_state(state)

    def width(self, vectors: int = 1) -> int:
        """Columns at a time where each keeps so many vectors."""
        return max(1, min(_COLUMNS, _ENTRIES // (vectors * self.size)))

    def empty(self) -> Tensor:
        """No vectors, ``[D, 0]``."""
        return torch.zeros(self.size, 0, dtype=self.dtype, device=self.products.device)

    def draw(self, count: int, size: int | None = None) -> Tensor:
        """New random vectors ``[D, count]``, or of another size."""
        shape = (self.size if size is None else size,)
        columns = [self._entries(shape, self._generator, self.products) for _ in range(count)]
        return torch.stack(columns, 1).to(self.dtype)

    def times(self, columns: Tensor, *, adjoint: bool = False) -> Tensor:
        """A, or Aᵀ, times columns ``[D, K]``.

        Raises:
            FloatingPointError: If a product is not finite.
        """
        multiply = self.products.adjoint if adjoint else self.products

        def product(some: Tensor) -> Tensor:
            # another's operator may use the memory again
            return multiply(some.to(self.products.dtype)).to(self.dtype, copy=some.shape[1] < columns.shape[1])

        found = [self.through(product, some) for some in columns.split(self._width, 1)]
        return self._checked(torch.cat(found, 1))

    def pairs(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """New random vectors and their products, a few at a time."""
        for start in range(0, count, self._width):
            columns = self.draw(min(self._width, count - start))
            yield columns, self.times(columns)

    def identity(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Columns of the identity and their products, a few at a time: with them all estimates are exact."""
        for start in range(0, self.size, self._width):
            columns = self.empty().new_zeros(self.size, min(self._width, self.size - start))
            columns.diagonal(-start).fill_(1)
            yield columns, self.times(columns)

    def _checked(self, found: Tensor) -> Tensor:
        bad = int((~found.isfinite()).any(0).sum())
        if bad:
            raise FloatingPointError(
                f"{self.products.title}: {bad} of {found.shape[1]} products with {self.products.name} are not finite. "
                "Look for NaN or infinity in parameters, data and loss, or use a wider dtype."
            )
        return found


def mean_and_error(samples: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of samples along the last axis, and its standard error."""
    # squares in double precision, a part at a time
    parts = samples.detach().split(max(1, PART // samples.shape[-1])) if samples.ndim > 1 else [samples.detach()]
    spread = torch.cat([_deviation(part.double()).reshape(-1) for part in parts]).reshape(samples.shape[:-1])
    return samples.mean(-1), spread.to(samples.dtype) / samples.shape[-1] ** 0.5


def _deviation(samples: Tensor) -> Tensor:
    scale = power_of_two(samples, -1)
    return (samples / scale.unsqueeze(-1)).std(-1) * scale


def error_of_leave_one_out(independent: Tensor, covariance: Tensor, *, pooled: bool = False) -> Tensor:
    """Standard error of the mean of m samples, each unbiased given the other vectors, that share vectors.

    ``independent`` is what the variance of the mean would be if they did not.

    Let d_ij be what product i changes in sample j. What is left of either sample has mean zero given the other's vector,
    so that the covariance of two samples is the mean of d_ij d_ji, exactly; the variance of their mean is then that of
    independent samples plus the covariance. Without it (as in the paper) errors are 1.2 to 2 times too small where m is
    not small beside the dimension. A negative covariance counts only if it is ``pooled``, that is taken in its ratio to
    the variance over all entries, for that of one entry is too uncertain.
    """
    if pooled:
        ratio = covariance.sum() / independent.sum().clamp(min=torch.finfo(independent.dtype).tiny)
        return (independent * (1 + ratio).clamp(min=0.25)).sqrt()
    return (independent + covariance.clamp(min=0)).sqrt()


def jackknife(left_out: Tensor) -> Tensor:
    """Standard error of a statistic of m samples from its values ``[…, m]`` without each of them (Efron & Stein 1981).

    Its square is no less than the variance in expectation, whatever the statistic.
    """
    return left_out.detach().std(-1, correction=0) * (left_out.shape[-1] - 1) ** 0.5


def mean_of_pairs(values: Tensor) -> Tensor:
    """Mean of M_ij M_ji over all pairs i ≠ j."""
    count = len(values)
    return ((values * values.mT).sum() - values.diagonal().square().sum()) / (count * (count - 1))
