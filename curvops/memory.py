"""How much memory a computation may take."""

from __future__ import annotations

import os
from pathlib import Path

import torch


def free_memory(device: torch.device) -> int:
    """Free memory of a device in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with Path("/proc/meminfo").open() as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 8 * 2**30


def budget(device: torch.device, memory_budget: int | None) -> int:
    """The user's budget in bytes, by default a quarter of what is free."""
    return free_memory(device) // 4 if memory_budget is None else memory_budget


def check_fits(rows: int, columns: int, dtype: torch.dtype, device: torch.device, what: str) -> None:
    """Refuse a dense matrix that does not fit into the free memory.

    Raises:
        MemoryError: If it does not; the message gives its size.
    """
    size, free = rows * columns * dtype.itemsize, free_memory(device)
    if size > free:
        raise MemoryError(
            f"{what}: a {rows} × {columns} matrix takes {size / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free. "
            "Multiply onto the columns that you need, or take the operator of fewer parameters."
        )
