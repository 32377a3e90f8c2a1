"""Free memory is what the system has, and what the limits of the process's control groups leave."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from curvops import memory
from curvops.memory import free_memory

V2, V1 = "0::/jobs/mine", "9:name=systemd:/\n4:cpu,memory:/jobs/mine\n0::/"
NO_LIMIT = 9223372036854771712


def put(root: Path, files: dict[str, object]) -> None:
    for name, content in {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    5000 kB", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{content}\n")


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("3:cpu:/jobs", {}, 5000 * 1024),
        (V2, {"jobs/mine/memory.max": 3000, "jobs/mine/memory.current": 1000}, 2000),
        (V2, {"jobs/mine/memory.max": "max", "jobs/mine/memory.current": 1000}, 5000 * 1024),
        (V2, {"jobs/mine/memory.max": "max", "jobs/memory.max": 500, "jobs/memory.current": 100}, 400),
        ("0::/", {"memory.max": 700, "memory.current": 100, "memory.stat": "anon 90\ninactive_file 10"}, 610),
        (V2, {"jobs/mine/memory.max": 700, "jobs/mine/memory.current": 900}, 0),
        (V1, {"memory/jobs/mine/memory.limit_in_bytes": 300, "memory/jobs/mine/memory.usage_in_bytes": 100}, 200),
        (V1, {"memory/memory.limit_in_bytes": 300, "memory/memory.usage_in_bytes": 100}, 200),  # in a container
        (V1, {"memory/memory.limit_in_bytes": NO_LIMIT, "memory/memory.usage_in_bytes": 100}, 5000 * 1024),
    ],
)
def test_the_smallest_limit_counts(groups: str, files: dict[str, object], expected: int, tmp_path: Path) -> None:
    put(tmp_path, {"proc/self/cgroup": groups} | {f"sys/fs/cgroup/{name}": text for name, text in files.items()})
    assert free_memory(torch.device("cpu"), tmp_path) == expected


def test_without_the_kernels_files_it_is_a_guess(tmp_path: Path) -> None:
    assert free_memory(torch.device("cpu"), tmp_path) > 0


def test_a_little_is_granted_without_a_look_at_the_system(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 400 * 2**20)
    cpu = torch.device("cpu")
    for wanted in (memory.LITTLE, 2**30):
        assert memory.granted(cpu, None, wanted) == min(wanted, 100 * 2**20)
        assert memory.granted(cpu, 1000, wanted) == 1000
    monkeypatch.delattr(memory, "free_memory")
    assert memory.granted(cpu, None, memory.LITTLE) == memory.LITTLE
