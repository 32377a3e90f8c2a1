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

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Cost:
    """What a computation took.

    Attributes:
        seconds: Wall-clock time, until the device was done.
        peak_bytes: The most memory that was held above the start: by tensors on a GPU, by the process on the CPU (the
            kernel's high-water mark). None where it cannot be seen.
    """

    seconds: float = float("nan")
    peak_bytes: int | None = None


@contextmanager
def measured(device: torch.device) -> Iterator[Cost]:
    """Measure the body; the `Cost` that is handed out is filled in when it ends."""
    cost = Cost()
    gc.collect()
    start_bytes = _start_memory(device)
    start = time.perf_counter()
    yield cost
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    cost.seconds = time.perf_counter() - start
    peak = int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else _status("VmHWM")
    if start_bytes is not None and peak is not None:
        cost.peak_bytes = max(peak - start_bytes, 0)


def memory_kind(device: torch.device) -> str:
    """Return what `Cost.peak_bytes` counts on this device, in two words."""
    return "GPU tensors" if device.type == "cuda" else "process"


def _start_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return int(torch.cuda.memory_allocated(device))
    # free heap that an earlier computation left would hide what this one needs; glibc can give it back, musl can not
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)
    try:
        _RESET.write_text("5")  # sets the high-water mark to what is held now
    except OSError:
        return None
    return _status("VmRSS")


def _status(key: str) -> int | None:
    found = entry(_STATUS, f"{key}:")
    return None if found is None else found * 1024
