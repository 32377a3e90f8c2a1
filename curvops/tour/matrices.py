"""The six curvature matrices of a setup, computed one after the other and measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from curvops import (
    EFLinearOperator,
    EKFACLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    KFACLinearOperator,
)
from curvops.tour.meter import Cost, measured
from curvops.tour.setups import Setup, tiny

Maker: TypeAlias = Callable[..., Any]

# The Kronecker operators use the exact output factor and treat a layer's weight and bias as one,
# so that what sets their panels apart from the GGN's is their structure alone.
_KRONECKER = {"fisher_type": "type-2", "separate_weight_and_bias": False}

OPERATORS: dict[str, tuple[Maker, dict[str, Any]]] = {
    "Hessian": (HessianLinearOperator, {}),
    "Generalized Gauss-Newton": (GGNLinearOperator, {}),
    "Empirical Fisher": (EFLinearOperator, {}),
    "EKFAC": (EKFACLinearOperator, _KRONECKER),
    "Monte-Carlo Fisher": (GGNLinearOperator, {"mc_samples": 1}),
    "KFAC": (KFACLinearOperator, _KRONECKER),
}
"""From title to operator class and options, in the order of the panels."""

_SEEDED = ("Monte-Carlo Fisher",)


@dataclass(frozen=True)
class Measured:
    """A matrix and what it took to compute it, its operator's construction included."""

    title: str
    matrix: Tensor
    cost: Cost


def make_operator(title: str, setup: Setup, *, seed: int = 0, check_deterministic: bool = True) -> Any:
    """Return the operator of a panel.

    Raises:
        KeyError: If `title` is none of `OPERATORS`.

    Example:
        >>> from curvops.tour.setups import tutorial
        >>> tuple(make_operator("KFAC", tutorial()).shape)
        (683, 683)
    """
    maker, options = OPERATORS[title]
    if title in _SEEDED:
        options = {**options, "seed": seed}
    return maker(setup.model, setup.loss, setup.params, setup.data, check_deterministic=check_deterministic, **options)


def each_matrix(setup: Setup, *, titles: Sequence[str] = tuple(OPERATORS), seed: int = 0) -> Iterator[Measured]:
    """Yield the setup's curvature matrices `[D, D]`, each as soon as it is finished.

    Args:
        setup: Model, loss and data.
        titles: Which of `OPERATORS`, in this order.
        seed: Of the Monte-Carlo operators.
    """
    for title in titles:
        with measured(setup.device) as cost:
            matrix = make_operator(title, setup, seed=seed).to_dense()
        yield Measured(title, matrix.detach(), cost)


def warm_up(device: torch.device, dtype: torch.dtype) -> None:
    """Use each operator once, on a tiny network: torch's first use of its machinery costs seconds
    and memory that belong to none of the matrices."""
    for _ in each_matrix(tiny(device=device, dtype=dtype)):
        pass
