"""Curvature of PyTorch models as linear operators: correct on any model, fast, and visible.

Names are imported when they are first used, so that `curvops --help` need not wait for PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from curvops.checkpoint import Checkpoint
    from curvops.clients.check import check
    from curvops.estimators.estimate import Estimate
    from curvops.kronecker.diagonal import GGNDiagonalLinearOperator
    from curvops.kronecker.kfac import EKFACLinearOperator, KFACLinearOperator
    from curvops.kronecker.kfoc import KFOCLinearOperator
    from curvops.kronecker.operator import load
    from curvops.kronecker.options import BlockRule
    from curvops.operators.diagonal import DiagonalOperator, IdentityOperator
    from curvops.operators.gathered import GatheredOperator
    from curvops.operators.inverse import InverseOperator
    from curvops.operators.linear_operator import LinearOperator
    from curvops.operators.low_rank import LowRankPlusDiagonalOperator, OuterProductOperator
    from curvops.operators.spread import SpreadOperator
    from curvops.operators.structured import block_diagonal, kronecker_product
    from curvops.operators.submatrix import SubmatrixLinearOperator
    from curvops.products.ggn import EFLinearOperator, GGNLinearOperator
    from curvops.products.hessian import HessianLinearOperator
    from curvops.products.jacobian import JacobianLinearOperator, TransposedJacobianLinearOperator
    from curvops.ranks import RanksError, share_of
    from curvops.risk.empirical_risk import EmpiricalRisk
    from curvops.space import TensorSpace
    from curvops.tour.own import tour as tour  # the module itself, which can be called
_HOMES = {
    "BlockRule": "curvops.kronecker.options",
    "Checkpoint": "curvops.checkpoint",
    "DiagonalOperator": "curvops.operators.diagonal",
    "EFLinearOperator": "curvops.products.ggn",
    "EKFACLinearOperator": "curvops.kronecker.kfac",
    "EmpiricalRisk": "curvops.risk.empirical_risk",
    "Estimate": "curvops.estimators.estimate",
    "GGNDiagonalLinearOperator": "curvops.kronecker.diagonal",
    "GGNLinearOperator": "curvops.products.ggn",
    "GatheredOperator": "curvops.operators.gathered",
    "HessianLinearOperator": "curvops.products.hessian",
    "IdentityOperator": "curvops.operators.diagonal",
    "InverseOperator": "curvops.operators.inverse",
    "JacobianLinearOperator": "curvops.products.jacobian",
    "KFACLinearOperator": "curvops.kronecker.kfac",
    "KFOCLinearOperator": "curvops.kronecker.kfoc",
    "LinearOperator": "curvops.operators.linear_operator",
    "LowRankPlusDiagonalOperator": "curvops.operators.low_rank",
    "OuterProductOperator": "curvops.operators.low_rank",
    "RanksError": "curvops.ranks",
    "SpreadOperator": "curvops.operators.spread",
    "SubmatrixLinearOperator": "curvops.operators.submatrix",
    "TensorSpace": "curvops.space",
    "TransposedJacobianLinearOperator": "curvops.products.jacobian",
    "block_diagonal": "curvops.operators.structured",
    "check": "curvops.clients.check",
    "kronecker_product": "curvops.operators.structured",
    "load": "curvops.kronecker.operator",
    "share_of": "curvops.ranks",
}
__all__ = [
    "BlockRule",
    "Checkpoint",
    "DiagonalOperator",
    "EFLinearOperator",
    "EKFACLinearOperator",
    "EmpiricalRisk",
    "Estimate",
    "GGNDiagonalLinearOperator",
    "GGNLinearOperator",
    "GatheredOperator",
    "HessianLinearOperator",
    "IdentityOperator",
    "InverseOperator",
    "JacobianLinearOperator",
    "KFACLinearOperator",
    "KFOCLinearOperator",
    "LinearOperator",
    "LowRankPlusDiagonalOperator",
    "OuterProductOperator",
    "RanksError",
    "SpreadOperator",
    "SubmatrixLinearOperator",
    "TensorSpace",
    "TransposedJacobianLinearOperator",
    "block_diagonal",
    "check",
    "kronecker_product",
    "load",
    "share_of",
]


def __getattr__(name: str) -> Any:
    if (home := _HOMES.get(name)) is not None:
        globals()[name] = found = getattr(import_module(home), name)
        return found
    if not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "tour"})
