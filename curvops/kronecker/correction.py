"""Whole per-datum gradients of a layer from its rows, and their squares in an eigenbasis."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from curvops.kronecker.rows import Rows
from curvops.kronecker.state import Entry
from curvops.kronecker.uses import OneHot

CHUNK = 32 * 2**20  # bytes of gradients that are squared together; measured on a CPU: more does not fit its caches

Pair = tuple[Tensor | OneHot, list[Tensor], str]  # inputs, output gradients of each backward pass, side of the inputs


class BasisDiagonal:
    """Adds Σ (U_Lᵀ G U_R)² over whole per-datum gradients G: George et al. 2018 (1806.03884), eq. 12.

    An entry's bases ``left`` and ``right`` are orthonormal columns ``[groups, n, n]``, absent for the identity; squares
    are added to its ``total``. The gradients of some data may take a part of the bytes ``budget`` together.
    """

    def __init__(self, entry: Entry, budget: int) -> None:
        t = entry.tensors
        self.left, self.right, self.total = t.get("left"), t.get("right"), t["total"]
        self._bytes = max(1, min(budget // 4, CHUNK))

    def add(self, uses: Sequence[Rows]) -> None:
        """Add the rows of all uses in some backward passes of one forward pass."""
        if not (uses := [rows for rows in uses if rows.outputs]):
            return
        if all(isinstance(rows.inputs, OneHot) for rows in uses) and self.left is None:
            self._add_looked_up(uses)
            return
        pairs, left, right = self._turned(merged(uses, self.total.dtype))
        ((a, columns, side), *others) = pairs
        if not others and isinstance(a, Tensor) and a.shape[1] == 1 and left is right is None:
            # one row a datum: the square of an outer product is the outer product of the squares
            squares = sum((g.square() for g in columns[1:]), columns[0].square()), a.square()
            one, other = (rows.squeeze(1).transpose(0, 1) for rows in (squares if side == "right" else squares[::-1]))
            self.total += torch.bmm(one.mT, other)
            return
        for gradients in whole_gradients(pairs, self.total.shape, self._bytes):
            if left is not None:
                gradients = left.mT @ gradients
            if right is not None:
                gradients = gradients @ (right[0] if len(right) == 1 else right)
            self.total += gradients.square_().sum((0, 1))

    def _turned(self, pairs: list[Pair]) -> tuple[list[Pair], Tensor | None, Tensor | None]:
        """The rows in a basis where that takes fewer operations than to turn the gradients, and the bases that are left."""
        ((a, gs, side), *others) = pairs
        if others or isinstance(a, OneHot):
            return pairs, self.left, self.right
        inner, outer = (self.right, self.left) if side == "right" else (self.left, self.right)
        positions, size, width = a.shape[1], gs[0].shape[3], a.shape[3]
        if inner is not None and positions <= len(gs) * size:
            a, inner = _turn(a, inner), None
        if outer is not None and positions <= width:
            gs, outer = [_turn(g, outer) for g in gs], None
        return [(a, gs, side)], *((outer, inner) if side == "right" else (inner, outer))

    def _add_looked_up(self, uses: Sequence[Rows]) -> None:
        """Rows of a table: a datum's gradient is zero but for the rows that it looks up."""
        ids = torch.cat([rows.inputs.ids.squeeze(2) for rows in uses if isinstance(rows.inputs, OneHot)], 1)
        size, width = len(ids), self.total.shape[1]
        seen = ids.flatten() >= 0
        keys = (ids + width * torch.arange(size, device=ids.device).unsqueeze(1)).flatten()[seen]
        keys, places = keys.unique(return_inverse=True)
        for column in zip(*(rows.outputs for rows in uses), strict=True):
            rows = torch.cat([g.to(self.total.dtype) for g in column], 1).flatten(0, 2)[seen]
            sums = rows.new_zeros(len(keys), rows.shape[1]).index_add_(0, places, rows)
            sums = sums if self.right is None else sums @ self.right[0]
            self.total[0].index_add_(0, keys % width, sums.square_())


def merged(uses: Sequence[Rows], dtype: torch.dtype) -> list[Pair]:
    """The rows of all uses in a precision, those of each side one after another; unit vectors for themselves."""
    hot = [rows for rows in uses if isinstance(rows.inputs, OneHot)]
    found: list[Pair] = [(rows.inputs, [g.to(dtype) for g in rows.outputs], rows.input_side) for rows in hot]
    for side in ("right", "left"):
        plain = [rows for rows in uses if rows.input_side == side and isinstance(rows.inputs, Tensor)]
        columns = [_cat(column, dtype) for column in zip(*(rows.outputs for rows in plain), strict=True)]
        if plain:
            found.append((_cat([rows.inputs for rows in plain], dtype), columns, side))
    return found


def whole_gradients(pairs: Sequence[Pair], shape: Sequence[int], most: int) -> Iterator[Tensor]:
    """Whole gradients ``[columns, data, groups, left, right]``, as many at a time as take ``most`` bytes."""
    size, columns, like = pairs[0][1][0].shape[0], len(pairs[0][1]), pairs[0][1][0]
    count = max(1, most // max(torch.Size(shape).numel() * like.itemsize, 1))
    some, data = max(1, min(columns, count // size)), max(1, min(size, count))
    for first in range(0, columns, some):
        stacks = [_stack(gs[first : first + some]) for _, gs, _ in pairs]
        for start in range(0, size, data):
            stop = start + data
            total: Tensor | None = None
            for (a, _, side), stack in zip(pairs, stacks, strict=True):
                rows = OneHot(a.ids[start:stop], a.width).dense(like.dtype) if isinstance(a, OneHot) else a[start:stop]
                order = "goi" if side == "right" else "gio"
                part = torch.einsum(f"knpgo,npgi->kn{order}", stack[:, start:stop], rows)
                total = part if total is None else total + part
            assert total is not None
            yield total


def _turn(rows: Tensor, basis: Tensor) -> Tensor:
    """Rows ``[data, positions, groups, c]`` in a basis ``[groups, c, c]``."""
    if len(basis) > 1 or _channels_first(rows):
        return (basis.mT @ rows.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return rows @ basis[0]


def _stack(several: Sequence[Tensor]) -> Tensor:
    """Rows of some backward passes along a new first axis, in the order of memory; one alone is not copied."""
    if len(several) == 1:
        return several[0].unsqueeze(0)
    if _channels_first(several[0]):
        return torch.stack([rows.permute(0, 2, 3, 1) for rows in several]).permute(0, 1, 4, 2, 3)
    return torch.stack(list(several))


def _channels_first(rows: Tensor) -> bool:
    """Whether a map's channels come before its positions."""
    return rows.stride(1) == 1 < rows.shape[1]


def _cat(rows: Sequence[Tensor | OneHot], dtype: torch.dtype) -> Tensor:
    parts = [part.to(dtype) for part in rows if isinstance(part, Tensor)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
