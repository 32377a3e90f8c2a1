"""Where the rows of a block sit in the flat vector of all parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Places:
    """Places of a block's rows, in the block's order: a range, or what makes an index on a device.

    An index is written out when it is asked for, as it takes eight bytes an entry, twice what the parameter takes.
    """

    size: int
    device: torch.device
    where: slice | Callable[[], Tensor]

    @classmethod
    def range(cls, start: int, stop: int, device: torch.device) -> Places:
        return cls(stop - start, device, slice(start, stop))

    @classmethod
    def listed(cls, index: Tensor) -> Places:
        return cls(len(index), index.device, partial(torch.Tensor.detach, index))

    def __len__(self) -> int:
        return self.size

    @property
    def index(self) -> slice | Tensor:
        """What to index a vector with; a range gives a view of it."""
        return self.where if isinstance(self.where, slice) else self.where()

    @property
    def tensor(self) -> Tensor:
        """The places one by one, ``[size]``."""
        index = self.index
        return torch.arange(index.start, index.stop, device=self.device) if isinstance(index, slice) else index
