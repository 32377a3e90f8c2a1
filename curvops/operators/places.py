"""Where the rows of a block sit in the flat vector of all parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


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
    def index(self) -> slice | Tensor:
        """What to index a vector with; a range gives a view of it."""
        return self._where if isinstance(self._where, (slice, Tensor)) else self._where()

    @property
    def tensor(self) -> Tensor:
        """The places one by one, ``[size]``."""
        where = self.index
        return torch.arange(where.start, where.stop, device=self.device) if isinstance(where, slice) else where
