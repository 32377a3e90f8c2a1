"""Norms that can be differentiated twice where a row is zero, as padding is: PyTorch's own derivatives are no numbers there.

Its first derivative at zero is zero; so is what these norms have there of any order. Other rows have the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from curvops.sharding import is_sharded

Axes = int | Sequence[int] | None


def vector_norm(
    x: Tensor, ord: Any = 2, dim: Axes = None, keepdim: bool = False, *, dtype: Any = None, out: Any = None
) -> Tensor:
    if out is not None or not _is_plain(x):
        return torch.linalg.vector_norm(x, ord, dim, keepdim, dtype=dtype, out=out)
    axes = ([dim] if isinstance(dim, int) else list(dim or ())) or list(range(x.ndim))
    zero = (x == 0).all(axes, keepdim=True)
    # a row of ones in its place, and no branch: which rows are zero is a matter of the data
    found = torch.linalg.vector_norm(x.masked_fill(zero, 1), ord, axes, keepdim, dtype=dtype)
    return found.masked_fill(zero if keepdim else zero.squeeze(axes), 0)


def norm(
    input: Tensor, p: Any = "fro", dim: Axes = None, keepdim: bool = False, out: Any = None, dtype: Any = None
) -> Tensor:
    of_entries = p is None or not isinstance(p, str) or (p == "fro" and (dim is None or _count(dim, 0) <= 2))
    if not of_entries or not _is_plain(input):
        return torch.norm(input, p, dim, keepdim, out, dtype)
    return vector_norm(input, 2.0 if p is None or p == "fro" else p, dim, keepdim, dtype=dtype, out=out)


def method_norm(input: Tensor, p: Any = "fro", dim: Axes = None, keepdim: bool = False, dtype: Any = None) -> Tensor:
    return norm(input, p, dim, keepdim, dtype=dtype)


def linalg_norm(
    A: Tensor, ord: Any = None, dim: Axes = None, keepdim: bool = False, *, out: Any = None, dtype: Any = None
) -> Tensor:
    count = _count(dim, A.ndim)
    if ord is None or (ord == "fro" and count == 2) or (count == 1 and not isinstance(ord, str)):
        return vector_norm(A, 2 if ord is None or ord == "fro" else ord, dim, keepdim, dtype=dtype, out=out)
    return torch.linalg.norm(A, ord, dim, keepdim, out=out, dtype=dtype)


def matrix_norm(
    A: Tensor, ord: Any = "fro", dim: Any = (-2, -1), keepdim: bool = False, *, dtype: Any = None, out: Any = None
) -> Tensor:
    if ord == "fro" and A.ndim > 1 and _count(dim, 0) == 2:
        return vector_norm(A, 2, dim, keepdim, dtype=dtype, out=out)
    return torch.linalg.matrix_norm(A, ord, dim, keepdim, dtype=dtype, out=out)


def normalize(input: Tensor, p: float = 2.0, dim: Any = 1, eps: float = 1e-12, out: Tensor | None = None) -> Tensor:
    if out is not None or not _is_plain(input):
        return F.normalize(input, p, dim, eps, out)
    return input / vector_norm(input, p, dim, keepdim=True).clamp_min(eps).expand_as(input)


def cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    kind = torch.result_type(x1, x2)

    def unit(x: Tensor) -> Tensor:
        length = vector_norm(x.to(kind), 2, dim, keepdim=True)
        return x / (length + (length.clamp_min(eps) - length).detach())  # PyTorch does not differentiate the bound

    first, second = torch.broadcast_tensors(x1, x2)
    return (unit(first) * unit(second)).sum(dim)


def _is_plain(x: Tensor) -> bool:
    return x.layout == torch.strided and not x.is_nested and not is_sharded(x)


def _count(dim: Axes, every: int) -> int:
    return every if dim is None else 1 if isinstance(dim, int) else len(dim)


NORMS: dict[Any, Any] = {
    torch.linalg.vector_norm: vector_norm,
    torch.norm: norm,
    Tensor.norm: method_norm,
    torch.linalg.norm: linalg_norm,
    torch.linalg.matrix_norm: matrix_norm,
    F.normalize: normalize,
    F.cosine_similarity: cosine_similarity,
}
