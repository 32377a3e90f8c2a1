"""Processes that are killed with SIGKILL, and go on from their checkpoints."""

import signal
import time
from typing import Any

import torch
from launch import forked
from survive import worker
from survive.cases import COMPUTATIONS, STOPS, differing


def started(*arguments: object) -> Any:
    process = forked().Process(target=worker.main, args=arguments)
    process.start()
    return process


def test_killed_processes_go_on_to_the_same_bits(tmp_path):
    """One process after another computes everything; each but the last is killed in the middle of another computation."""
    for name, place in STOPS.items():
        process = started(tmp_path, name, place)
        until = time.monotonic() + 120
        while not (tmp_path / "here").exists():
            assert process.is_alive() and time.monotonic() < until, name
            time.sleep(0.05)
        (tmp_path / "here").unlink()
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert not list(tmp_path.glob(".*")), "half a file"
    last = started(tmp_path)
    last.join()
    assert last.exitcode == 0
    found, steps = torch.load(tmp_path / "found.pt", weights_only=True)
    for name, place in STOPS.items():
        counted: list[int] = []
        assert differing(found[name], COMPUTATIONS[name](counted.append)) == [], name
        # the end of what was finished is found by looking at the data once, or by one product
        assert steps[name] <= (len(counted) - place + 3 + 1 if name == list(STOPS)[-1] else 12), name
