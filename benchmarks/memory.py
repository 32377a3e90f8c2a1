"""Peak memory of products, columns and Kronecker factors, ours and curvlinops', each in a process of its own.

Usage: python benchmarks/memory.py [--models mlp,residual,gpt] [--work product,columns,factors] [--rounds 1]
       [--threads 1] [--at-most RATIO] [--write FILE]
A figure is the process' high-water mark above what it held before the operator was made, in MiB; vectors and their
products are there in both libraries. "Keeping nothing" is ours with `memory_budget=0`, and "default" what a user gets,
who lets it keep graphs for the next product within a quarter of the free memory. Exit status 1 if ours, keeping
nothing, takes more than --at-most times the peer's memory anywhere.
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
from typing import Any

import models
import torch
from document import Section
from torch import Tensor, nn

from curvops.tour.meter import measured

MIB = 2**20
COLUMNS = 16
LOSS = nn.CrossEntropyLoss()
SIDES = ("ours, keeping nothing", "ours, default", "peer")
Make = Callable[[int], models.Problem]


def mlp(scale: int) -> models.Problem:
    """An MLP 784-1024-1024-10, two batches of 256 data."""
    width = 1024 // scale
    model = nn.Sequential(nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
    size = 256 // scale
    return model, [(torch.rand(size, 784), torch.randint(10, (size,))) for _ in range(2)]


def residual(scale: int) -> models.Problem:
    """A residual CNN of 32 channels, two batches of 8 images of 32 × 32."""
    size = 8 // scale
    data = [(torch.rand(size, 3, 32, 32), torch.randint(10, (size,))) for _ in range(2)]
    return models.Residual(32), data


def gpt(scale: int) -> models.Problem:
    """A GPT of two blocks of width 256 with a vocabulary of 2,000, two batches of 4 × 32 tokens."""
    size, vocabulary = max(4 // scale, 1), 2000
    model = models.GPT(vocabulary, width=256 // scale, heads=4, depth=2, length=32)
    return model, [(text[0], text[1]) for text in torch.randint(vocabulary, (2, 2, size, 32))]


MODELS: dict[str, Make] = {"mlp": mlp, "residual": residual, "gpt": gpt}
PRODUCTS = ("Hessian", "GGN", "EF")
WORK = {
    "product": [f"{kind} product" for kind in PRODUCTS],
    "columns": [f"{kind}, {COLUMNS} columns" for kind in PRODUCTS],
    "factors": ["KFAC-mc", "EKFAC-mc"],
}


def operator(
    side: str, kind: str, model: nn.Module, params: dict[str, Tensor], data: models.Data, **options: Any
) -> Any:
    """An operator of one of the libraries, without its checks."""
    import curvlinops

    import curvops

    name = f"{kind}LinearOperator"
    if side == "peer":
        options["num_data"] = sum(len(X) for X, _ in data)
        return getattr(curvlinops, name)(model, LOSS, list(params.values()), data, check_deterministic=False, **options)
    budget = {"memory_budget": 0} if "nothing" in side else {}
    return getattr(curvops, name)(model, LOSS, params, data, check_deterministic=False, **budget, **options)


def product(side: str, work: str, problem: models.Problem) -> Callable[[], object]:
    """A product with a vector or columns, which are there before."""
    model, data = problem
    params: dict[str, Tensor] = dict(model.named_parameters())
    size = sum(p.numel() for p in params.values())
    v = torch.ones(size, COLUMNS) if "columns" in work else torch.ones(size)
    kind = work.replace(",", " ").split()[0]
    return lambda: operator(side, kind, model, params, data) @ v


def factors(side: str, work: str, problem: models.Problem) -> Callable[[], object]:
    """Kronecker factors of the parameters that the peer covers too."""
    model, data = problem
    params = models.linear_parameters(model)
    kind = work.removesuffix("-mc")

    def compute() -> object:
        if side != "peer":
            return operator(side, kind, model, params, data, fisher_type="mc").blocks
        terms = data[0][1][0].numel()
        made = operator(side, kind, model, params, data, fisher_type="mc", num_per_example_loss_terms=terms)
        return (made.compute_kronecker_factors(), kind == "EKFAC" and made.compute_eigenvalue_correction())

    return compute


def peak(name: str, work: str, side: str) -> float:
    """Measure one piece of work in this process, in MiB."""
    prepare = factors if work in WORK["factors"] else product
    for scale in (8, 1):  # the small one loads what is loaded at first use
        torch.manual_seed(0)
        compute = prepare(side, work, MODELS[name](scale))
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
    parser.add_argument("--work", default=",".join(WORK))
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
    section = Section(
        "Peak memory",
        "MiB above what the process held before the operator was made, each in a process of its own; ours keeping "
        "nothing (`memory_budget=0`) and by default, and curvlinops'.",
        f"float32, medians of {options.rounds} rounds",
    )
    section.say("")
    chosen = options.models.split(",")
    for name in chosen:
        make = MODELS[name]
        params = sum(p.numel() for p in make(1)[0].parameters())
        section.say(f"- {name}: {make.__doc__} {params:,} parameters, {4 * params / MIB:.0f} MiB.")
    section.table(["model", "work", *SIDES, "peer / ours, keeping nothing"])
    worst = 0.0
    for name in chosen:
        for work in (work for group in options.work.split(",") for work in WORK[group]):
            found = [measured_apart(name, work, side, options.threads, options.rounds) for side in SIDES]
            ratio = found[2] / found[0] if isinstance(found[2], float) and isinstance(found[0], float) else None
            worst = max(worst, 1 / ratio if ratio else 0.0)
            cells = [f"{value:.0f}" if isinstance(value, float) else f"fails: {value}" for value in found]
            section.row([name, work, *cells, f"{ratio:.2f}" if ratio else "—"])
    section.write(options.write)
    return int(worst > options.at_most)


if __name__ == "__main__":
    raise SystemExit(main())
