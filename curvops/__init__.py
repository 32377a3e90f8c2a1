"""Curvature of PyTorch models as linear operators: correct on any model, fast, and visible."""

from curvops.kronecker.diagonal import GGNDiagonalLinearOperator
from curvops.kronecker.kfac import EKFACLinearOperator, KFACLinearOperator
from curvops.kronecker.kfoc import KFOCLinearOperator
from curvops.kronecker.operator import load
from curvops.kronecker.options import BlockRule
from curvops.operators.linear_operator import LinearOperator
from curvops.products.ggn import EFLinearOperator, GGNLinearOperator
from curvops.products.hessian import HessianLinearOperator
from curvops.products.jacobian import JacobianLinearOperator, TransposedJacobianLinearOperator
from curvops.risk.empirical_risk import EmpiricalRisk
from curvops.space import TensorSpace

__all__ = [
    "BlockRule",
    "EFLinearOperator",
    "EKFACLinearOperator",
    "EmpiricalRisk",
    "GGNDiagonalLinearOperator",
    "GGNLinearOperator",
    "HessianLinearOperator",
    "JacobianLinearOperator",
    "KFACLinearOperator",
    "KFOCLinearOperator",
    "LinearOperator",
    "TensorSpace",
    "TransposedJacobianLinearOperator",
    "load",
]
