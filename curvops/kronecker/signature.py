"""The operations of a forward pass, by which a proof that was made on one batch is known to hold for another."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor

PLAIN = {type(None), bool, int, float, complex, str, torch.dtype, torch.device}


@dataclass(frozen=True)
class Signature:
    """The operations of a forward pass: functions, which tensors they take and give, settings, and shapes.

    Attributes:
        size: Number of data.
        entries: All of it in the order of the calls; tensors by their number, as text.
    """

    size: int
    entries: tuple[Any, ...]

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
    """Takes down the calls of a forward pass.

    Args:
        parameters: Tensors that all passes have in common; others get numbers in the order in which they appear.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._entries: list[Any] = []
        self._count = 0
        self._numbers: dict[int, tuple[ref[Tensor], str]] = {}
        for tensor in parameters:
            self._number(tensor)

    def signature(self, output: Tensor, size: int) -> Signature:
        """What was taken down, for a pass over so many data with an output."""
        return Signature(size, (*self._entries, *self._number(output), *output.shape))

    def call(self, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> list[Tensor]:
        """Take down a call; returns the tensors that came into being by it."""
        self._entries.append(func)
        self.add(args)
        if kwargs:
            self.add(kwargs)
        born = []
        for result in out if isinstance(out, (list, tuple)) else (out,):
            if isinstance(result, Tensor):
                number, new = self._number(result)
                self._entries += [number, result.dtype, result.requires_grad, *result.shape]
                born += [result] * new
            elif isinstance(result, bool):  # the model may branch here
                self._entries.append(result)
        return born

    def add(self, value: Any) -> None:
        """Take down an argument; a tensor by its number, and by its shape when it is first seen."""
        if type(value) in PLAIN:
            self._entries.append(value)
        elif type(value) in (tuple, list):
            self._entries.append(len(value))
            for part in value:
                self.add(part)
        elif isinstance(value, Tensor):
            number, new = self._number(value)
            self._entries += [number, *value.shape] if new else [number]
        elif isinstance(value, (tuple, list, dict)):
            self.add(list(value.items() if isinstance(value, dict) else value))
        elif isinstance(value, slice):
            self.add((value.start, value.stop, value.step))
        else:
            self._entries.append(type(value))

    def _number(self, tensor: Tensor) -> tuple[str, bool]:
        """The number of a tensor, and whether it is new."""
        known = self._numbers.get(id(tensor))
        if known is not None and known[0]() is tensor:  # an id is used again once its tensor is gone
            return known[1], False
        self._count += 1
        number = f"tensor {self._count}"
        self._numbers[id(tensor)] = ref(tensor), number
        return number, True
