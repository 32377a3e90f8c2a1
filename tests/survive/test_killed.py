"""Processes that are killed with SIGKILL, and go on from their checkpoints."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from survive.cases import COMPUTATIONS, STOPS, differing

HERE = Path(__file__).parent
PATH = os.pathsep.join(map(str, (HERE.parent, HERE.parent.parent)))


def started(*arguments: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, HERE / "worker.py", *map(str, arguments)], env=os.environ | {"PYTHONPATH": PATH}
    )


def test_killed_processes_go_on_to_the_same_bits(tmp_path):
    """One process after another computes everything; each but the last is killed in the middle of another computation."""
    for name, place in STOPS.items():
        process = started(tmp_path, name, place)
        until = time.monotonic() + 120
        while not (tmp_path / "here").exists():
            assert process.poll() is None and time.monotonic() < until, name
            time.sleep(0.05)
        (tmp_path / "here").unlink()
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not list(tmp_path.glob(".*")), "half a file"
    assert started(tmp_path).wait() == 0
    found, steps = torch.load(tmp_path / "found.pt", weights_only=True)
    for name, place in STOPS.items():
        counted: list[int] = []
        assert differing(found[name], COMPUTATIONS[name](counted.append)) == [], name
        # the end of what was finished is found by looking at the data once, or by one product
        assert steps[name] <= (len(counted) - place + 3 + 1 if name == list(STOPS)[-1] else 12), name
