"""Some data alone, and whether they give what they give among others."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor

from curvops.kronecker.certify import rows_of
from curvops.kronecker.rows import Slopes
from curvops.kronecker.tape import Tape
from curvops.kronecker.uses import LinearUse, Use
from curvops.products.account import relative_difference, tolerance
from curvops.tree import map_tensors

SOME = 4  # data that stand for a batch


class Joint(NamedTuple):
    """Several batches in one pass, and some of their data alone, by which it is seen that this changes nothing."""

    tape: Tape
    alone: Tape
    places: list[int]

    def holds(self, cotangent: Tensor, slopes: Slopes) -> bool:
        """Whether the gradients at the uses' outputs, too, are what the data alone give."""
        tape, alone, places = self
        own = alone.gradients(cotangent.unflatten(0, (tape.size, -1))[places].flatten(0, 1), list(slopes))[0]
        for (k, here), there in zip(slopes.items(), own, strict=True):
            layout = tape.layouts[k]
            if here is not None and there is not None and layout is not None:
                few = layout.arrange(rows_of(alone.uses[k], there), 2, alone.size)
                if not same(layout.arrange(rows_of(tape.uses[k], here), 2, tape.size)[places], few, tape):
                    return False
            elif here is not there:
                return False
        return True


def cut(X: Any, size: int, places: Sequence[int], kept: Collection[int] = ()) -> Any:
    """Some data of a batch: each tensor with the data along its first axis is indexed, but those that are ``kept``."""
    number = count()

    def some(t: Tensor) -> Tensor:
        whole = next(number) in kept or t.ndim == 0 or t.shape[0] != size
        return t if whole else t[torch.tensor(places, device=t.device)]

    return map_tensors(some, X)


def ends(size: int) -> list[int]:
    """Places of some data from both ends of a batch: whoever comes first or last may be treated differently."""
    return [*range(SOME // 2), *range(size - SOME // 2, size)]


def agrees(z: Tensor | None, tape: Tape, places: Sequence[int]) -> bool:
    """Whether some data's output is what they have in their batch."""
    if z is None or tape.z.ndim == 0 or tape.z.shape[0] % tape.size:
        return False
    expected = tape.z.detach().unflatten(0, (tape.size, -1))[list(places)]
    return z.numel() == expected.numel() and same(z.detach().view_as(expected), expected, tape)


def same(found: Tensor, expected: Tensor | None, tape: Tape) -> bool:
    """Whether two results are equal but for rounding in the precision of a pass."""
    expected = found * 0 if expected is None else expected
    return relative_difference(found, expected) <= max(tolerance(found.dtype), tolerance(tape.precision))


def scale_of(tape: Tape) -> Tensor:
    """A number for each datum, all different."""
    numbers = torch.rand(tape.size, generator=torch.Generator().manual_seed(1), dtype=torch.float64, device="cpu")
    return (0.5 + numbers).to(tape.z.device)


def work_of(use: Use) -> tuple[int, int]:
    """Entries of a layer's output, and multiplications that it takes."""
    size = use.shape.numel() if isinstance(use, LinearUse) else 0
    return size, size * use.input_shape[1] if isinstance(use, LinearUse) else 0
