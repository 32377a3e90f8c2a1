"""The rows of all passes over the data, and once more: kept while they fit, else from a further walk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from curvops.kronecker.factors import WholeGradients
from curvops.kronecker.groups import Group, Key
from curvops.kronecker.progress import Progress
from curvops.kronecker.rows import Pass, Rows
from curvops.kronecker.shares import decompositions, summed
from curvops.kronecker.state import Entry
from curvops.kronecker.sweep import Sweep
from curvops.kronecker.uses import Use
from curvops.operators.blocks import KroneckerBlock
from curvops.operators.eigen import has_basis
from curvops.spill import Places, Spill

TOGETHER = 32 * 2**20  # bytes of output gradients of one forward pass that are taken together, within the budget


class Consumer(Protocol):
    """Takes the rows of linear groups."""

    parts: dict[Key, Entry]  # what was added so far, to which another one can add

    def add(self, group: Group, uses: list[Rows], found: Pass) -> None:
        """Add the rows of a layer in a pass."""

    def entries(self, groups: Mapping[Key, Group], data: Mapping[str, int]) -> dict[Key, Entry]:
        """What was added, of these groups, each parameter of which was reached by so many data."""


class Collection:
    """Walks the data for an operator, or looks at the first batch to plan it, with shapes on the ``meta`` device."""

    def __init__(self, sweep: Sweep, title: str, planned: bool, progress: Progress) -> None:
        self.sweep, self.title, self.planned, self.progress = sweep, title, planned, progress
        self.dtype = torch.promote_types(sweep.risk.space.dtype, torch.float32)
        spill = Spill(sweep.options.spill, sweep.risk.space.device)  # where large tensors go
        self.spill = Spill(None, torch.device("meta")) if planned else spill
        self.kept_bytes = 0  # in memory
        self._kept: list[list[tuple[Key, Sequence[Rows]]]] = []
        self._stored: tuple[Places, list[Tensor]] = ({}, [])  # of a pass, what is on disk already
        self._open = False  # whether all batches' rows are kept
        self._planned: dict[int, Use] = {}

    @property
    def budget(self) -> int:
        """Bytes that rows may take."""
        return self.progress.budget

    def first(
        self, make: Callable[[], Consumer], *, dense: bool = True, keep: bool = False, together: bool = False
    ) -> dict[Key, Entry]:
        """What a consumer makes of the rows of all passes, and the blocks of whole gradients, ``dense`` or diagonals.

        They are those of all processes that share the data. The consumer is made anew where a batch contradicts an
        earlier one. Rows are kept for `again` if asked to; ``together`` says whether the backward passes of a forward
        pass are better taken together.
        """
        sweep, share = self.sweep, min(self.budget // 4, TOGETHER) if together else 0
        progress, more = self.progress, keep or self.progress.keeps
        sweep.noted = progress.keeps
        while True:
            consumer, wholes = make(), WholeGradients(self.sweep.options, dense, self.dtype, self.spill)
            start, known = progress.resume(sweep)
            for key, part in known.items():
                parts = consumer.parts if sweep.grouping.groups[key].kind == "linear" else wholes.parts
                parts[key] = self._on_disk(part)

            def done(
                place: int, due: bool = False, takers: tuple[Consumer, WholeGradients] = (consumer, wholes)
            ) -> None:
                progress.write(place, sweep, lambda: takers[0].parts | takers[1].parts, due=due)

            if not (start or self.planned):
                done(0, due=True)
            # what a run that was killed had kept is gone
            self._kept, self.kept_bytes = [], 0
            self._open = keep and not (self.planned or start) and (self.budget > 0 or self.spill.active)
            passes = sweep.planned() if self.planned else sweep.walk(self.title, share, more, start, done)
            for found in passes:
                for group, uses in found.rows():
                    consumer.add(group, uses, found)  # first: a convolution's factor may need no windows
                    self._keep(group, uses, found)
                for group, gradients in found.gradients():
                    wholes.add(group, gradients)
                del found  # its graph is gone before the next one grows
                self._stored = {}, []
            if sweep.grouping.again:
                continue
            if not self.planned:
                done(len(sweep.cuts), due=True)
            if self.planned or sweep.agree():
                groups, data, reduces = sweep.grouping.groups, sweep.data, sweep.options.kfac_approx == "reduce"
                own = consumer.entries(groups, data) | wholes.parts
                return summed(sweep.risk.ranks, groups, own, data, reduces, self.spill)
            progress.next()

    def second(self, first: Callable[[], dict[Key, Entry]]) -> dict[Key, Entry]:
        """The entries that further looks start from: what the ``first`` one gives, or what a checkpoint knows."""
        if (known := self.progress.second(self.sweep)) is not None:
            return {key: self._on_disk(entry) for key, entry in known.items()}
        entries = first()
        self.keep(entries)
        return entries

    def keep(self, entries: Mapping[Key, Entry]) -> None:
        """Write a state between two further looks."""
        self.progress.next()
        self.progress.write(0, self.sweep, lambda: entries, second=True, due=True)

    def compare(self) -> None:
        """Look at the data of a run that was through, only to compare them."""
        self.progress.place = len(self.sweep.cuts)
        for _ in self.again("comparison"):
            pass

    def add_all(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors, of the same shapes in all processes that share the data, by their sums over these."""
        ranks = self.sweep.risk.ranks
        ranks.meet(f"{self.title}: {len(tensors)} sums")
        ranks.add_all(tensors)

    def again(self, title: str, entries: dict[Key, Entry] | None = None) -> Iterator[tuple[Key, Sequence[Rows]]]:
        """The rows of each linear group in each forward pass once more, for some or all of its backward passes.

        If there are ``entries`` that the caller adds to, this look goes on where a checkpoint says.
        """

        def done(place: int, due: bool = False) -> None:
            if entries is not None:
                self.progress.write(place, self.sweep, lambda: entries, second=True, due=due)

        for place, batch in enumerate(self._kept):
            yield from batch
            done(place + 1)
        if not (self._open or self.planned):
            share, start = min(self.budget // 4, TOGETHER), max(len(self._kept), self.progress.place)
            for found in self.sweep.further(f"{self.title} {title}", start, share, done):
                for group, uses in found.rows():
                    yield group.key, [rows.formed() for rows in uses]
                del found
        if not self.planned:
            done(len(self.sweep.cuts), due=True)

    def scaled(self, block: KroneckerBlock) -> list[Tensor]:
        """The factors of a block, of which those that were multiplied by a scale are new."""
        known = block.tensors["left"], block.tensors["right"]
        found = zip((block.left, block.right), known, strict=True)
        return [factor if factor is own else self.spill.put(factor) for factor, own in found]

    def eigenvectors(self, factors: list[tuple[Tensor, str]]) -> list[Tensor | None]:
        """Eigenvectors of factors with labels, ``None`` for a diagonal one; the factors are given up one by one."""
        if self.planned:
            return [factor if has_basis(factor.shape) else None for factor, _ in factors]
        return [vectors for _, vectors in decompositions(self.sweep.risk.ranks, factors, self.spill)]

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
        tensors = [t for made in rows for t in made.tensors]
        new = {t.data_ptr(): t.numel() * t.itemsize for t in tensors if t.data_ptr() not in self._places}
        if self.spill.active and self.kept_bytes + sum(new.values()) > self.budget:
            for made in rows:
                self._store(made)
            return
        self._places |= new
        self.kept_bytes += sum(new.values())
        if self.kept_bytes > self.budget:
            self._kept.pop()
            self.kept_bytes -= sum(self._places.values())
            self._open = False

    def _store(self, rows: Rows) -> None:
        """Move formed rows to files; the output gradients of weight and bias are one."""
        places, held = self._stored
        held += rows.outputs
        rows.replace(self.spill.put(rows.tensors[0]), self.spill.put_all(rows.outputs, places))

    def _on_disk(self, entry: Entry) -> Entry:
        return replace(entry, tensors={name: self.spill.put(tensor) for name, tensor in entry.tensors.items()})
