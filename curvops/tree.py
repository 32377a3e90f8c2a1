"""Nested inputs (tensors in tuples, lists and mappings) and graphs: find, replace and slice their tensors, walk their nodes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node


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
    if isinstance(tree, (tuple, list)):
        parts = [map_tensors(function, part) for part in tree]
        if isinstance(tree, list):
            return parts
        # whatever a class of named tuples makes of its arguments, as a PackedSequence does
        make: Callable[[list[Any]], Any] = getattr(type(tree), "_make", tuple)
        return make(parts)
    return tree


def tensors_of(tree: Any) -> list[Tensor]:
    """The tensors of a structure, in order."""
    found: list[Tensor] = []
    map_tensors(found.append, tree)
    return found


def strided(tensor: Tensor) -> list[Tensor]:
    """The tensor, or what a sparse one is made of (its entries and their places), or a nested one."""
    if tensor.is_nested:
        return list(tensor.unbind())
    if tensor.layout == torch.strided:
        return [tensor]
    sparse = tensor if tensor.layout == torch.sparse_coo else tensor.to_sparse_coo()
    return [sparse._values(), sparse._indices()]


def shape_of(tensor: Tensor) -> Sequence[int]:
    """Its shape; of a nested one, which has none, the number of its parts and of their entries."""
    if not tensor.is_nested:
        return tensor.shape
    whole: Any = tensor
    return tensor.size(0), (whole._values if tensor.layout == torch.jagged else whole).numel()


def select(tree: Any, size: int, index: Any) -> Any:
    """The structure with each tensor whose first axis has ``size`` entries indexed along it; a sparse one stays whole."""

    def some(t: Tensor) -> Tensor:
        return t[index] if t.ndim and t.shape[0] == size and t.layout == torch.strided else t

    return map_tensors(some, tree)


def nodes_of(tensor: Tensor) -> Iterator[Node]:
    """The nodes of a tensor's graph, each once."""
    seen, todo = set[Node](), [tensor.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            todo += [following for following, _ in node.next_functions]
