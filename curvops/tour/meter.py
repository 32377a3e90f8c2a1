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

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


@dataclass
class Cost:
    """What a computation took.

    Attributes:
        seconds: Wall-clock time, until the device was done.
        peak_bytes: The most memory that was held above the start: by tensors on a GPU, by the
            process on the CPU (the kernel's high-water mark). None where it cannot be seen.
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
    peak = _peak_memory(device)
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
    _give_back_free_memory()
    try:
        _RESET.write_text("5")  # sets the high-water mark to what is held now
    except OSError:
        return None
    return _status("VmRSS")


def _peak_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return _status("VmHWM")


def _give_back_free_memory() -> None:
    """Free heap that an earlier computation left would hide what the next one needs."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl has not
        if trim is not None:
            trim(0)


def _status(key: str) -> int | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(f"{key}:")]
    return int(found[0]) * 1024 if found else None
