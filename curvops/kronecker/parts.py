"""Some data of a batch, and what tells whether a pass gives the same again."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor

from curvops.digest import probe
from curvops.kronecker.tape import Tape
from curvops.products.account import relative_difference, tolerance
from curvops.tree import map_tensors

SEEN = 2**16  # entries of an output, at most, that tell it from another


def cut(X: Any, size: int, places: Sequence[int], kept: Collection[int] = ()) -> Any:
    """Some data of a batch: each tensor with the data along its first axis is indexed, but those that are ``kept``."""
    number = count()

    def some(t: Tensor) -> Tensor:
        whole = next(number) in kept or t.ndim == 0 or t.shape[0] != size
        return t if whole else t[torch.tensor(places, device=t.device)]

    return map_tensors(some, X)


def output(tape: Tape) -> tuple[float, float]:
    """Two numbers that tell a pass's output from another's."""
    flat = tape.z.detach().flatten()
    return probe(flat[:: len(flat) // SEEN + 1])


def same_output(z: Tensor | None, tape: Tape, places: Sequence[int]) -> bool:
    """Whether some data's output is what they have in their batch."""
    if z is None or tape.z.ndim == 0 or tape.z.shape[0] % tape.size:
        return False
    expected = tape.z.detach().unflatten(0, (tape.size, -1))[list(places)]
    return z.numel() == expected.numel() and same(z.detach().view_as(expected), expected, tape)


def same(found: Tensor, expected: Tensor | None, tape: Tape) -> bool:
    expected = found * 0 if expected is None else expected
    return relative_difference(found, expected) <= max(tolerance(found.dtype), tolerance(tape.precision))
