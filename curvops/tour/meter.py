"""Seconds and peak memory of a computation."""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from curvops.memory import entry

STATUS = Path("/proc/self/status")


@dataclass
class Cost:
    """Wall-clock time until the device was done, and the most memory that was held above the start.

    By tensors on a GPU, by the process on the CPU (the kernel's high-water mark); None where it cannot be seen.
    """

    seconds: float = float("nan")
    peak_bytes: int | None = None


@contextmanager
def measured(device: torch.device) -> Iterator[Cost]:
    """Measure the body; the `Cost` that is handed out is filled in when it ends."""
    cost, on_gpu = Cost(), device.type == "cuda"
    gc.collect()
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device) if on_gpu else _held_by_process()
    start = time.perf_counter()
    yield cost
    if on_gpu:
        torch.cuda.synchronize(device)
    cost.seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else entry(STATUS, "VmHWM:")
    if held is not None and peak is not None:
        cost.peak_bytes = max(peak - held, 0)


def _held_by_process() -> int | None:
    # free heap that an earlier computation left would hide what this one needs; glibc can give it back, musl can not
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # sets the high-water mark to what is held now
    except OSError:
        return None
    return entry(STATUS, "VmRSS:")
