"""Nested inputs (tensors in tuples, lists and mappings): find, replace and slice their tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

LARGE = 2**14  # entries from which the words of a tensor are added up instead of its entries


def map_tensors(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """The same structure with each tensor replaced; anything else is kept as it is."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        items = {key: map_tensors(function, value) for key, value in tree.items()}
        if type(tree) is dict:
            return items
        if hasattr(tree, "data") and hasattr(tree, "convert_to_tensors"):
            # a tokenizer's BatchEncoding keeps its items in `.data`; its `.to` would change the caller's
            new = copy.copy(tree)
            new.data = items
            return new
        return type(tree)(items)  # type: ignore[call-arg]  # a mapping type that is built from a dict
    if isinstance(tree, tuple):
        parts = [map_tensors(function, part) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    if isinstance(tree, list):
        return [map_tensors(function, part) for part in tree]
    return tree


def tensors_of(tree: Any) -> list[Tensor]:
    """The tensors of a structure, in order."""
    found: list[Tensor] = []
    map_tensors(found.append, tree)
    return found


def content(tensors: Sequence[Tensor]) -> object:
    """Changes with the tensors' values, also where they change behind autograd's back (``t.data``, NumPy views)."""
    tensors = [t.detach() for t in tensors]
    versions = tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)
    norm = get_total_norm([t for t in tensors if t.is_floating_point()])
    large = [t for t in tensors if _has_words(t)]
    small = [t for t in tensors if t.numel() and not t.is_complex() and not _has_words(t)]
    sums = [[t.sum(dtype=torch.float64) for t in small], [t.view(torch.int64).sum() for t in large]]
    return versions, float(norm), *(tuple(torch.stack(each).tolist()) if each else () for each in sums)


def _has_words(t: Tensor) -> bool:
    """Whether a tensor can be read, and is worth reading, as 64-bit words, whose sum needs no copy in double precision."""
    aligned = t.is_contiguous() and t.storage_offset() * t.itemsize % 8 == 0
    return type(t) is Tensor and t.numel() >= LARGE and aligned and t.shape[-1] * t.itemsize % 8 == 0


def select(tree: Any, size: int, index: Any) -> Any:
    """The structure with each tensor whose first axis has ``size`` entries indexed along it."""
    return map_tensors(lambda t: t[index] if t.ndim and t.shape[0] == size else t, tree)
