"""Eigendecompositions of factors, with the errors that a user can act on."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def eigh(factor: Tensor, label: str) -> tuple[Tensor, Tensor | None]:
    """Eigenvalues ``[groups, n]``, not negative, and eigenvectors ``[groups, n, n]`` of a psd factor ``[groups, n, n]``.

    A diagonal one is given as its diagonal ``[groups, n]``; its eigenvectors are the unit vectors, as those of a number
    are (``None``). A ValueError, which names the block by ``label``, if the factor is not finite, or indefinite beyond
    rounding.
    """
    check_finite(factor, label)
    if has_basis(factor.shape):
        values, vectors, lowest, highest = _decompose(factor, label)
    else:
        values, vectors = factor.reshape(factor.shape[:2]), None
        lowest, highest = map(float, values.aminmax())
    if lowest >= 0:
        return values, vectors
    if -lowest > torch.finfo(values.dtype).eps ** 0.5 * max(-lowest, highest):
        raise ValueError(
            f"{label}: expected a positive semi-definite factor, got eigenvalues from {lowest:.2e} to "
            f"{highest:.2e}. Likely causes: a factor that was changed by hand, or accumulation in half precision."
        )
    return values.clamp(min=0), vectors


def has_basis(shape: Sequence[int]) -> bool:
    """Whether a factor of some shape has eigenvectors of its own: a diagonal and a number have the unit vectors."""
    return len(shape) == 3 and shape[2] > 1


def check_finite(factor: Tensor, label: str) -> None:
    """Refuse a factor with entries that are infinite or no numbers (ValueError)."""
    # a sum is finite only of finite numbers; where it is not, it may have overflowed
    if not math.isfinite(float(factor.sum())) and not torch.isfinite(factor).all():
        raise ValueError(
            f"{label}: the factor has entries that are not finite. Likely causes: a diverged model, a loss of infinite "
            "value, or overflow in half precision. Check op.risk.gradient(), or compute in float32."
        )


def within_rounding(values: Tensor, vectors: Tensor | None) -> Tensor:
    """Which eigenvalues ``[groups, n]`` of a psd factor are zero but for rounding."""
    if vectors is None:
        return values == 0
    n = values.shape[1]
    return values <= torch.finfo(values.dtype).eps * n**0.5 * values.amax(1, keepdim=True)


def _decompose(factor: Tensor, label: str) -> tuple[Tensor, Tensor, float, float]:
    """Eigenvalues, eigenvectors, and the least and the largest eigenvalue."""
    failure = RuntimeError("its eigenvalues are not finite")
    # single precision may fail to converge, or underflow and say nothing, where double does not
    for dtype in (factor.dtype, torch.float64):
        try:
            values, vectors = torch.linalg.eigh(factor.to(dtype))
            lowest, highest = map(float, values.aminmax())
            if math.isfinite(lowest) and math.isfinite(highest):
                return values.to(factor.dtype), vectors.to(factor.dtype), lowest, highest
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            failure = error
    reason = (str(failure) or type(failure).__name__).splitlines()[0]
    raise ValueError(
        f"{label}: the eigendecomposition of a factor of side {factor.shape[-1]} failed in double precision too "
        f"({reason}). Likely causes: entries near overflow, or many equal eigenvalues; scale the loss, or pass "
        f"rule=BlockRule(largest_factor={factor.shape[-1] - 1})."
    ) from failure
