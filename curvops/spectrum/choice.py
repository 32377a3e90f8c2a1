"""Which eigenvalues are wanted."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Which = Literal["largest", "smallest", "both", "magnitude"]


class Choice:
    """Eigenvalues at the ends of a spectrum.

    Args:
        which: The largest, the smallest, as many of both, or the largest in magnitude.
        k: How many, from each end if both.
        size: Of the matrix.

    Attributes:
        count: How many in all.

    Raises:
        ValueError: If there is no such choice.
    """

    def __init__(self, which: Which, k: int, size: int) -> None:
        if which not in get_args(Which):
            raise ValueError(f"which: expected one of {', '.join(map(repr, get_args(Which)))}, got {which!r}.")
        if not isinstance(k, int) or not 1 <= k <= size:
            raise ValueError(f"k: expected an integer from 1 to {size}, the size of the matrix, got {k!r}.")
        self.which, self.count = which, min(size, 2 * k if which == "both" else k)

    def ranked(self, values: Tensor) -> Tensor:
        """Indices of ascending values, the most wanted first."""
        places = torch.arange(len(values), device=values.device)
        if self.which == "smallest":
            return places
        if self.which == "magnitude":
            return values.abs().argsort(descending=True)
        back = places.flip(0)
        return back if self.which == "largest" else torch.minimum(places, back).argsort(stable=True)

    def of(self, values: Tensor) -> Tensor:
        """Indices of the wanted ones among ascending values, ascending."""
        return self.ranked(values)[: self.count].sort().values
