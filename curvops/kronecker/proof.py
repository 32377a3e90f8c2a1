"""What was certified of a pass, and whether it holds for other values of the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from curvops.kronecker.certify import rows_of
from curvops.kronecker.signature import Signature
from curvops.kronecker.tape import Layout, Tape


@dataclass
class Proof:
    """What was certified of a pass, for passes of the same operations: layouts of the rows, and what failed.

    It holds for other data if these are kept ``apart`` whatever their values; ``None`` if that was not asked yet.
    """

    way: str
    signature: Signature
    layouts: list[Layout | None]
    failed: dict[str, str]
    apart: bool | None = None


def keeps_apart(tape: Tape, layouts: Sequence[Layout | None]) -> bool:
    """Whether no gradient flows between data, even by what is multiplied by zero or not selected for now.

    A cotangent that is no number for one datum must leave the rows of all others numbers; zero times it is none either.
    The tape is of a `conducting` pass.
    """
    cotangent, every = tape.random_cotangent(), range(len(tape.uses))
    for n in range(tape.size):
        poisoned = cotangent.clone()
        poisoned.unflatten(0, (tape.size, -1))[n] = torch.nan
        others = torch.arange(tape.size, device=cotangent.device) != n
        for use, layout, g in zip(tape.uses, layouts, tape.gradients(poisoned, every)[0], strict=True):
            if layout is not None and g is not None:
                rows = layout.arrange(rows_of(use, g), 2, tape.size)
                if not torch.isfinite(rows[others]).all():
                    return False
    return True
