"""The operations of a forward pass, by which a proof that was made on one batch is known to hold for another."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from curvops.kronecker.operations import REDUCTIONS
from curvops.tree import nodes_of

LEAF = "torch::autograd::AccumulateGrad"
PLAIN = {type(None), bool, int, float, complex, str, torch.dtype, torch.device}

# a tensor, its number, whether it depends on the data, and whether it may have an axis for them
Known = tuple[ref[Tensor], str, bool, bool]


def of_nested(what: str) -> NotImplementedError:
    """The error where there are nested tensors, of which rows belong to no datum by their place."""
    return NotImplementedError(
        f"{what} Pad them (X.to_padded_tensor(0.0), with the lengths as a second tensor of X), or take HessianLinearOperator, "
        "GGNLinearOperator or EFLinearOperator."
    )


@dataclass(frozen=True)
class Signature:
    """The operations of a forward pass: functions, which tensors they take and give, settings, and shapes."""

    size: int  # number of data
    entries: tuple[Any, ...]  # in the order of the calls; tensors by their number, as text

    def covers(self, later: Signature) -> bool:
        """Whether another pass makes the same operations, on other data and maybe on another number of them.

        Integers, such as sizes, are the same if they are equal, or the same multiple of the number of data.
        """
        if len(self.entries) != len(later.entries):
            return False
        if self.entries == later.entries:
            return True
        m, n = self.size, later.size
        return all(
            a == b or (type(a) is type(b) is int and m > 1 and not a % m and not b % n and a // m == b // n)
            for a, b in zip(self.entries, later.entries, strict=True)
        )


class Recording:
    """Takes down the calls of a forward pass of ``size`` data.

    Tensors other than the parameters get numbers in the order in which they appear. It ``mixes`` if a result that
    depends on the data has no axis for them, such as a mean over the batch, or if it may be made by what has two, such
    as a graph of the data: how much it mixes them may depend on their values, and no signature shows that. It ``pools``
    if there is a result without an axis for the data, through which no gradient may flow.
    """

    def __init__(self, parameters: Iterable[Tensor], size: int) -> None:
        self.size, self.mixes, self.pools = size, False, False
        self._entries: list[Any] = []
        self._met: list[Tensor] = []  # tensors of the data that the current call takes
        self._known: dict[int, Known] = {}  # by `id`
        self._count = 0
        for tensor in parameters:
            self._remember(tensor, False)

    def signature(self, output: Tensor) -> Signature:
        """What was taken down, for a pass with an output."""
        known = self._find(output) or self._remember(output, True)
        # the graph shows what no call does: traced modules, functions with a backward of their own, views made before
        graph = [(node.name(), self._name(node) if node.name() == LEAF else "") for node in nodes_of(output)]
        return Signature(self.size, (*self._entries, known[1], *output.shape, *graph))

    def call(self, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> list[Tensor]:
        """Take down a call; returns the tensors that came into being by it."""
        self._entries.append(func)
        self._met = []
        of_data = self.add(args) | (self.add(kwargs) if kwargs else False)
        several, born = len(self._met) > 1, []
        pairs = [t for t in self._met if self._has_pairs(t)] if several else []
        if pairs and any(t.requires_grad for t in self._met):
            # images may be as high and wide as batches have data
            next_to = [t.shape[k : k + 2] for t in pairs if t.ndim < 4 and not t.requires_grad for k in range(t.ndim)]
            self.mixes = self.mixes or (self.size, self.size) in next_to
        in_place = func is Tensor.__setitem__ or (args and out is args[0] and getattr(func, "__name__", "")[-1:] == "_")
        for result in args[:1] if in_place else out if isinstance(out, (list, tuple)) else (out,):
            if isinstance(result, Tensor):
                known = self._find(result)
                if known is None:
                    born.append(result)
                if known is None or (of_data and in_place):
                    known = self._remember(result, of_data)
                requires_grad = result.requires_grad
                self._entries += (known[1], result.dtype, requires_grad, *result.shape)
                if of_data and not self.mixes and self._reduced(func, args, result, known[3]):
                    self.pools, self.mixes = True, requires_grad
                if several and not pairs and not self.mixes:
                    self.mixes = self._has_pairs(result)
            elif isinstance(result, int):  # the model may branch here
                self._entries.append(result)
        return born

    def add(self, value: Any) -> bool:
        """Take down an argument, a tensor by its number, at first by its shape too; whether it depends on the data."""
        kind = type(value)
        if kind in PLAIN:
            self._entries.append(value)
            return False
        if kind is tuple or kind is list:
            self._entries.append(len(value))
            of_data = False
            for part in value:
                of_data = self.add(part) or of_data
            return of_data
        if isinstance(value, Tensor):
            known = self._find(value)
            if known is None:
                known = self._remember(value)
                self._entries += value.shape
            _, number, of_data, has_axis = known
            self._entries.append(number)
            if of_data or (has_axis and not value.requires_grad):
                self._met.append(value)
            return of_data
        if isinstance(value, (tuple, list, dict)):
            return self.add(list(value.items() if isinstance(value, dict) else value))
        if isinstance(value, slice):
            return self.add((value.start, value.stop, value.step))
        self._entries.append(kind)
        return False

    def _has_pairs(self, tensor: Tensor) -> bool:
        """Whether a tensor has two axes for the data: it may say for each pair how they are mixed."""
        return self.size > 1 and tensor.shape.count(self.size) > 1

    def _reduced(self, func: Any, args: Any, result: Tensor, has_axis: bool) -> bool:
        """Whether a result lacks the axis of the data, for all that shapes tell."""
        if self.size == 1 or not has_axis:
            return self.size > 1
        operands = [t for t in args[:1] if isinstance(t, Tensor)] if func in REDUCTIONS else ()
        return any(t.shape.count(self.size) > result.shape.count(self.size) for t in operands)

    def _name(self, leaf: Any) -> str:
        known = self._find(leaf.variable)
        return known[1] if known is not None else "leaf"

    def _find(self, tensor: Tensor) -> Known | None:
        known = self._known.get(id(tensor))
        # an id is used again once its tensor is gone
        return known if known is not None and known[0]() is tensor else None

    def _remember(self, tensor: Tensor, of_data: bool | None = None) -> Known:
        """Number a tensor; one that nothing is known of depends on the data if it may have an axis for them."""
        if tensor.is_nested:
            raise of_nested("model: it makes nested tensors, and Kronecker operators take none.")
        self._count += 1
        has_axis = any(length % self.size == 0 for length in tensor.shape)
        known = ref(tensor), f"tensor {self._count}", has_axis if of_data is None else of_data, has_axis
        self._known[id(tensor)] = known
        return known
