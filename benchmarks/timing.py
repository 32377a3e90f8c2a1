"""Seconds of pieces of work that are compared: alternating in one process, medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

WARM_UP = 2  # rounds that are not counted


def medians(
    works: Sequence[Callable[[], Any]], rounds: int, *, warm_up: int = WARM_UP, at_most: float = float("inf")
) -> list[float]:
    """Median seconds of each, alternating; after ``at_most`` seconds no further round begins, but the first counts."""
    seconds: list[list[float]] = [[] for _ in works]
    for _ in range(warm_up):
        for work in works:
            work()
    begun = time.perf_counter()
    for k in range(rounds):
        if k and time.perf_counter() - begun > at_most:
            break
        for times, work in zip(seconds, works, strict=True):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in seconds]
