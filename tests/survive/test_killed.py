"""Processes that are killed with SIGKILL, and go on from their checkpoints."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from survive.cases import COMPUTATIONS, differing

HERE = Path(__file__).parent
PATH = os.pathsep.join(map(str, (HERE.parent, HERE.parent.parent)))
# the step before which each is killed: of EKFAC in the second walk over 12 batches, or on the way to it
STOPS = {"kfac": 8, "ekfac": 5, "ekfac swept": 17, "kfoc": 10, "diagonal": 6, "eigenpairs": 31, "density in parts": 15}


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
    for name, compute in COMPUTATIONS.items():
        counted: list[int] = []
        assert differing(found[name], compute(counted.append)) == [], name
        if name in ("kfac", "diagonal", "ekfac", "ekfac swept"):
            # the end of what was finished is found by looking at the data once
            assert steps[name] == 12, name
        elif name in STOPS and name != "kfoc":
            assert steps[name] <= len(counted) - STOPS[name] + 3 + 1, name
