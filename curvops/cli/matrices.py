"""The matrices that the commands know by name."""

from __future__ import annotations

from typing import Any

from curvops.cli.problem import Problem
from curvops.kronecker.kfac import EKFACLinearOperator, KFACLinearOperator
from curvops.products.ggn import EFLinearOperator, GGNLinearOperator
from curvops.products.hessian import HessianLinearOperator
from curvops.products.judge import judge_hessian, judge_jacobian

OPERATORS: dict[str, type[Any]] = {
    "hessian": HessianLinearOperator,
    "ggn": GGNLinearOperator,
    "ef": EFLinearOperator,
    "fisher": GGNLinearOperator,
    "kfac": KFACLinearOperator,
    "ekfac": EKFACLinearOperator,
}
KRONECKER = ("kfac", "ekfac")


def options(name: str, *, seed: int, fisher_type: str, memory: int | None) -> dict[str, Any]:
    """What an operator takes beside the problem."""
    found: dict[str, Any] = {"memory_budget": memory}
    if name in KRONECKER:
        found |= {"fisher_type": fisher_type, "seed": seed}
    return found | ({"mc_samples": 1, "seed": seed} if name == "fisher" else {})


def operator_of(name: str, problem: Problem, **own: Any) -> Any:
    """The operator of a problem, checked as by its constructor, but in common with those of the problem's others."""
    risk = problem.checked_risk
    if name not in KRONECKER:  # which take no second derivatives
        (judge_hessian if name == "hessian" else judge_jacobian)(risk)
    return OPERATORS[name].of(risk, **own)
