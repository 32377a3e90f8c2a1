"""Where the rows of a block sit in the flat vector of all parameters."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor


class Places:
    """Places of a block's rows, in the block's order.

    A range is kept as such, and anything else is written out when it is asked for and not kept: an index takes eight
    bytes a parameter, twice what the parameter takes.

    Args:
        size: Number of rows.
        device: Where an index is made.
        where: A range, or what makes the index.

    Example:
        >>> import torch
        >>> places = Places.range(2, 5, torch.device("cpu"))
        >>> len(places), places.first, places.tensor.tolist()
        (3, 2, [2, 3, 4])
    """

    def __init__(self, size: int, device: torch.device, where: slice | Callable[[], Tensor]) -> None:
        self.size, self.device, self._where = size, device, where

    @classmethod
    def range(cls, start: int, stop: int, device: torch.device) -> Places:
        """Consecutive rows."""
        return cls(stop - start, device, slice(start, stop))

    @classmethod
    def listed(cls, index: Tensor) -> Places:
        """Rows one by one."""
        return cls(len(index), index.device, partial(_same, index))

    def __len__(self) -> int:
        return self.size

    @property
    def index(self) -> slice | Tensor:
        """What to index a vector with; a range gives a view of it."""
        return self._where if isinstance(self._where, slice) else self._where()

    @property
    def tensor(self) -> Tensor:
        """The places one by one, ``[size]``."""
        where = self.index
        return torch.arange(where.start, where.stop, device=self.device) if isinstance(where, slice) else where

    @property
    def first(self) -> int:
        """The first place; −1 if there is none."""
        if not self.size:
            return -1
        where = self.index
        return int(where.start if isinstance(where, slice) else where[0])


def _same(index: Tensor) -> Tensor:
    return index
