"""The operations of a forward pass, by which a proof that was made on one batch is known to hold for another."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from curvops.kronecker.operations import REDUCTIONS

PLAIN = {type(None), bool, int, float, complex, str, torch.dtype, torch.device}


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
    depends on the data has no axis for them, such as a mean over the batch: how much it mixes them may depend on their
    values, and no signature shows that.
    """

    def __init__(self, parameters: Iterable[Tensor], size: int) -> None:
        self.size, self.mixes = size, False
        self._entries: list[Any] = []
        # by `id`: the tensor, its number, and whether it depends on the data
        self._known: dict[int, tuple[ref[Tensor], str, bool]] = {}
        self._count = 0
        for tensor in parameters:
            self._remember(tensor, False)

    def signature(self, output: Tensor) -> Signature:
        """What was taken down, for a pass with an output."""
        known = self._find(output) or self._remember(output, True)
        return Signature(self.size, (*self._entries, known[1], *output.shape))

    def call(self, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> list[Tensor]:
        """Take down a call; returns the tensors that came into being by it."""
        self._entries.append(func)
        of_data = self.add(args) | (self.add(kwargs) if kwargs else False)
        born = []
        for result in out if isinstance(out, (list, tuple)) else (out,):
            if isinstance(result, Tensor):
                known = self._find(result)
                born += [] if known else [result]
                known = known or self._remember(result, of_data)
                self._entries += [known[1], result.dtype, result.requires_grad, *result.shape]
                self.mixes = self.mixes or (of_data and result.requires_grad and self._reduced(func, args, result))
            elif isinstance(result, bool):  # the model may branch here
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
                known = self._remember(value, self._has_data(value))
                self._entries += value.shape
            self._entries.append(known[1])
            return known[2]
        if isinstance(value, (tuple, list, dict)):
            return self.add(list(value.items() if isinstance(value, dict) else value))
        if isinstance(value, slice):
            return self.add((value.start, value.stop, value.step))
        self._entries.append(kind)
        return False

    def _has_data(self, tensor: Tensor) -> bool:
        """Whether a tensor may have an axis for the data."""
        return any(length % self.size == 0 for length in tensor.shape)

    def _reduced(self, func: Any, args: Any, result: Tensor) -> bool:
        """Whether a result lacks the axis of the data, for all that shapes tell."""
        if self.size == 1 or not self._has_data(result):
            return self.size > 1
        operands = [t for t in args[:1] if isinstance(t, Tensor) and func in REDUCTIONS]
        return any(list(t.shape).count(self.size) > list(result.shape).count(self.size) for t in operands)

    def _find(self, tensor: Tensor) -> tuple[ref[Tensor], str, bool] | None:
        known = self._known.get(id(tensor))
        # an id is used again once its tensor is gone
        return known if known is not None and known[0]() is tensor else None

    def _remember(self, tensor: Tensor, of_data: bool) -> tuple[ref[Tensor], str, bool]:
        self._count += 1
        self._known[id(tensor)] = known = ref(tensor), f"tensor {self._count}", of_data
        return known
