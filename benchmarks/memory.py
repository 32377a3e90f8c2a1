"""Peak memory of products, columns and Kronecker factors, ours and curvlinops', each in a process of its own.

Usage: python benchmarks/memory.py [--models mlp,residual,gpt] [--work product,columns,factors] [--rounds 1]
       [--threads 1] [--at-most RATIO] [--write FILE]
`--work many` takes long, and has a section of its own.
A figure is the process' high-water mark above what it held before the operator was made, in MiB; vectors and their
products are there in both libraries. "Linearized" is the same product twice inside `linearized()`, which may keep BUDGET
MiB, and "many" a thousand products of a model an eighth as wide, beside ten. Exit status 1 if ours takes more than
--at-most times the peer's memory anywhere, or if what is kept passes the budget, or if a thousand products take more
than ten.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import models
import torch
from document import Section
from problem import Problem
from torch import nn

from curvops.tour.meter import measured

MIB = 2**20
COLUMNS, FEW, MANY = 16, 10, 1000
BUDGET = 32  # MiB that `linearized` may keep
SLACK = 2  # MiB by which a process' high-water mark differs from run to run
SIDES = ("ours", "ours, linearized", "peer")


def mlp(scale: int) -> models.Made:
    """An MLP 784-1024-1024-10, two batches of 256 data."""
    width = 1024 // scale
    model = nn.Sequential(nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
    size = 256 // scale
    return model, [(torch.rand(size, 784), torch.randint(10, (size,))) for _ in range(2)]


def residual(scale: int) -> models.Made:
    """A residual CNN of 32 channels, two batches of 8 images of 32 × 32."""
    size = 8 // scale
    data = [(torch.rand(size, 3, 32, 32), torch.randint(10, (size,))) for _ in range(2)]
    return models.Residual(32), data


def gpt(scale: int) -> models.Made:
    """A GPT of two blocks of width 256 with a vocabulary of 2,000, two batches of 4 × 32 tokens."""
    size, vocabulary = max(4 // scale, 1), 2000
    model = models.GPT(vocabulary, width=256 // scale, heads=4, depth=2, length=32)
    return model, [(text[0], text[1]) for text in torch.randint(vocabulary, (2, 2, size, 32))]


MODELS: dict[str, Callable[[int], models.Made]] = {"mlp": mlp, "residual": residual, "gpt": gpt}
PRODUCTS = ("Hessian", "GGN", "EF")
WORK = {
    "product": [f"{kind} product" for kind in PRODUCTS],
    "columns": [f"{kind}, {COLUMNS} columns" for kind in PRODUCTS],
    "factors": ["KFAC-mc", "EKFAC-mc"],
    "many": [f"{kind}, {times} products" for kind in PRODUCTS for times in (FEW, MANY)],
}


def task(side: str, work: str, problem: Problem) -> Callable[[], object]:
    """A piece of work of one library; vectors are there before."""
    kind = work.replace(",", " ").replace("-mc", "").split()[0]
    if "-mc" in work:
        make = problem.peer_factors if side == "peer" else problem.ours
        return lambda: make(kind, fisher_type="mc")
    v = torch.ones(problem.size, COLUMNS) if "columns" in work else torch.ones(problem.size)
    times = int(work.split()[1]) if "products" in work else 1

    def linearized() -> None:
        with problem.ours(kind, memory_budget=BUDGET * MIB).linearized() as operator:
            for _ in range(max(2, times)):
                operator @ v

    def products() -> None:
        operator = problem.peer(kind) if side == "peer" else problem.ours(kind)
        for _ in range(times):
            operator @ v

    return linearized if "linearized" in side else products


def peak(name: str, work: str, side: str) -> float:
    """Measure one piece of work in this process, in MiB."""
    for scale in (8, 8 if "products" in work else 1):  # the small one loads what is loaded at first use
        torch.manual_seed(0)
        compute = task(side, work, Problem(name, *MODELS[name](scale), linear="-mc" in work))
        with measured(torch.device("cpu")) as cost:
            compute()
    if cost.peak_bytes is None:
        raise SystemExit("the high-water mark of this process' memory cannot be seen here")
    return cost.peak_bytes / MIB


def measured_apart(name: str, work: str, side: str, threads: int, rounds: int) -> float | str:
    """The median of some processes; what the peer cannot do is a result of this benchmark."""
    command = [sys.executable, __file__, "--one", json.dumps([name, work, side]), "--threads", str(threads)]
    peaks = []
    for _ in range(rounds):
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        if ran.returncode:
            if side != "peer":
                raise SystemExit(f"{name}, {work}, {side} failed:\n{ran.stderr}")
            return ran.stderr.strip().splitlines()[-1].split(":")[0]
        peaks.append(float(ran.stdout.splitlines()[-1]))
    return statistics.median(peaks)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--work", default=",".join(work for work in WORK if work != "many"))
    parser.add_argument("--rounds", type=int, default=1, help="processes of which each figure is the median")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--at-most", type=float, default=float("inf"), metavar="RATIO")
    parser.add_argument("--write", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.one:
        warnings.filterwarnings("ignore")
        print(peak(*json.loads(options.one)))
        return 0
    groups = options.work.split(",")
    section = Section(
        "Peak memory" + (" over many products" if groups == ["many"] else ""),
        "MiB above what the process held before the operator was made, each in a process of its own: ours, which keeps "
        f"nothing, ours twice inside `linearized()` with a budget of {BUDGET} MiB, and curvlinops'."
        + (f" {FEW} and {MANY:,} products are of a model an eighth as wide." if "many" in groups else ""),
        f"float32, medians of {options.rounds} rounds",
    )
    section.say("")
    chosen = options.models.split(",")
    for name in chosen:
        make = MODELS[name]
        params = sum(p.numel() for p in make(1)[0].parameters())
        section.say(f"- {name}: {make.__doc__} {params:,} parameters, {4 * params / MIB:.0f} MiB.")
    section.table(["model", "work", *SIDES, "peer / ours"])
    complaints: list[str] = []
    for name in chosen:
        before = dict.fromkeys(SIDES, 0.0)
        for work in (work for group in groups for work in WORK[group]):
            sides = [side for side in SIDES if not ("linearized" in side and "-mc" in work)]
            found = {side: measured_apart(name, work, side, options.threads, options.rounds) for side in sides}
            ours, peer = found["ours"], found["peer"]
            ratio = peer / ours if isinstance(peer, float) and ours else None
            cells = [f"{v:.0f}" if isinstance(v, float) else v for v in (found.get(side, "—") for side in SIDES)]
            section.row([name, work, *cells, f"{ratio:.2f}" if ratio else "—"])
            if ratio and 1 / ratio > options.at_most:
                complaints.append(f"{name}, {work}: {1 / ratio:.2f} times the peer's")
            if "-mc" not in work and found["ours, linearized"] > ours + BUDGET + SLACK:
                complaints.append(f"{name}, {work}: linearized() passes its budget")
            if f" {MANY} " in work and any(found[side] > before[side] + SLACK for side in SIDES[:2]):
                complaints.append(f"{name}, {work}: not flat")
            before = found
    section.write(options.write)
    print("\n".join(complaints), file=sys.stderr)
    return int(bool(complaints))


if __name__ == "__main__":
    raise SystemExit(main())
