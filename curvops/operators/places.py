"""Where the rows of a block sit in the flat vector of all parameters."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from curvops.space import TensorSpace


class Places:
    """Places of a block's rows, in the block's order: a range, an index, or what makes an index of some size.

    An index takes eight bytes an entry, twice what the parameter takes, so that it is not kept where it can be made.

    Example:
        >>> import torch
        >>> places = Places(slice(2, 5), torch.device("cpu"))
        >>> len(places), places.index, places.tensor.tolist()
        (3, slice(2, 5, None), [2, 3, 4])
    """

    def __init__(self, where: slice | Tensor | Callable[[], Tensor], device: torch.device, size: int = 0) -> None:
        self._where, self.device = where, device
        self._size = where.stop - where.start if isinstance(where, slice) else size
        self._size = len(where) if isinstance(where, Tensor) else self._size

    def __len__(self) -> int:
        return self._size

    @property
    def range(self) -> slice | None:
        """The range, where they are one."""
        return self._where if isinstance(self._where, slice) else None

    @property
    def index(self) -> slice | Tensor:
        """What to index a vector with; a range gives a view of it."""
        return self._where if isinstance(self._where, (slice, Tensor)) else self._where()

    @property
    def tensor(self) -> Tensor:
        """The places one by one, ``[size]``."""
        where = self.index
        return torch.arange(where.start, where.stop, device=self.device) if isinstance(where, slice) else where


def moved(places: Places, space: TensorSpace, subspace: TensorSpace) -> Places:
    """The same places in a subspace, which has all tensors that they are in."""
    names = subspace.names
    ends = torch.tensor([space.slice(name).stop for name in names], device=places.device)
    steps = torch.tensor([subspace.slice(n).start - space.slice(n).start for n in names], device=places.device)

    where = places.range
    if where is not None:
        # the tensors between its ends are in the subspace, so that they keep their distance
        first = torch.tensor([where.start], device=places.device)
        step = int(_moved(first, ends, steps)) - where.start if len(places) else 0
        return Places(slice(where.start + step, where.stop + step), places.device)
    return Places(partial(_moved_index, places, ends, steps), places.device, len(places))


def _moved_index(places: Places, ends: Tensor, steps: Tensor) -> Tensor:
    return _moved(places.tensor, ends, steps)


def _moved(index: Tensor, ends: Tensor, steps: Tensor) -> Tensor:
    return index + steps[torch.searchsorted(ends, index, right=True)]
