"""The six curvature matrices of a setup, computed one after the other and measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from traceback import clear_frames
from typing import Any

import torch
from torch import Tensor

from curvops import EFLinearOperator, EKFACLinearOperator, GGNLinearOperator, HessianLinearOperator, KFACLinearOperator
from curvops.checkpoint import Unwritable
from curvops.risk.determinism import check_deterministic as check
from curvops.risk.empirical_risk import EmpiricalRisk
from curvops.tour.meter import Cost, measured
from curvops.tour.setups import Setup, tiny

# The Kronecker operators use the exact output factor and treat a layer's weight and bias as one,
# so that what sets their panels apart from the GGN's is their structure alone.
_KRONECKER = {"fisher_type": "type-2", "separate_weight_and_bias": False}
# from title to operator class and options, in the order of the panels
OPERATORS: dict[str, tuple[Any, dict[str, Any]]] = {
    "Hessian": (HessianLinearOperator, {}),
    "Generalized Gauss-Newton": (GGNLinearOperator, {}),
    "Empirical Fisher": (EFLinearOperator, {}),
    "EKFAC": (EKFACLinearOperator, _KRONECKER),
    "Monte-Carlo Fisher": (GGNLinearOperator, {"mc_samples": 1}),
    "KFAC": (KFACLinearOperator, _KRONECKER),
}


@dataclass(frozen=True)
class Measured:
    """A matrix, what it took to compute it, its operator's construction included, and what its operator says of itself."""

    title: str
    matrix: Tensor
    cost: Cost
    explanation: str = ""


def make_operator(title: str, setup: Setup, *, seed: int = 0, check_deterministic: bool = True) -> Any:
    """Return the operator of a panel.

    Raises:
        KeyError: If `title` is none of `OPERATORS`.

    Example:
        >>> from curvops.tour.setups import tutorial
        >>> tuple(make_operator("KFAC", tutorial()).shape)
        (683, 683)
    """
    risk = setup.risk()
    if check_deterministic:
        check(risk)
    return _operator(title, risk, seed, None)


def each_matrix(
    risk: EmpiricalRisk,
    *,
    titles: Sequence[str] = tuple(OPERATORS),
    seed: int = 0,
    memory_budget: int | None = None,
    refused: dict[str, Exception] | None = None,
) -> Iterator[Measured]:
    """Yield the curvature matrices `[D, D]` of a risk, such as `Setup.risk()`, each as soon as it is finished.

    Determinism is not checked. The titles are some of `OPERATORS`; the seed is that of the Monte-Carlo operators. What the
    operator of a matrix raises, or that it is not finite, goes into `refused` by title, and the next one follows; without
    `refused` it is raised.
    """
    for title in titles:
        with refusals(refused, title):
            yield _measured(title, risk, seed, memory_budget)


@contextmanager
def refusals(refused: dict[str, Exception] | None, name: str) -> Iterator[None]:
    """Let ``refused``, if it is given, take what the body raises, under a name; its traceback holds no tensors."""
    try:
        yield
    except Unwritable:  # is the disk's
        raise
    except Exception as error:  # whatever an operator raises on a model is what the reader of the table is told
        if refused is None:
            raise
        refused[name] = error
        cause: BaseException | None = error
        seen: list[BaseException] = []
        while cause is not None and cause not in seen:
            seen.append(cause)
            clear_frames(cause.__traceback__)
            cause = cause.__cause__ or cause.__context__
        # neither this frame nor the body's, which goes on and holds what it likes
        inside = error.__traceback__ and error.__traceback__.tb_next
        error.__traceback__ = inside and inside.tb_next


@cache
def warm_up(device: torch.device, dtype: torch.dtype) -> None:
    """Use everything once, on a tiny net: torch's first use of it costs time and memory that belong to no matrix."""
    risk = tiny(device=device, dtype=dtype).risk()
    with refusals({}, "check"):
        check(risk)
    for title in OPERATORS:
        with refusals({}, title):  # what a precision lacks, the matrices themselves will say
            _operator(title, risk, 0, None).to_dense()


def _measured(title: str, risk: EmpiricalRisk, seed: int, memory_budget: int | None) -> Measured:
    with measured(risk.space.device) as cost:
        operator = _operator(title, risk, seed, memory_budget)
        matrix = operator.to_dense().detach()
    if not matrix.isfinite().all():
        raise ValueError(f"{int((~matrix.isfinite()).sum())} entries are not finite.")
    return Measured(title, matrix, cost, str(operator.explain()))


def _operator(title: str, risk: EmpiricalRisk, seed: int, memory_budget: int | None) -> Any:
    operator, options = OPERATORS[title]
    seeded = {"seed": seed} if "mc_samples" in options else {}
    return operator.of(risk, memory_budget=memory_budget, **options, **seeded)
