"""Anonymous memory of Kronecker operators whose factors and rows lie in files (`spill=`), beside those in memory.

    python benchmarks/spill.py [FOLDER]

For KFAC and EKFAC of an MLP of LAYERS layers of width WIDTH and BATCHES batches, the most anonymous memory (RssAnon of
/proc/self/status, every few milliseconds; Linux) above what was there before, what is left of it when the operator is made, and
its seconds; each in a process of its own. Pages of files count for what a process holds, too, but the system takes them
back where memory is short. Rows may take ENOUGH, or BUDGET.
"""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from torch import nn

from curvops import EKFACLinearOperator, KFACLinearOperator
from curvops.memory import entry

KINDS = {"KFAC": KFACLinearOperator, "EKFAC": EKFACLinearOperator}
WIDTH, LAYERS, SIZE, BATCHES = 1536, 8, 512, 12
ENOUGH, BUDGET = 10_000, 50  # MB that rows may take


def anonymous() -> int:
    """Bytes of the process that lie in no file."""
    return entry(Path("/proc/self/status"), "RssAnon:") or 0


class Watch(threading.Thread):
    """Notes the most anonymous memory while it runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.ended = anonymous(), threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.002):
            self.most = max(self.most, anonymous())


def measure(kind: str, budget: str, folder: str) -> None:
    """Print the most and the last anonymous megabytes, and seconds."""
    torch.manual_seed(0)
    layers = [part for _ in range(LAYERS) for part in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
    model = nn.Sequential(*layers, nn.Linear(WIDTH, 10))
    data = [(torch.rand(SIZE, WIDTH), torch.randint(10, (SIZE,))) for _ in range(BATCHES)]
    before, watch, begin = anonymous(), Watch(), time.perf_counter()
    watch.start()
    operator = KINDS[kind](
        model,
        nn.CrossEntropyLoss(),
        dict(model.named_parameters()),
        data,
        check_deterministic=False,
        memory_budget=int(budget) * 10**6,
        spill=folder or None,
    )
    seconds = time.perf_counter() - begin
    watch.ended.set()
    watch.join()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator holds back
    assert operator.shape[0] > WIDTH**2
    print((watch.most - before) / 1e6, (anonymous() - before) / 1e6, seconds)


def main(folder: str) -> None:
    print(f"{'anonymous MB':36}{'most':>8}{'made':>8}{'seconds':>10}")
    ways = {"rows in memory": (ENOUGH, ""), "rows computed again": (BUDGET, ""), "in files": (BUDGET, folder)}
    for kind in KINDS:
        for what, (budget, where) in ways.items():
            command = [sys.executable, __file__, kind, str(budget), where]
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            most, made, seconds = map(float, out.split())
            print(f"{kind + ', ' + what:36}{most:8.0f}{made:8.0f}{seconds:10.1f}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) > 2:  # kind, budget and folder, which may be empty
        measure(*sys.argv[1:])
    elif len(sys.argv) == 2:
        main(sys.argv[1])
    else:
        with tempfile.TemporaryDirectory() as made:
            main(made)
