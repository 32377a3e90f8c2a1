"""Curvature of PyTorch models as linear operators: correct on any model, fast, and visible."""

from curvops.clients.check import check
from curvops.estimators.estimate import Estimate
from curvops.kronecker.diagonal import GGNDiagonalLinearOperator
from curvops.kronecker.kfac import EKFACLinearOperator, KFACLinearOperator
from curvops.kronecker.kfoc import KFOCLinearOperator
from curvops.kronecker.operator import load
from curvops.kronecker.options import BlockRule
from curvops.operators.diagonal import DiagonalOperator, IdentityOperator
from curvops.operators.inverse import InverseOperator
from curvops.operators.linear_operator import LinearOperator
from curvops.operators.low_rank import LowRankPlusDiagonalOperator, OuterProductOperator
from curvops.operators.structured import block_diagonal, kronecker_product
from curvops.operators.submatrix import SubmatrixLinearOperator
from curvops.products.ggn import EFLinearOperator, GGNLinearOperator
from curvops.products.hessian import HessianLinearOperator
from curvops.products.jacobian import JacobianLinearOperator, TransposedJacobianLinearOperator
from curvops.risk.empirical_risk import EmpiricalRisk
from curvops.space import TensorSpace

__all__ = [
    "BlockRule",
    "DiagonalOperator",
    "EFLinearOperator",
    "EKFACLinearOperator",
    "EmpiricalRisk",
    "Estimate",
    "GGNDiagonalLinearOperator",
    "GGNLinearOperator",
    "HessianLinearOperator",
    "IdentityOperator",
    "InverseOperator",
    "JacobianLinearOperator",
    "KFACLinearOperator",
    "KFOCLinearOperator",
    "LinearOperator",
    "LowRankPlusDiagonalOperator",
    "OuterProductOperator",
    "SubmatrixLinearOperator",
    "TensorSpace",
    "TransposedJacobianLinearOperator",
    "block_diagonal",
    "check",
    "kronecker_product",
    "load",
]
