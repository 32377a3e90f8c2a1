"""Where the rows of a block sit in the flat vector of all parameters."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor


class Places:
    """Places of a block's rows, in the block's order.

    A range is kept as such, and anything else may be written out when it is asked for: an index takes eight bytes an
    entry, twice what the parameter takes.

    Args:
        size: Number of rows.
        device: Where an index is made.
        where: A range, or what makes the index.

    Example:
        >>> import torch
        >>> places = Places.range(2, 5, torch.device("cpu"))
        >>> len(places), places.index, places.tensor.tolist()
        (3, slice(2, 5, None), [2, 3, 4])
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
        return cls(len(index), index.device, partial(torch.Tensor.detach, index))

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
