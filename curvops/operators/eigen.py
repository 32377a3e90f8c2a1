"""Eigendecompositions of factors, with the errors that a user can act on."""

from __future__ import annotations

import torch
from torch import Tensor


def eigh(factor: Tensor, label: str) -> tuple[Tensor, Tensor | None]:
    """Eigenvalues ``[groups, n]``, not negative, and eigenvectors ``[groups, n, n]`` of a psd factor ``[groups, n, n]``.

    A diagonal one is given as its diagonal ``[groups, n]``; its eigenvectors are the unit vectors (``None``). A
    ValueError, which names the block by ``label``, if the factor is not finite, or indefinite beyond rounding.
    """
    check_finite(factor, label)
    values, vectors = (factor, None) if factor.ndim == 2 else _decompose(factor, label)
    lowest, highest = values.amin(), values.abs().amax()
    if lowest < -(torch.finfo(values.dtype).eps ** 0.5) * highest:
        raise ValueError(
            f"{label}: expected a positive semi-definite factor, got eigenvalues from {float(lowest):.2e} to "
            f"{float(highest):.2e}. Likely causes: a factor that was changed by hand, or accumulation in half precision."
        )
    return values.clamp(min=0), vectors


def check_finite(factor: Tensor, label: str) -> None:
    """Refuse a factor with entries that are infinite or no numbers (ValueError)."""
    if not torch.isfinite(factor).all():
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


def _decompose(factor: Tensor, label: str) -> tuple[Tensor, Tensor]:
    failure = RuntimeError("its eigenvalues are not finite")
    # single precision may fail to converge, or underflow and say nothing, where double does not
    for dtype in (factor.dtype, torch.float64):
        try:
            values, vectors = torch.linalg.eigh(factor.to(dtype))
            if torch.isfinite(values).all():
                return values.to(factor.dtype), vectors.to(factor.dtype)
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
