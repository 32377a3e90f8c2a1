"""Lengths and scalar products of columns in double precision: single has no squares of what is below 1e-20 or above 1e19."""

from __future__ import annotations

import torch
from torch import Tensor

PART = 2**18  # entries that are brought to double precision together


def lengths(columns: Tensor) -> Tensor:
    """The norm of each column ``[D, K]``, ``[K]``."""
    if columns.dtype == torch.float64:
        return torch.linalg.vector_norm(columns, dim=0)
    return dots(columns, columns).sqrt()


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


def power_of_two(tensor: Tensor) -> Tensor:
    """One near the largest entry, by which a tensor can be divided without rounding; of zeros 1."""
    largest = tensor.abs().amax() if tensor.numel() else tensor.new_zeros(())
    return torch.where(largest > 0, largest / torch.frexp(largest).mantissa, 1.0)


def _parts(left: Tensor, right: Tensor) -> zip[tuple[Tensor, Tensor]]:
    rows = max(1, PART // max(1, left[:1].numel()))
    return zip(left.split(rows), right.split(rows), strict=True)
