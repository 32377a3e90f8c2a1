"""What was certified of a pass, and whether it holds for other values of the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from curvops.kronecker.alone import cut, ends
from curvops.kronecker.certify import rows_of
from curvops.kronecker.signature import Signature
from curvops.kronecker.tape import Layout, Tape, record
from curvops.products.account import attempted
from curvops.risk.data import Batch
from curvops.risk.empirical_risk import EmpiricalRisk


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


def keeps_apart(risk: EmpiricalRisk, batch: Batch, layouts: Sequence[Layout | None]) -> bool:
    """Whether no gradient flows between data, even by what is multiplied by zero or not selected for now.

    It is seen on a few of a batch, of whose rows the layouts are known.
    """

    def verdict() -> bool:
        places = ends(batch.size)
        tape = record(risk, cut(batch.X, batch.size, places), len(places), conducting=True)
        return tape.fits(layouts) and all(_contained(tape, layouts, n) for n in range(tape.size))

    return attempted(verdict)[0] or False


def _contained(tape: Tape, layouts: Sequence[Layout | None], n: int) -> bool:
    """Whether a cotangent that is no number for one datum leaves the rows of all others numbers; zero times it is none either."""
    cotangent, every = tape.random_cotangent(), range(len(tape.uses))
    cotangent.unflatten(0, (tape.size, -1))[n] = torch.nan
    others = torch.arange(tape.size, device=cotangent.device) != n
    for use, layout, g in zip(tape.uses, layouts, tape.gradients(cotangent, every)[0], strict=True):
        if layout is not None and g is not None:
            rows = layout.arrange(rows_of(use, g), 2, tape.size)
            if not torch.isfinite(rows[others]).all():
                return False
    return True
