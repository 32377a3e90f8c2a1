"""The rows of a page's matrices, which are their columns too: what each stands for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from curvops.tour.page.blobs import Array


@dataclass(frozen=True)
class Piece:
    """Consecutive entries of one parameter that lie in one group, `step` of them to a row of the page's matrices.

    They begin at the entry `first` of the parameter. A piece without a shape is a group of parameters.
    """

    name: str
    shape: tuple[int, ...] | None
    first: int
    size: int
    step: int

    @property
    def rows(self) -> int:
        """Rows that it takes."""
        return math.ceil(self.size / self.step)


@dataclass(frozen=True)
class Axis:
    """Rows of the page's matrices in order, piece by piece, and from group to number of parameters."""

    pieces: tuple[Piece, ...]
    groups: dict[str, int]

    @property
    def rows(self) -> int:
        """Number of rows."""
        return sum(piece.rows for piece in self.pieces)

    @property
    def side(self) -> int:
        """Number of parameters `D`."""
        return sum(piece.size for piece in self.pieces)

    @property
    def exact(self) -> bool:
        """Whether each row is one parameter."""
        return all(piece.step == 1 for piece in self.pieces)

    @property
    def starts(self) -> Array:
        """The first parameter of each row, `[rows]`."""
        edges = accumulate((piece.size for piece in self.pieces), initial=0)
        return np.concatenate([e + np.arange(0, p.size, p.step) for e, p in zip(edges, self.pieces, strict=False)])

    @property
    def group_starts(self) -> Array:
        """The first parameter of each group, `[G]`."""
        return np.array(list(accumulate(self.groups.values(), initial=0))[:-1])

    def described(self) -> dict[str, Any]:
        """What the page needs to name rows and groups, for JSON."""
        edges = accumulate(self.groups.values(), initial=0)
        rows = np.searchsorted(self.starts, list(edges)).tolist()
        groups = [
            {"label": label, "size": size, "rows": b - a}
            for (label, size), (a, b) in zip(self.groups.items(), pairwise(rows), strict=True)
        ]
        pieces = [{**vars(piece), "rows": piece.rows} for piece in self.pieces]
        return {"rows": self.rows, "side": self.side, "pieces": pieces, "groups": groups}


def entries_axis(parameters: Mapping[str, tuple[int, ...]], groups: Mapping[str, int], side: int, step: int) -> Axis:
    """Return the axis of matrices `[side, side]` of which `step` consecutive entries of a parameter make a row.

    Raises:
        ValueError: If the parameters or the groups do not have `side` entries together.
    """
    sizes = {name: math.prod(shape) for name, shape in parameters.items()}
    for what, given in (("parameters", sizes), ("groups", dict(groups))):
        if given and (sum(given.values()) != side or min(given.values()) < 0):
            raise ValueError(
                f"write_page: expected matrices with {sum(given.values())} rows, as many as their {what} have entries,"
                f" got {side}."
            )
    groups = {label: size for label, size in groups.items() if size} or {"all": side}
    cuts = set(accumulate(groups.values()))
    pieces, start = [], 0
    for name, size in (sizes or {"entry": side}).items():
        shape = parameters.get(name, (side,))
        edges = sorted({start, start + size} | {cut for cut in cuts if start < cut < start + size})
        pieces += [Piece(name, tuple(shape), a - start, b - a, step) for a, b in pairwise(edges)]
        start += size
    return Axis(tuple(pieces), dict(groups))


def groups_axis(groups: Mapping[str, int]) -> Axis:
    """Return the axis of matrices with one row for each group."""
    return Axis(tuple(Piece(label, None, 0, size, max(size, 1)) for label, size in groups.items()), dict(groups))
