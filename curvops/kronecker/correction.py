"""Diagonals in an eigenbasis, from whole per-datum gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from curvops.kronecker.groups import Group, Piece
from curvops.kronecker.uses import OneHot

CHUNK = 32 * 2**20  # bytes of gradients that are squared together; measured on a CPU: more does not fit its caches

Pass = Sequence[Piece]


class BasisDiagonal:
    """Adds Σ (U_Lᵀ G U_R)² over whole per-unit gradients G: George et al. 2018 (1806.03884), eq. 12.

    The backward passes of one forward pass have their inputs in common, so they are taken together: inputs are
    turned into the basis once, and all gradients of a unit are one matrix product.

    Args:
        group: The group.
        left: Orthonormal columns ``[groups, left, left]``; ``None`` for the identity.
        right: Likewise.
        dtype: Precision.
        budget: Bytes that the gradients of some units may take together.
    """

    def __init__(
        self, group: Group, left: Tensor | None, right: Tensor | None, dtype: torch.dtype, budget: int
    ) -> None:
        self.group, self.left, self.right, self.dtype = group, left, right, dtype
        self._budget = budget
        self.total = torch.zeros(group.shape, dtype=dtype, device=group.places.device)
        # gradients that are formed together: of so many units, times backward passes
        self._chunk = max(1, min(budget // 4, CHUNK) // max(self.total.numel() * dtype.itemsize, 1))

    def add(self, passes: Sequence[Pass]) -> None:
        """Add the rows of some backward passes, those of one forward pass in a row."""
        for _, several in groupby(passes, lambda found: [(id(piece.inputs), piece.input_side) for piece in found]):
            together = list(several)
            if not together[0]:
                continue
            sides = {piece.input_side for piece in together[0]}
            hot = [isinstance(piece.inputs, OneHot) for piece in together[0]]
            if len(sides) == 1 and not any(hot):
                self._add_rows(together, sides.pop())
            elif sides == {"left"} and all(hot) and self.left is None:
                self._add_looked_up(together)
            else:
                self._add_mixed(together)

    def _add_rows(self, passes: list[Pass], input_side: str) -> None:
        """Inputs on one side: the gradients of a unit are products [passes · out, positions] × [positions, in]."""
        right_side = input_side == "right"
        basis, out_basis = (self.right, self.left) if right_side else (self.left, self.right)
        total = self.total if right_side else self.total.mT
        _, size, width = total.shape
        inputs = _joined([piece.inputs for piece in passes[0]], self.dtype)
        units, positions = inputs.shape[:2]
        # rows are turned into a basis where that takes fewer operations than to turn the gradients
        early, out_early = positions <= len(passes) * size, positions <= width
        if early and basis is not None:
            inputs, basis = _turned(inputs, basis), None
        if positions == 1 and basis is None and (out_early or out_basis is None):
            total += _squares_of_one(inputs, self._stacks(passes, out_basis))
            return
        inputs = inputs.transpose(1, 2)
        for rows in self._stacks(passes, out_basis if out_early else None):
            some = max(1, self._chunk // rows.shape[2])
            for start in range(0, units, some):
                # [units, groups, passes, out, in]
                gradients = rows[start : start + some].flatten(2, 3) @ inputs[start : start + some]
                gradients = gradients.unflatten(2, rows.shape[2:4])
                if not out_early and out_basis is not None:
                    gradients = out_basis.mT.unsqueeze(1) @ gradients
                if basis is not None:
                    gradients = gradients @ (basis[0] if len(basis) == 1 else basis.unsqueeze(1))
                total += gradients.square_().sum((0, 2))

    def _stacks(self, passes: list[Pass], basis: Tensor | None) -> Iterator[Tensor]:
        """Output gradients ``[units, groups, passes, out, positions]`` in a basis, some passes at a time."""
        size = sum(piece.outputs.numel() for piece in passes[0]) * self.dtype.itemsize
        most = max(1, min(CHUNK, self._budget // 4) // max(size, 1))
        for start in range(0, len(passes), most):
            rows = [_joined([piece.outputs for piece in found], self.dtype) for found in passes[start : start + most]]
            if rows[0].stride(1) == 1 < rows[0].shape[1]:  # a map's channels come before its positions
                stack = _stacked([part.permute(0, 2, 3, 1) for part in rows], 2)
                yield stack if basis is None else basis.mT.unsqueeze(1) @ stack
            else:
                stack = _stacked(rows, 3)
                yield _turned(stack, basis).permute(0, 2, 3, 4, 1)

    def _add_looked_up(self, passes: list[Pass]) -> None:
        """Rows of a table: a unit's gradient is zero but for the rows that it looks up."""
        ids = torch.cat([_ids(piece) for piece in passes[0]], 1)
        units, width = len(ids), self.total.shape[1]
        seen = ids.flatten() >= 0
        keys = (ids + width * torch.arange(units, device=ids.device).unsqueeze(1)).flatten()[seen]
        keys, places = keys.unique(return_inverse=True)
        for found in passes:
            rows = torch.cat([piece.outputs.to(self.dtype) for piece in found], 1).flatten(0, 2)[seen]
            sums = rows.new_zeros(len(keys), rows.shape[1]).index_add_(0, places, rows)
            sums = sums if self.right is None else sums @ self.right[0]
            self.total[0].index_add_(0, keys % width, sums.square_())

    def _add_mixed(self, passes: list[Pass]) -> None:
        """Inputs on both sides, as of a table that is the head as well."""
        for found in passes:
            sides = [(cast(piece.sides[0], self.dtype), cast(piece.sides[1], self.dtype)) for piece in found]
            for gradient in gradients(sides, self.total, self._chunk):
                turned = gradient if self.left is None else self.left.mT @ gradient
                turned = turned if self.right is None else turned @ self.right
                self.total += turned.square_().sum(0)


def _squares_of_one(inputs: Tensor, stacks: Iterator[Tensor]) -> Tensor:
    """One row a unit: the square of an outer product is the outer product of the squares."""
    squares = sum(rows.square().sum((2, 4)) for rows in stacks)
    assert isinstance(squares, Tensor)
    return torch.einsum("ngl,ngr->glr", squares, inputs.squeeze(1).square())


def _joined(rows: Sequence[Tensor | OneHot], dtype: torch.dtype) -> Tensor:
    """Rows of all uses ``[units, positions, groups, c]``."""
    parts = [part.to(dtype) for part in rows if isinstance(part, Tensor)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _stacked(rows: list[Tensor], axis: int) -> Tensor:
    """Stacked along a new axis; one alone is not copied."""
    return torch.stack(rows, axis) if len(rows) > 1 else rows[0].unsqueeze(axis)


def _turned(rows: Tensor, basis: Tensor | None) -> Tensor:
    """Rows ``[units, positions, groups, …, c]`` in a basis ``[groups, c, c]``."""
    if basis is None:
        return rows
    if len(basis) == 1:
        return rows @ basis[0]
    return torch.einsum("nog...c,gck->nog...k", rows, basis)


def _ids(piece: Piece) -> Tensor:
    assert isinstance(piece.inputs, OneHot)
    return piece.inputs.ids.squeeze(2)


def gradients(sides: Sequence[tuple[Tensor | OneHot, Tensor | OneHot]], like: Tensor, chunk: int) -> Iterator[Tensor]:
    """Whole gradients ``[units, groups, left, right]``, some units at a time, from left and right rows."""
    units = sides[0][1].shape[0] if isinstance(sides[0][1], Tensor) else sides[0][1].ids.shape[0]
    for start in range(0, units, chunk):
        stop = min(start + chunk, units)
        total = torch.zeros(stop - start, *like.shape, dtype=like.dtype, device=like.device)
        for left, right in sides:
            assert isinstance(right, Tensor)
            if isinstance(left, OneHot):
                _scatter_rows(total, left.ids[start:stop], right[start:stop])
            else:
                total += torch.einsum("nogl,nogr->nglr", left[start:stop], right[start:stop])
        yield total


def _scatter_rows(total: Tensor, ids: Tensor, rows: Tensor) -> None:
    """Add rows ``[n, o, 1, r]`` to ``total`` ``[n, 1, width, r]`` at ``ids`` ``[n, o, 1]``; −1 is dropped."""
    n, _, width, right = total.shape
    offsets = torch.arange(n, device=ids.device).view(-1, 1, 1) * width
    seen = ids >= 0
    flat = total.view(n * width, right)
    flat.index_add_(0, (ids.clamp(min=0) + offsets).flatten(), (rows * seen.unsqueeze(-1)).reshape(-1, right))


def cast(rows: Tensor | OneHot, dtype: torch.dtype) -> Tensor | OneHot:
    return rows if isinstance(rows, OneHot) else rows.to(dtype)
