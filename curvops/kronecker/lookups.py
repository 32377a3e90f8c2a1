"""Rows of a table that are looked up, followed to where they are added to something.

A position's row is looked up once and added to every datum. Its gradient at the lookup is a sum over the data; at
the addition each datum has its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from curvops.kronecker.uses import ABSENT, LinearUse, OneHot, View, one_group
from curvops.sharding import gathered, is_sharded


@dataclass
class Lookup:
    """One lookup."""

    table: View
    width: int  # the number of its rows
    plain: LinearUse  # the lookup itself as a use
    added: list[LinearUse] = field(default_factory=list)  # the additions that its rows enter
    elsewhere: bool = False  # whether they enter another operation


class Lookups:
    """The lookups of a forward pass, and the tensors that are rows of one, in whatever arrangement."""

    def __init__(self) -> None:
        self._all: list[Lookup] = []
        self._rows: dict[int, tuple[Lookup, Tensor]] = {}  # by tensor: the lookup, and the number of each row
        self._kept: list[Tensor] = []  # ids stay valid while the tensors live

    @property
    def uses(self) -> list[LinearUse]:
        """Each lookup's additions, if its rows enter nothing else; else the lookup itself."""
        found = []
        for lookup in self._all:
            found += [lookup.plain] if lookup.elsewhere or not lookup.added else lookup.added
        return found

    def __contains__(self, tensor: object) -> bool:
        return id(tensor) in self._rows

    def start(self, out: Tensor, table: View, ids: Tensor, width: int) -> None:
        """Rows ``ids`` of a table are looked up; −1 for rows without a gradient."""
        lookup = Lookup(table, width, _use(table, ids, width, out))
        self._all.append(lookup)
        self._remember(out, lookup, ids)

    def leave_out(self, tensor: Tensor, there: Tensor) -> None:
        """Rows that only fill up a bag are no lookups."""
        if tensor in self:
            lookup, ids = self._rows[id(tensor)]
            ids = ids.masked_fill(~there, ABSENT)
            lookup.plain = _use(lookup.table, ids, lookup.width, tensor)
            self._remember(tensor, lookup, ids)

    def add(self, out: Tensor, tensor: Tensor, plain: bool = False) -> None:
        """Rows are added to something or broadcast, and followed there unless ``plain``."""
        lookup, ids = self._rows[id(tensor)]
        if plain or tensor.shape[-1] != out.shape[-1]:
            lookup.elsewhere = True
            return
        spread = ids.expand(out.shape[:-1])
        lookup.added.append(_use(lookup.table, spread, lookup.width, out))
        if out is tensor:  # in place: it holds a sum from now on
            del self._rows[id(tensor)]

    def cast(self, tensor: Tensor, out: Tensor) -> None:
        """Rows are moved, copied or turned to another precision; they stay the same rows."""
        self._remember(out, *self._rows[id(tensor)])

    def use(self, tensors: Sequence[Tensor]) -> None:
        """Rows enter an operation that is not followed."""
        for tensor in tensors:
            self._rows[id(tensor)][0].elsewhere = True

    def arrange(self, func: Callable[..., Any], tensor: Tensor, args: Any, kwargs: Any, out: Any) -> None:
        """Rows are arranged in another way: the same operation on their places tells how."""
        lookup, ids = self._rows[id(tensor)]
        size = tensor.shape[-1]
        ramp = torch.arange(size, device=ids.device)
        # shifted by one row, so that −1 stays a row
        places = func((ids.unsqueeze(-1) + 1) * size + ramp, *args, **kwargs)
        for part, place in zip(*(((out,), (places,)) if isinstance(out, Tensor) else (out, places)), strict=True):
            whole = place.ndim > 0 and place.shape[-1] == size
            if whole and torch.equal(place % size, ramp.expand_as(place)):
                self._remember(part, lookup, place[..., 0] // size - 1)
            else:
                lookup.elsewhere = True

    def _remember(self, tensor: Tensor, lookup: Lookup, ids: Tensor) -> None:
        self._rows[id(tensor)] = (lookup, ids)
        self._kept.append(tensor)


def _use(table: View, ids: Tensor, width: int, out: Tensor) -> LinearUse:
    edge, rows = get_gradient_edge(out), OneHot(gathered(ids).unsqueeze(-1), width)
    outputs = (lambda g: one_group(gathered(g))) if is_sharded(out) else one_group
    return LinearUse(table, None, edge, lambda: rows, outputs, "left", False, "embedding", out.shape, one_hot=True)
