"""Second moments Σ r rᵀ of rows: on a CPU only the upper half of a matrix is accumulated, and mirrored in the end."""

from __future__ import annotations

import torch
from torch import Tensor

STRIPE = 64  # rows of a matrix that are accumulated together; measured: smaller ones are not faster
STRIPES = 12  # stripes at most: twelve save 46 % of the work, all of them would save 50 %


def add_moment(moment: Tensor, rows: Tensor) -> None:
    """Add Σ r rᵀ over rows ``[units, positions, groups, c]`` to ``[groups, c, c]``, or its diagonal to ``[groups, c]``.

    Of the matrices only the upper half is right until they are `mirrored`.
    """
    if moment.ndim == 2:
        moment += rows.square().sum((0, 1))
    elif moment.shape[0] > 1:
        by_group = rows.flatten(0, 1).movedim(1, 0)
        moment.baddbmm_(by_group.mT, by_group)
    elif _channels_first(rows):
        # as they lie in memory: a copy with the channels last would take longer than the product
        maps = rows.squeeze(2).mT
        units, size, positions = maps.shape
        if positions >= size:
            moment += torch.bmm(maps, maps.mT).sum(0)
        else:
            add_gram(moment[0], maps.transpose(0, 1).reshape(size, units * positions).T)
    else:
        add_gram(moment[0], rows.flatten(0, 2))


def add_gram(moment: Tensor, rows: Tensor) -> None:
    """Add rowsᵀ rows to the upper half of ``[c, c]`` for rows ``[n, c]``."""
    width = _width(moment)
    if width == len(moment):
        moment.addmm_(rows.T, rows)
        return
    for start in range(0, len(moment), width):
        stop = start + width
        moment[start:stop, start:].addmm_(rows[:, start:stop].T, rows[:, start:])


def mirrored(moment: Tensor) -> Tensor:
    """The moment with its upper half copied to the lower one, in place; a diagonal as it is."""
    size, width = moment.shape[-1], _width(moment)
    for stop in range(width, size, width) if moment.ndim == 3 else ():
        moment[:, stop:, stop - width : stop] = moment[:, stop - width : stop, stop:].mT
    return moment


def _width(moment: Tensor) -> int:
    """Rows of a matrix that are accumulated together."""
    size = moment.shape[-1]
    if size < 2 * STRIPE or moment.device.type != "cpu":
        return max(size, 1)
    return STRIPE * -(-size // (STRIPE * STRIPES))


def _channels_first(rows: Tensor) -> bool:
    positions, groups, size = rows.shape[1:]
    return groups == 1 and size > 1 and positions > 1 and rows.stride(1) == 1 and rows.stride(3) == positions
