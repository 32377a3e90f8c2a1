"""How many products an estimate takes: a fixed number, or rounds until its standard error is small enough."""

from __future__ import annotations

import warnings
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from curvops.estimators.estimate import Estimate, relative_norm
from curvops.matrix import Products


class Sampler(Protocol):
    """What an estimator gives to be run: samples that are added, and the result from those so far."""

    method: str  # its name
    cost: int  # products of a sample
    least: int  # samples without which there is no standard error

    def add(self, count: int) -> None:
        """Take further samples."""

    def result(self) -> tuple[Tensor, Tensor]:
        """The estimate and its standard error."""

    def exact(self) -> Tensor:
        """The exact value, from as many products as the matrix has columns."""


class Budget(NamedTuple):
    """Products that may be spent.

    Args:
        num_products: Products, or where there is a tolerance those of the first round.
        tolerance: Wanted standard error, relative to the estimate; rounds double the products until it is reached.
        max_products: Products after which it stops anyway, with a warning.
    """

    num_products: int
    tolerance: float | None = None
    max_products: int = 1000

    def check(self) -> None:
        """Raise a ValueError if these are no such numbers."""
        for name, number in (("num_products", self.num_products), ("max_products", self.max_products)):
            if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                raise ValueError(f"{name}: expected a positive integer, got {number!r}.")
        if self.tolerance is None:
            return
        if not isinstance(self.tolerance, (int, float)) or not 0 < self.tolerance < float("inf"):
            raise ValueError(
                f"tolerance: expected a positive number (a relative standard error), got {self.tolerance!r}."
            )
        if self.max_products < self.num_products:
            raise ValueError(
                f"max_products: expected at least num_products ({self.num_products}), got {self.max_products}."
            )


def run(sampler: Sampler, products: Products, budget: Budget, *, each: bool = True) -> Estimate:
    """Sample until the budget is spent or the tolerance reached; exact where that takes no more products.

    Args:
        sampler: The estimator.
        products: The matrix's products, which count them.
        budget: What may be spent.
        each: Whether each entry must reach the tolerance, or all together in the Euclidean norm.
    """
    budget.check()
    size, wanted = products.shape[1], budget.num_products
    if wanted >= size:
        return _exact(sampler, products)
    if wanted < sampler.cost * sampler.least:
        raise ValueError(
            f"num_products: {sampler.method} takes {sampler.cost} products a sample and needs at least {sampler.least} "
            f"samples for a standard error: expected at least {sampler.cost * sampler.least}, got {wanted}."
        )
    while True:
        sampler.add((wanted - products.count) // sampler.cost)
        value, error = sampler.result()
        found = Estimate.of(value, error, products=products.count, method=sampler.method)
        if budget.tolerance is None or (reached := _relative(found, each)) <= budget.tolerance:
            return found
        wanted = min(2 * products.count, budget.max_products)
        if wanted >= size and products.count + size <= budget.max_products:
            return _exact(sampler, products)
        if wanted - products.count < sampler.cost:
            break
    warnings.warn(
        f"{products.title}: the relative standard error is {reached:.2g} after {products.count} products, wanted was "
        f"{budget.tolerance:.2g}. Raise max_products, or be content with the stated error.",
        stacklevel=3,
    )
    return found


def _exact(sampler: Sampler, products: Products) -> Estimate:
    value = sampler.exact()
    return Estimate.of(
        value, torch.zeros_like(value), products=products.count, method=f"{products.shape[1]} columns", exact=True
    )


def _relative(found: Estimate, each: bool) -> float:
    if not each:
        return relative_norm(found, found.standard_error)
    pairs = zip(found.unbind(), found.standard_error.unbind(), strict=True)
    return max(relative_norm(value, error) for value, error in pairs)
