"""A look at a few data: what certifies the taps, and whether batches may be joined, for little work."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Any

import torch
from torch import Tensor

from curvops.kronecker.groups import Grouping
from curvops.kronecker.layout import Layout
from curvops.kronecker.tape import Tape, certify, certify_twins, record
from curvops.losses import OutputCurvature
from curvops.losses.autodiff import AutodiffLoss
from curvops.products.account import relative_difference, tolerance
from curvops.risk.data import Batch, joined_batches
from curvops.risk.empirical_risk import EmpiricalRisk
from curvops.tree import select, tensors_of

FEW = 4  # data that certificates look at where a batch can be cut
JOINED = 32 * 2**20  # bytes of joined batches' activations; measured on CPUs: beyond their caches joining costs time


@dataclass(frozen=True)
class Few:
    """What was found on a few data of a batch.

    Attributes:
        start: Place of the batch's first datum in the data set.
        places: Which data of the batch were looked at.
        z: Their output; not kept where it is known to agree.
        signature: How their pass looked.
        layouts: The layouts of its rows.
        precision: The lowest that was computed in.
        failed: The parameters that its uses do not explain, and why.
        shape: The axes of the inputs behind the data, if batches may be joined.
        most: Number of data that may be joined.
    """

    start: int
    places: list[int]
    z: Tensor | None
    signature: tuple[object, ...]
    layouts: list[Layout | None]
    precision: torch.dtype
    failed: dict[str, str]
    shape: torch.Size | None
    most: int

    def speaks_for(self, tape: Tape) -> bool:
        """Whether a larger pass looks the same, and its rows can be arranged in the same way."""
        return self.signature == tape.signature() and fit(self.layouts, tape)

    def agrees(self, tape: Tape) -> bool:
        """Whether the data have the same output in a larger pass, so that it does not depend on the others."""
        if self.z is None:
            return True
        if tape.z.ndim == 0 or tape.z.shape[0] % tape.units:
            return False
        found = tape.z.detach().unflatten(0, (tape.units, -1))[self.places]
        allowed = max(tolerance(found.dtype), tolerance(self.precision))
        return found.numel() == self.z.numel() and relative_difference(found.reshape(self.z.shape), self.z) <= allowed

    def joined(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Consecutive batches joined, those apart whose data are of another shape than the first."""
        for alike, several in groupby(batches, lambda batch: self.shape is not None and _shape(batch.X) == self.shape):
            yield from joined_batches(several, self.most if alike else 0)


def fit(layouts: list[Layout | None], tape: Tape) -> bool:
    """Whether a pass's rows can be arranged in these ways."""
    return all(lay is None or lay.fits(use.lead, tape.units) for lay, use in zip(layouts, tape.uses, strict=True))


def look(risk: EmpiricalRisk, grouping: Grouping, batch: Batch, budget: int) -> Few | None:
    """Certify on the first and the last data of a batch; ``None`` where that says nothing of the batch.

    Args:
        risk: The empirical risk.
        grouping: Assigns uses to groups.
        batch: The batch.
        budget: Bytes that joined batches' activations may take.
    """
    tensors = tensors_of((batch.X, batch.y))
    if batch.size <= FEW or any(t.ndim == 0 or t.shape[0] != batch.size for t in tensors):
        return None
    # from both ends: whoever comes first or last may be treated differently
    for places in ([0, batch.size - 1] * (FEW // 2), [*range(FEW // 2), *range(batch.size - FEW // 2, batch.size)]):
        index = torch.tensor(places, device=risk.space.device)
        X, y = (select(part, batch.size, index) for part in (batch.X, batch.y))
        tape = record(risk, X, FEW)
        if tape.data_dependent:
            return None
        z = tape.z.detach()
        curvature = risk.output_curvature(z, Batch(X, y, FEW, batch.start))
        failed: dict[str, str] = {}
        twins = places[0] == places[FEW // 2]
        if twins and _explained_by_twins(risk, grouping, tape, curvature):
            break
        if not twins:
            failed = failures(risk, grouping, tape, curvature)
    most = budget * FEW // max(tape.activations, 1)
    # a loss without a closed form may depend on its batch in ways that are not known
    joinable = not failed and most >= batch.size and not isinstance(risk.loss, AutodiffLoss)
    shape = _shape(X) if joinable else None
    return Few(batch.start, places, z, tape.signature(), tape.layouts, tape.precision, failed, shape, most)


def _explained_by_twins(risk: EmpiricalRisk, grouping: Grouping, tape: Tape, curvature: OutputCurvature) -> bool:
    """Whether one backward pass explains all parameters, for data of which the second half equals the first."""
    if curvature.terms_per_datum is None or grouping.overlapping(tape):
        return False
    generator = torch.Generator().manual_seed(1)
    unit_weights = (0.5 + torch.rand(tape.units, generator=generator, dtype=torch.float64)).to(tape.z.device)
    rows = torch.randn(curvature.num_terms // 2, curvature.width, generator=generator)
    weights = unit_weights.repeat_interleave(curvature.terms_per_datum).unsqueeze(1).to(curvature.dtype)
    cotangent = rows.to(weights).repeat(2, 1).mul_(weights)
    return certify_twins(tape, unit_weights, curvature.outputs(cotangent), list(risk.space.names))


def failures(risk: EmpiricalRisk, grouping: Grouping, tape: Tape, curvature: OutputCurvature) -> dict[str, str]:
    """Certify a pass; the parameters that its uses do not explain, and why."""
    names = list(risk.space.names)
    if tape.units > 1 and curvature.terms_per_datum is None:
        return dict.fromkeys(names, "the number of loss terms is not a multiple of the number of data")
    generator = torch.Generator().manual_seed(1)
    unit_weights = (0.5 + torch.rand(tape.units, generator=generator, dtype=torch.float64)).to(tape.z.device)
    rows = unit_weights.repeat_interleave(curvature.num_terms // tape.units)
    spread = rows[:, None].expand(-1, curvature.width).to(curvature.dtype)
    failed = certify(tape, unit_weights, curvature.outputs(spread.contiguous()), names)
    return {**grouping.overlapping(tape), **failed}


def peeked(batches: Iterator[Batch]) -> tuple[Batch | None, Iterator[Batch]]:
    """As many batches as it takes to look at a few data, joined; and all of them from the first."""
    seen: list[Batch] = []
    for batch in batches:
        seen.append(batch)
        if sum(b.size for b in seen) > FEW:
            break
    together = next(joined_batches(seen, sum(b.size for b in seen)), None)
    return together, chain(seen, batches)


def _shape(X: Any) -> torch.Size | None:
    return X.shape[1:] if isinstance(X, Tensor) and X.ndim else None
