"""Kronecker operators under the peer's names and arguments, and its three ways to damp their inverse."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from curvops.compat.arguments import translated
from curvops.kronecker import diagonal, kfac, kfoc
from curvops.kronecker.operator import KroneckerOperator
from curvops.operators.block_diagonal import BlockDiagonalOperator, Placed, StructuredOperator
from curvops.operators.blocks import KroneckerBlock


class FisherType(str, Enum):
    """Which output factor is taken."""

    TYPE2 = "type-2"
    MC = "mc"
    EMPIRICAL = "empirical"
    FORWARD_ONLY = "forward-only"


class KFACType(str, Enum):
    """What is done with weights that are shared over positions."""

    EXPAND = "expand"
    REDUCE = "reduce"


class _Peer(KroneckerOperator):
    """A Kronecker operator with the peer's arguments and its `inverse`."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(**translated(given, named))

    def inverse(self, *given: Any, **named: Any) -> StructuredOperator:
        """The inverse; arguments as for `inverse`."""
        return inverse(self, *given, **named)


class KFACLinearOperator(_Peer, kfac.KFACLinearOperator):
    """`curvops.KFACLinearOperator` with the peer's arguments."""


class EKFACLinearOperator(_Peer, kfac.EKFACLinearOperator):
    """`curvops.EKFACLinearOperator` with the peer's arguments."""


class KFOCLinearOperator(_Peer, kfoc.KFOCLinearOperator):
    """`curvops.KFOCLinearOperator` with the peer's arguments."""


class GGNDiagonalLinearOperator(diagonal.GGNDiagonalLinearOperator):
    """`curvops.GGNDiagonalLinearOperator` with the peer's arguments; exact for ``mc_samples=0``."""

    def __init__(self, *given: Any, mc_samples: int = 0, **named: Any) -> None:
        sampled: dict[str, Any] = {"fisher_type": "mc", "mc_samples": mc_samples} if mc_samples else {}
        super().__init__(**translated(given, named), **sampled)


def inverse(
    operator: BlockDiagonalOperator,
    damping: float | tuple[float, float] = 0.0,
    use_heuristic_damping: bool = False,
    min_damping: float = 1e-8,
    use_exact_damping: bool = False,
    cache: bool = True,
    retry_double_precision: bool = True,
) -> StructuredOperator:
    """The inverse of a Kronecker operator.

    Args:
        operator: The operator.
        damping: δ, added to each of a block's factors (a pair: to A and to B), or as the options say. To the
            eigenvalues, where a block is known by these (EKFAC).
        use_heuristic_damping: Damp the factors by √δ times and over π (Martens & Grosse 2015, section 6.3).
        min_damping: Least damping of a factor, with the heuristic.
        use_exact_damping: The inverse of the operator plus δ times the identity.
        cache: Has no effect: it is made once.
        retry_double_precision: Has no effect: singularity is told from the factors.

    Raises:
        ValueError: If two ways are asked for at once, or a block is singular.
    """
    if use_heuristic_damping and use_exact_damping:
        raise ValueError("expected use_heuristic_damping or use_exact_damping, got both.")
    if use_heuristic_damping or use_exact_damping:
        if isinstance(damping, tuple):
            raise ValueError("damping: expected one number for the heuristic or exact damping, got a pair.")
        kind, least = ("heuristic", min_damping) if use_heuristic_damping else ("exact", 0.0)
        return BlockDiagonalOperator.inverse(operator, damping, kind, least)
    pair = damping if isinstance(damping, tuple) else (damping, damping)
    blocks = [_shifted(placed, *pair) for placed in operator.blocks]
    return StructuredOperator(operator.domain, blocks, operator.name).inverse()


def _shifted(placed: Placed, right_shift: float, left_shift: float) -> Placed:
    """A block with a multiple of the identity added to each of its factors, or to its eigenvalues."""
    block = placed.block
    if not isinstance(block, KroneckerBlock) or block.shape[2] == 1:
        return placed.affine(1.0, left_shift)
    return replace(placed, block=KroneckerBlock(_plus(block.left, left_shift), _plus(block.right, right_shift)))


def _plus(factor: Tensor, shift: float) -> Tensor:
    """A factor ``[groups, n, n]``, or the diagonal of one ``[groups, n]``, plus a multiple of the identity."""
    return factor + shift * (1.0 if factor.ndim == 2 else torch.eye(factor.shape[-1], device=factor.device).to(factor))
