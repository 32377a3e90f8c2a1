"""Dampings: multiples of the identity that are added to a matrix, one number or one for each parameter."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real

import torch
from torch import Tensor

from curvops.space import TensorSpace

Number = float | Tensor
Damping = Number | Mapping[str, Number]


def by_parameter(damping: Damping, space: TensorSpace) -> dict[str, Number]:
    """The damping of each parameter.

    Raises:
        TypeError: If one is no number.
        ValueError: If one is negative, or names do not fit.
    """
    if not isinstance(damping, Mapping):
        _check(damping, "damping")
        return dict.fromkeys(space.names, damping)
    if mismatch := space.mismatch(damping):
        raise ValueError(f"damping: expected one number for each parameter{mismatch}.")
    for name in space.names:
        _check(damping[name], f"damping of {name!r}")
    return {name: damping[name] for name in space.names}


def numbers(damping: Damping, space: TensorSpace) -> dict[str, float]:
    """The damping of each parameter, of what holds the numbers and no gradient.

    Raises:
        TypeError: If one is no number, or requires a gradient.
        ValueError: If one is negative, or names do not fit.
    """
    given = by_parameter(damping, space)
    if any(map(requires_gradient, given.values())):
        raise TypeError(
            "damping: expected a number without a gradient, got a tensor that requires it. What is damped, inverted, taken to a power, "
            "sampled or solved holds the number: pass damping.detach(). Where there is op.logdet(damping), that one is differentiable "
            "in it."
        )
    return {name: number(value) for name, value in given.items()}


def requires_gradient(value: Number) -> bool:
    """Whether a damping is a tensor that requires a gradient."""
    return isinstance(value, Tensor) and value.requires_grad


def spread(damping: Mapping[str, Number], space: TensorSpace) -> Tensor:
    """The damping of each entry, ``[D]``, from that of each parameter."""
    parts = [torch.as_tensor(value, dtype=space.dtype, device=space.device) for value in damping.values()]
    return torch.cat([part.reshape(1).expand(size) for part, size in zip(parts, space.sizes, strict=True)])


def number(value: Number) -> float:
    """The number itself, without a gradient."""
    return float(value.detach()) if isinstance(value, Tensor) else float(value)


def _check(value: Number, what: str) -> None:
    single = value.numel() == 1 and not value.is_complex() if isinstance(value, Tensor) else isinstance(value, Real)
    if not single:
        raise TypeError(f"{what}: expected a number ≥ 0 or a tensor with one, got {value!r}.")
    if not number(value) >= 0:
        raise ValueError(f"{what}: expected a number ≥ 0, got {value!r}.")
