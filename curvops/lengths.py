"""Lengths and scalar products of columns in double precision: single has no squares of what is below 1e-20 or above 1e19.

Double has none of what is below 1e-160 or above 1e154, so that lengths are taken beside a power of two where that matters.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

PART = 2**18  # entries that are brought to double precision together
LEAST, MOST = 1e-140, 1e140  # lengths between which double precision has the squares that count


def lengths(columns: Tensor) -> Tensor:
    """The norm of each column ``[D, K]``, ``[K]``."""
    if columns.dtype != torch.float64:
        return dots(columns, columns).sqrt()
    found = torch.linalg.vector_norm(columns, dim=0)
    if ((found > LEAST) & (found < MOST)).all():
        return found
    scale = power_of_two(columns, 0)
    return torch.linalg.vector_norm(columns / scale, dim=0) * scale


def lengths_in(metric: Callable[[Tensor], Tensor], columns: Tensor) -> Tensor:
    """√(cᵀ B c) of each column c ``[D, K]``, ``[K]``, with products with B."""
    scale = power_of_two(columns, 0)
    scaled = columns / scale
    return dots(scaled, metric(scaled)).clamp(min=0).sqrt() * scale


def dots(left: Tensor, right: Tensor) -> Tensor:
    """The scalar product of each pair of columns ``[D, K]``, ``[K]``."""
    if left.dtype == right.dtype == torch.float64:
        return (left * right).sum(0)
    total = torch.zeros(left.shape[1:], dtype=torch.float64, device=left.device)
    for one, other in _parts(left, right):
        total += (one.double() * other.double()).sum(0)
    return total


def gram(columns: Tensor) -> Tensor:
    """The scalar products of all pairs of columns ``[D, K]``, ``[K, K]``."""
    if columns.dtype == torch.float64:
        return columns.mT @ columns
    total = torch.zeros(columns.shape[1], columns.shape[1], dtype=torch.float64, device=columns.device)
    for part, _ in _parts(columns, columns):
        total += part.mT.double() @ part.double()
    return total


def size_of(tensor: Tensor) -> Tensor:
    """The norm of all entries, a number."""
    return lengths(tensor.reshape(-1))


def power_of_two(tensor: Tensor, axis: int | None = None) -> Tensor:
    """One near the largest entry, or that along an axis, by which a tensor can be divided without rounding; of zeros 1."""
    if tensor.numel():
        largest = tensor.detach().abs().amax() if axis is None else tensor.detach().abs().amax(axis)
    else:
        largest = tensor.new_zeros(()) if axis is None else tensor.sum(axis).detach()
    kind, wide = torch.finfo(tensor.dtype), largest.double()
    # the power above the largest number is none
    power = (wide / torch.frexp(wide).mantissa).clamp(max=kind.max / (2 - kind.eps))
    return torch.where((wide > 0) & wide.isfinite(), power, 1.0).to(tensor.dtype)


def _parts(left: Tensor, right: Tensor) -> zip[tuple[Tensor, Tensor]]:
    rows = max(1, PART // max(1, left[:1].numel()))
    return zip(left.split(rows), right.split(rows), strict=True)
