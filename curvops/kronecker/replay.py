"""The rows of all backward passes once more: from memory while they fit the budget, else by a second sweep."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping

from curvops.kronecker.captured import Captured
from curvops.kronecker.groups import Key, Piece, pieces
from curvops.kronecker.sweep import Sweep
from curvops.kronecker.uses import OneHot

Rows = Mapping[Key, list[Piece]]
TOGETHER = 4  # share of the budget that the rows of a second sweep may take


class Collector(ABC):
    """Takes each backward pass of a sweep, and can start anew."""

    @abstractmethod
    def clear(self) -> None:
        """Forget everything."""

    @abstractmethod
    def add(self, place: int, captured: Captured) -> None:
        """Take one backward pass of the batch at ``place``."""


class Replay(Collector):
    """Keeps what the first sweep gave, batch by batch from the first, while it fits.

    Args:
        sweep: The sweep; a second one draws the same samples.
        budget: Bytes that may be kept.
    """

    def __init__(self, sweep: Sweep, budget: int) -> None:
        self._sweep, self._budget = sweep, budget
        self._kept: list[list[Rows]] = []
        self._sizes: list[dict[int, int]] = []
        self._open = True

    @property
    def kept_bytes(self) -> int:
        """Bytes that are kept."""
        return sum(sum(sizes.values()) for sizes in self._sizes)

    def clear(self) -> None:
        """Forget everything and start anew."""
        self._kept, self._sizes, self._open = [], [], True

    def add(self, place: int, captured: Captured) -> None:
        """Keep a backward pass of the batch at ``place``, if there is room for all of the batch."""
        self._open = self._open and self._budget > 0
        if not self._open:
            return
        if place == len(self._kept):
            self._kept.append([])
            self._sizes.append({})
        rows = rows_of(self._sweep, captured)
        self._kept[place].append(rows)
        self._sizes[place].update(_sizes(rows))
        if self.kept_bytes > self._budget:
            # a batch is kept whole or not at all
            self._kept.pop()
            self._sizes.pop()
            self._open = False

    def rows(self, title: str) -> Iterator[Rows]:
        """The rows of each backward pass, in the order of the first sweep."""
        for batch in self._kept:
            yield from batch
        if not self._open:
            for _, captured in self._sweep.captures(title, skip=len(self._kept)):
                yield rows_of(self._sweep, captured)
                del captured

    def together(self, title: str) -> Iterator[list[Rows]]:
        """The same, those of one forward pass together, as far as they fit."""
        yield from self._kept
        if self._open:
            return
        if self._budget <= 0:
            yield from self._one_by_one(title)
            return
        passes: list[Rows] = []
        held: dict[int, int] = {}
        seen = 0
        for _, captured in self._sweep.captures(title, skip=len(self._kept)):
            seen = 1 if captured.first else seen + 1
            last = seen >= captured.columns
            passes.append(rows_of(self._sweep, captured))
            held.update(_sizes(passes[-1]))
            del captured
            if last or sum(held.values()) > self._budget // TOGETHER:
                yield passes
                passes, held = [], {}

    def _one_by_one(self, title: str) -> Iterator[list[Rows]]:
        """The same, group by group: the rows of one at a time are there."""
        for _, captured in self._sweep.captures(title, skip=len(self._kept)):
            for key, uses in captured.uses.items():
                if self._sweep.groups[key].kind == "linear":
                    yield [{key: pieces(uses, captured.tape, captured.slopes)}]
                for use in uses:
                    captured.tape.inputs.pop(use, None)
            del captured


def _sizes(rows: Rows) -> dict[int, int]:
    """Bytes of the tensors, by their place in memory: uses and passes share some."""
    sides = [side for several in rows.values() for piece in several for side in piece.sides]
    tensors = [side.ids if isinstance(side, OneHot) else side for side in sides]
    return {tensor.data_ptr(): tensor.numel() * tensor.itemsize for tensor in tensors}


def rows_of(sweep: Sweep, captured: Captured) -> Rows:
    """The rows of each linear group in one backward pass."""
    return {
        key: pieces(uses, captured.tape, captured.slopes)
        for key, uses in captured.uses.items()
        if sweep.groups[key].kind == "linear"
    }
