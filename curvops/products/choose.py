"""Several ways to do one piece of work: the fastest by one measurement among those that equal the reference."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from curvops.products.certify import Account, reason, relative_difference, tolerance

CLEARLY = 0.85  # part of the best time below which another way is taken: measurements are noisy
ENOUGH = 0.2  # seconds after which a measurement is not repeated: first runs also pay for memory
Way = Callable[[Tensor], Tensor]
Known = Callable[[], dict[object, Any]]


class Choice:
    """One of several ways to do a piece of work, found at its first use.

    Args:
        work: What is done, for the account.
        account: Where the choice is recorded.
        known: Gives what was found before, by other operators that do the same work.
    """

    def __init__(self, work: str, account: Account, known: Known = dict) -> None:
        self._work, self._account, self._known = work, account, known
        self._key: object = None
        self.chosen: str | None = None

    def settled(self, x: Tensor, at: object = None) -> bool:
        """Whether the choice is known, for this piece of work at a place that looks like this."""
        if self.chosen is None:
            self._key = self._work, x.shape, at
            self.chosen = self._known().get(self._key)
            if self.chosen is not None:
                self._account.note(self._work, self.chosen, "as found by an earlier operator of this model")
        return self.chosen is not None

    def __call__(self, x: Tensor, ways: Mapping[str, Way], few: int | None = None, at: object = None) -> Tensor:
        """What the chosen way gives.

        Args:
            x: What is worked on.
            ways: The ways by name, the reference first.
            few: Entries of the first axis, each worked on alone, with which the reference is measured.
            at: What else tells this work from others of the same name.
        """
        if not self.settled(x, at):
            self._measure(x, ways, few)
            self._known()[self._key] = self.chosen
        reference, chosen = next(iter(ways)), str(self.chosen)
        if chosen == reference:
            return ways[reference](x)
        try:
            return ways[chosen](x)
        except Exception as error:  # it worked on the batch that it was measured on
            self._account.note(self._work, reference, f"{chosen} failed on a later batch: {reason(error)}")
            self.chosen = reference
            self._known().pop(self._key, None)
            return ways[reference](x)

    def _measure(self, x: Tensor, ways: Mapping[str, Way], few: int | None) -> None:
        """Find the way on random numbers: the caller's may be zero, and then any two ways agree."""
        reference, *others = ways
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(x.shape, generator=generator, dtype=torch.promote_types(x.dtype, torch.float32)).to(x)
        part = x if few is None else x[:few]
        expected, best = timed(lambda: ways[reference](part), x.device)
        best *= 1 if few is None else len(x) / len(part)
        chosen, remarks = reference, [_took(reference, best)]
        for name in others:
            way = ways[name]
            try:
                found, seconds = _timed_strictly(lambda: way(x), x.device)  # noqa: B023 (used at once)
            except Exception as error:  # any failure of an optimisation means that the reference serves
                remarks.append(f"{name} is unsupported here: {reason(error)}")
                continue
            difference = relative_difference(found if few is None else found[:few], expected)
            if not difference <= tolerance(x.dtype):
                remarks.append(f"{name} differs by {difference:.1e}")
                continue
            remarks.append(_took(name, seconds))
            if seconds < CLEARLY * best:
                chosen, best = name, seconds
        self.chosen = chosen
        self._account.note(self._work, chosen, "; ".join(remarks))


def timed(work: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, float]:
    """A result, and the shortest of a few times that it took, in seconds."""
    times: list[float] = []
    while len(times) < 3 and sum(times) < ENOUGH:
        start = _now(device)
        result = work()
        times.append(_now(device) - start)
    return result, min(times)


def _timed_strictly(work: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, float]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "There is a performance drop")  # a missing batching rule is a no
        return timed(work, device)


def _took(name: str, seconds: float) -> str:
    return f"{name} {1e3 * seconds:.1f} ms"


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
