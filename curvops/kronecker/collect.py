"""The rows of all passes over the data, and once more: kept while they fit, else from a further walk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from curvops.kronecker.factors import WholeGradients
from curvops.kronecker.groups import Group, Key
from curvops.kronecker.rows import Pass, Rows
from curvops.kronecker.shares import decompositions, summed
from curvops.kronecker.state import Entry
from curvops.kronecker.sweep import Sweep
from curvops.kronecker.uses import OneHot, Use
from curvops.memory import budget
from curvops.operators.eigen import has_basis

TOGETHER = 32 * 2**20  # bytes of output gradients of one forward pass that are taken together, within the budget


class Consumer(Protocol):
    """Takes the rows of linear groups."""

    def add(self, group: Group, uses: list[Rows], found: Pass) -> None:
        """Add the rows of a layer in a pass."""


SomeConsumer = TypeVar("SomeConsumer", bound=Consumer)


class Collection:
    """Walks the data for an operator, or looks at the first batch to plan it, with shapes on the ``meta`` device."""

    def __init__(self, sweep: Sweep, title: str, planned: bool) -> None:
        self.sweep, self.title, self.planned = sweep, title, planned
        self.dtype = torch.promote_types(sweep.risk.space.dtype, torch.float32)
        self.device = torch.device("meta") if planned else sweep.risk.space.device
        self.kept_bytes = 0
        self._kept: list[list[tuple[Key, Sequence[Rows]]]] = []
        self._open = False  # whether all batches' rows are kept
        self._planned: dict[int, Use] = {}

    @cached_property
    def budget(self) -> int:
        """Bytes that rows may take."""
        return budget(self.sweep.risk.space.device, self.sweep.options.memory_budget)

    def first(
        self, make: Callable[[], SomeConsumer], *, dense: bool = True, keep: bool = False, together: bool = False
    ) -> tuple[SomeConsumer, dict[Key, Entry]]:
        """A consumer that took the rows of all passes, and the blocks of whole gradients, ``dense`` or diagonals.

        It is made anew where a batch contradicts an earlier one. Rows are kept for `again` if asked to; ``together``
        says whether the backward passes of a forward pass are better taken together.
        """
        sweep, share = self.sweep, min(self.budget // 4, TOGETHER) if together else 0
        while True:
            consumer, wholes = make(), WholeGradients(self.sweep.options, dense, self.dtype, self.device)
            self._kept, self.kept_bytes, self._open = [], 0, keep and not self.planned and self.budget > 0
            for found in sweep.planned() if self.planned else sweep.walk(self.title, share, keep):
                for group, uses in found.rows():
                    consumer.add(group, uses, found)  # first: a convolution's factor may need no windows
                    self._keep(group, uses, found)
                for group, gradients in found.gradients():
                    wholes.add(group, gradients)
                del found  # its graph is gone before the next one grows
            if (self.planned and not sweep.grouping.again) or (not self.planned and sweep.agree()):
                return consumer, wholes.entries()

    def summed(self, entries: Mapping[Key, Entry]) -> dict[Key, Entry]:
        """Entries over the data of all processes that share them."""
        sweep = self.sweep
        reduces = sweep.options.kfac_approx == "reduce"
        return summed(sweep.risk.ranks, sweep.grouping.groups, entries, sweep.data, reduces)

    def add_all(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors, of the same shapes in all processes that share the data, by their sums over these."""
        ranks = self.sweep.risk.ranks
        ranks.meet(f"{self.title}: {len(tensors)} sums")
        ranks.add_all(tensors)

    def again(self, title: str) -> Iterator[tuple[Key, Sequence[Rows]]]:
        """The rows of each linear group in each forward pass once more, for some or all of its backward passes."""
        for batch in self._kept:
            yield from batch
        if not (self._open or self.planned):
            share = min(self.budget // 4, TOGETHER)
            for found in self.sweep.further(f"{self.title} {title}", len(self._kept), share):
                for group, uses in found.rows():
                    yield group.key, [rows.formed() for rows in uses]
                del found

    def eigenvectors(self, factors: list[tuple[Tensor, str]]) -> list[Tensor | None]:
        """Eigenvectors of factors with labels, ``None`` for a diagonal one; the factors are given up one by one."""
        if self.planned:
            return [factor if has_basis(factor.shape) else None for factor, _ in factors]
        return [vectors for _, vectors in decompositions(self.sweep.risk.ranks, factors)]

    def _keep(self, group: Group, uses: list[Rows], found: Pass) -> None:
        """Keep rows, if there is room for all of their batch."""
        for one in uses if self.planned else ():
            self.kept_bytes += one.bytes(found.count, id(one.use) not in self._planned)
            self._planned[id(one.use)] = one.use  # weight and bias share its output gradients
        if not self._open:
            return
        if found.batch == len(self._kept):
            self._kept.append([])
            self._places: dict[int, int] = {}  # uses share tensors
        rows = [use.formed() for use in uses]
        self._kept[-1].append((group.key, rows))
        for inputs, outputs in ((made.inputs, made.outputs) for made in rows):
            for t in (inputs.ids if isinstance(inputs, OneHot) else inputs, *outputs):
                if t.data_ptr() not in self._places:
                    self._places[t.data_ptr()] = t.numel() * t.itemsize
                    self.kept_bytes += self._places[t.data_ptr()]
        if self.kept_bytes > self.budget:
            self._kept.pop()
            self.kept_bytes -= sum(self._places.values())
            self._open = False
