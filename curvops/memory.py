"""How much memory a computation may take."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import torch

# of each version of control groups: where they are mounted, limit, usage, and the files' pages within the usage, which
# the kernel gives back where memory is short
_GROUPS = {
    1: ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
}

LITTLE = 16 * 2**20  # bytes that are always there, for which the system is not asked


def free_memory(device: torch.device, root: Path = Path("/")) -> int:
    """Free memory of a device in bytes: on the CPU what the system has, and the process's control groups leave.

    The system's files are below `root`.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available = entry(root / "proc/meminfo", "MemAvailable:")
    if available is not None:
        return max(0, min([available, *_left_by_groups(root)]))
    try:  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 8 * 2**30


def entry(path: Path, key: str) -> int | None:
    """The number after a key in one of the kernel's files; of an empty key the first one. None if it is not there."""
    for words in map(str.split, _lines(path)):
        found = words if not key else words[1:] if words[:1] == [key] else []
        if found and found[0].isdigit():
            return int(found[0]) * (1024 if found[1:] == ["kB"] else 1)
    return None


def budget(device: torch.device, memory_budget: int | None) -> int:
    """The user's budget in bytes, by default a quarter of what is free."""
    return free_memory(device) // 4 if memory_budget is None else memory_budget


def granted(device: torch.device, memory_budget: int | None, wanted: int) -> int:
    """How much of the bytes that are wanted the budget has room for. A little is there in any case."""
    if memory_budget is None and wanted <= LITTLE:
        return wanted
    return min(wanted, budget(device, memory_budget))


def byte_size(number: float) -> str:
    """A number of bytes in words, with the units of ten that files are told in, too.

    Example:
        >>> byte_size(159), byte_size(31_800_000), byte_size(745_058_100_000_000)
        ('159 B', '31.8 MB', '745,058 GB')
    """
    for unit in ("B", "kB", "MB"):
        if number < 999.5:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} GB" if number < 999.5 else f"{number:,.0f} GB"


def check_fits(rows: int, columns: int, dtype: torch.dtype, device: torch.device, what: str) -> None:
    """Refuse a dense matrix that does not fit into the free memory by a MemoryError that gives its size."""
    size = rows * columns * dtype.itemsize
    if size > LITTLE and size > (free := free_memory(device)):
        raise MemoryError(
            f"{what}: a {rows} × {columns} matrix takes {byte_size(size)}, {byte_size(free)} are free. "
            "Multiply onto the columns that you need, or take the operator of fewer parameters."
        )


def _left_by_groups(root: Path) -> Iterator[int]:
    """What is left of the limit of each of the process's control groups, and of those above them."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, name = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mount, limit, usage, pages = _GROUPS[1 if controllers else 2]
        inside = PurePosixPath(name.lstrip("/"))
        for folder in (root / mount / group for group in (inside, *inside.parents)):
            most, used = entry(folder / limit, ""), entry(folder / usage, "")
            if most is not None and used is not None:
                yield most - used + (entry(folder / "memory.stat", pages) or 0)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
