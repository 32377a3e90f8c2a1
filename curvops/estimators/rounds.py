"""How many products an estimate takes: a fixed number, or rounds until its standard error is small enough."""

from __future__ import annotations

import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from curvops.checkpoint import Checkpoint
from curvops.estimators.estimate import Estimate, relative_norm
from curvops.estimators.groups import Rows
from curvops.estimators.probes import Probes
from curvops.estimators.steps import Steps

TRUSTED = 10  # samples from which a standard error may stop the rounds: that of a few is often small by chance


class Sampler(ABC):
    """What an estimator gives to be run: samples that are added, and the result from those so far."""

    method: str  # its name
    cost: int  # products of a sample
    least: int  # samples without which there is no standard error
    known: tuple[str, ...]  # attributes, or theirs, with what all samples so far have told
    apart: int = 0  # vectors that each sample keeps while it is taken; 0 where samples share theirs
    probes: Probes

    @property
    def step(self) -> int:
        """Samples that are added together: those that share vectors all at once, so that bits do not depend on it."""
        return self.probes.width(self.apart) if self.apart else sys.maxsize

    @abstractmethod
    def add(self, count: int) -> None:
        """Take further samples."""

    @abstractmethod
    def result(self) -> tuple[Tensor, Tensor]:
        """The estimate and its standard error."""

    @abstractmethod
    def exact(self) -> Tensor:
        """The exact value, from as many products as the matrix has columns."""

    def tensors(self) -> dict[str, Tensor]:
        """What is known."""
        return {name: getattr(*self._place(name)) for name in self.known}

    def resume(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what was known."""
        for name, tensor in tensors.items():
            setattr(*self._place(name), tensor)

    def _place(self, name: str) -> tuple[Any, str]:
        owner, _, own = name.rpartition(".")
        return (getattr(self, owner) if owner else self), own


class Budget(NamedTuple):
    """Products that may be spent.

    Args:
        num_products: Products, or where there is a tolerance those of the first round, of ten samples at least.
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


def run(
    sampler: Sampler,
    budget: Budget,
    *,
    each: bool = True,
    checkpoint: Checkpoint | None = None,
    rows: Mapping[str, Rows] | None = None,
    **asked: Any,
) -> Estimate:
    """Sample until the budget is spent or the tolerance reached; exact where that takes no more products.

    Args:
        sampler: The estimator.
        budget: What may be spent.
        each: Whether each entry must reach the tolerance, or all together in the Euclidean norm.
        checkpoint: Where the state is kept.
        rows, asked: What the sampler was made for, which a state must have in common.
    """
    budget.check()
    products = sampler.probes.products
    size, wanted = products.shape[1], budget.num_products
    if wanted < size and wanted < sampler.cost * sampler.least:
        raise ValueError(
            f"num_products: {sampler.method} takes {sampler.cost} products a sample and needs at least {sampler.least} "
            f"samples for a standard error: expected at least {sampler.cost * sampler.least}, got {wanted}."
        )
    steps = Steps(checkpoint, sampler.probes, rows or {}, {"method": sampler.method, **asked, **budget._asdict()})
    sampler.resume(steps.tensors)
    if budget.tolerance is not None:
        wanted = max(wanted, min(sampler.cost * TRUSTED, budget.max_products))
    wanted = steps.about.get("wanted", wanted)
    if wanted >= size:
        return _exact(sampler, steps)
    while True:
        left = (wanted - products.count) // sampler.cost
        while left > 0:
            some = min(left, sampler.step)
            sampler.add(some)
            left -= some
            steps.done(sampler.tensors() if steps.keeps else {}, wanted=wanted)
        value, error = sampler.result()
        found = Estimate.of(value, error, products=products.count, method=sampler.method)
        if budget.tolerance is None or (reached := _relative(found, each)) <= budget.tolerance:
            steps.end()
            return found
        wanted = min(2 * products.count, budget.max_products)
        if wanted >= size and products.count + size <= budget.max_products:
            return _exact(sampler, steps)
        if wanted - products.count < sampler.cost:
            break
    steps.end()
    warnings.warn(
        f"{products.title}: the relative standard error is {reached:.2g} after {products.count} products, wanted was "
        f"{budget.tolerance:.2g}. Raise max_products, or be content with the stated error.",
        stacklevel=3,
    )
    return found


def _exact(sampler: Sampler, steps: Steps) -> Estimate:
    value, products = sampler.exact(), sampler.probes.products
    steps.end()
    return Estimate.of(
        value, torch.zeros_like(value), products=products.count, method=f"{products.shape[1]} columns", exact=True
    )


def _relative(found: Estimate, each: bool) -> float:
    if not each:
        return relative_norm(found, found.standard_error)
    pairs = zip(found.unbind(), found.standard_error.unbind(), strict=True)
    return max(relative_norm(value, error) for value, error in pairs)
