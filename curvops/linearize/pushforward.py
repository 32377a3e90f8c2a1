"""J v: the reference way, or forward mode where a measurement finds it equal and faster."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from curvops.linearize.certify import Account, relative_difference, tolerance
from curvops.linearize.reference import OutputLinearization

CLEARLY = 0.85  # part of the reference's time below which another way is taken: measurements are noisy
ForwardMode = Callable[[Tensor], Tensor]


class Pushforward:
    """Chooses between two ways to J v, for all batches of an operator.

    The first product goes the reference way, so that a single one costs no more than it must; the second
    measures both ways on its first batch and compares their results.

    Args:
        account: Where the choice is recorded.
    """

    def __init__(self, account: Account) -> None:
        self._account = account
        self._forward: bool | None = None
        self._seen: set[int] = set()

    def __call__(self, jacobian: OutputLinearization, forward: ForwardMode, v: Tensor, place: int) -> Tensor:
        """J v, of the output's shape.

        Args:
            jacobian: The reference way.
            forward: Forward mode.
            v: Flat vector ``[D]``.
            place: Place of the batch; the second time that a place is seen is the second product.
        """
        if self._forward is None:
            if place not in self._seen:
                self._seen.add(place)
                return jacobian.jvp(v)
            return self._measure(jacobian, forward, v)
        return forward(v).to(jacobian.z.dtype) if self._forward else jacobian.jvp(v)

    def _measure(self, jacobian: OutputLinearization, forward: ForwardMode, v: Tensor) -> Tensor:
        reference, slow = timed(lambda: jacobian.jvp(v), v.device)
        try:
            pushed, fast = timed(lambda: forward(v), v.device)
        except Exception as error:  # any failure of an optimisation means that the reference serves
            reason = f"{type(error).__name__}: {error}".split("\n")[0]
            self._forward = False
            self._account.note("J v", "reverse over reverse", f"forward mode is unsupported here: {reason}")
            return reference
        difference = relative_difference(pushed, reference)
        equal = difference <= tolerance(v.dtype)
        self._forward = equal and fast < CLEARLY * slow
        choice = "forward mode" if self._forward else "reverse over reverse"
        measured = f"{1e3 * fast:.1f} ms forward, {1e3 * slow:.1f} ms reverse over reverse"
        self._account.note("J v", choice, measured + ("" if equal else f", and differs by {difference:.1e}"))
        return reference


def timed(work: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, float]:
    """A result, and the shortest of three times that it took, in seconds."""
    times = []
    for _ in range(3):
        start = _now(device)
        result = work()
        times.append(_now(device) - start)
    return result, min(times)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
