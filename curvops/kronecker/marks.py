"""What tells batches and outputs from others: further walks, and runs that go on, must meet the same."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from curvops.checkpoint import REMOVE
from curvops.digest import probe
from curvops.kronecker.tape import Tape
from curvops.risk.data import Batch
from curvops.risk.determinism import fingerprint

SEEN = 2**16  # entries of an output, or of its derivative, at most, that tell it from another


class Marks:
    """Fingerprints of the batches of a first walk, of this run or, if they are ``known``, of one that was killed."""

    def __init__(self, known: list[tuple[float, ...]] | None = None) -> None:
        self.known = known or []
        self._resumed = known is not None

    def through(self, batches: Iterable[Batch], first: bool, title: str) -> Iterator[Batch]:
        """The batches, noted on a ``first`` walk; an error where one was noted before and is another, or is missing."""
        place = 0
        for batch in batches:
            mark = fingerprint(batch)
            if first and place == len(self.known):
                self.known.append(mark)
            elif self.known[place : place + 1] != [mark]:
                raise self._differ(place, title)
            place += 1
            yield batch
        if place < len(self.known):
            raise self._differ(place, title)

    def _differ(self, place: int, title: str) -> Exception:
        if self._resumed:
            return ValueError(
                f"data: the checkpoint is of other data: batch {place} (counted from 0) differs. {REMOVE}"
            )
        return RuntimeError(
            f"{title}: a further walk over the data yields other batches than the first. Pass a DataLoader with "
            "shuffle=False and fixed transforms, or give the rows of the first walk more room by memory_budget=."
        )


def outline(tape: Tape) -> tuple[float, float]:
    """Two numbers that tell a pass from another: by its output, and by the gradient of a random combination of it."""
    slopes = tape.gradients(tape.random_cotangent(), (), list(tape.params))[1]
    tensors = [tape.z.detach(), *(slope for slope in slopes if slope is not None)]
    step = sum(t.numel() for t in tensors) // SEEN + 1
    return probe(torch.cat([t.flatten()[::step].to(torch.float64) for t in tensors]))
