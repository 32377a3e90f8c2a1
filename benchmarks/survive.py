"""Seconds that a run loses when it is killed with SIGKILL half-way and started again with the same checkpoint.

Usage: python benchmarks/survive.py [--batches 60] [--every 5]
Each figure is that of a fresh process, from the first call on: without a checkpoint, with one, until it was killed, and after that. What
is lost is the sum of the latter two less the first. That the results have the same bits is asserted.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from curvops import Checkpoint, EKFACLinearOperator, GGNLinearOperator, KFACLinearOperator

NAMES = ("KFAC", "EKFAC", "EKFAC, swept", "eigenpairs")


class Loader:
    """Batches that are made when they are asked for; before one of them the process kills itself."""

    def __init__(self, number: int, last: int) -> None:
        self.number, self.last, self.count, self.start = number, last, 0, time.perf_counter()

    def __len__(self) -> int:
        return self.number

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for k in range(self.number):
            if self.count == self.last:
                print(time.perf_counter() - self.start, flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            self.count += 1
            generator = torch.Generator().manual_seed(k)
            yield torch.randn(64, 784, generator=generator), torch.randint(10, (64,), generator=generator)


def compute(name: str, loader: Loader, checkpoint: Checkpoint | None) -> list[Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, 200), nn.ReLU(), nn.Linear(200, 10))
    problem = model, nn.CrossEntropyLoss(), dict(model.named_parameters()), loader
    options: dict[str, Any] = {"check_deterministic": False}
    if name == "eigenpairs":
        # as many products as batches: each walks two of them
        loader.number = 2
        ggn = GGNLinearOperator(*problem, memory_budget=0, **options)
        found = ggn.eigenpairs(3, subspace=20, max_products=30, tolerance=0.0, checkpoint=checkpoint)
        return [found.values, found.vectors]
    options |= {"memory_budget": 0} if name == "EKFAC, swept" else {}
    cls = KFACLinearOperator if name == "KFAC" else EKFACLinearOperator
    op = cls(*problem, checkpoint=checkpoint, **options)
    return [t for _, entry in op.state.groups for _, t in sorted(entry.tensors.items())]


def worker(name: str, batches: int, last: int, path: str, every: int, result: str) -> None:
    loader = Loader(batches, last)
    found = compute(name, loader, Checkpoint(path, every) if path else None)
    print(time.perf_counter() - loader.start, flush=True)
    torch.save(found, result)


def timed(*arguments: object) -> float:
    command = [sys.executable, __file__, "--worker", *map(str, arguments)]
    return float(subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        name, batches, last, path, every, result = sys.argv[2:]
        return worker(name, int(batches), int(last), path, int(every), result)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=60)
    parser.add_argument("--every", type=int, default=5)
    given = parser.parse_args()
    print(f"{'':14}{'without':>9}{'with':>9}{'killed at':>11}{'then':>9}{'lost':>9}  seconds; MB of the file")
    for name in NAMES:
        with tempfile.TemporaryDirectory() as folder:
            results = [Path(folder) / f"{k}.pt" for k in range(3)]
            half = {"EKFAC, swept": given.batches, "eigenpairs": 30}.get(name, given.batches // 2)
            arguments = name, given.batches
            plain = timed(*arguments, -1, "", given.every, results[0])
            kept = timed(*arguments, -1, Path(folder) / "kept", given.every, results[1])
            path = Path(folder) / "killed"
            until = timed(*arguments, half, path, given.every, results[2])
            then = timed(*arguments, -1, path, given.every, results[2])
            found = [torch.load(result) for result in results]
            assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True)), name
            lost = until + then - plain
            numbers = f"{plain:9.2f}{kept:9.2f}{until:11.2f}{then:9.2f}{lost:9.2f}"
            print(f"{name:14}{numbers}  {path.stat().st_size / 1e6:.1f}", flush=True)
    return None


if __name__ == "__main__":
    main()
