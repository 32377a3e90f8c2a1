"""Cost of products, columns and Kronecker factors, ours and curvlinops' alternating in one process, in gradients.

Usage: python benchmarks/work.py [--models cnn,mlp,residual,gpt] [--work one,repeated,columns,dense,kfac] [--rounds 9]
       [--threads 2] [--write FILE]
Both libraries get the same model, loss and data, and run without their checks. A figure is the median over
the rounds; a gradient is that of the risk by autograd over the same batches, timed in the same rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import curvlinops
import models
import torch
from torch import Tensor, nn

import curvops

LOSS = nn.CrossEntropyLoss()
COLUMNS = 16
PRODUCTS = {
    "Hessian": (curvops.HessianLinearOperator, curvlinops.HessianLinearOperator),
    "GGN": (curvops.GGNLinearOperator, curvlinops.GGNLinearOperator),
    "EF": (curvops.EFLinearOperator, curvlinops.EFLinearOperator),
}


@dataclass(frozen=True)
class Row:
    """One piece of work on one model: ours and the peer's cost in gradients."""

    model: str
    work: str
    ours: float
    peer: float | None
    note: str = ""

    @property
    def ratio(self) -> str:
        return "—" if self.peer is None else f"{self.peer / self.ours:.2f}"

    def __str__(self) -> str:
        peer = "fails" if self.peer is None else f"{self.peer:.2f}"
        return f"| {self.model} | {self.work} | {self.ours:.2f} | {peer} | {self.ratio} | {self.note} |"


@dataclass(frozen=True)
class Problem:
    """A model with its data, as both libraries take it."""

    name: str
    model: nn.Module
    data: models.Data
    params: dict[str, Tensor]

    def gradient(self) -> None:
        for X, y in self.data:
            torch.autograd.grad(LOSS(self.model(X), y), list(self.params.values()))

    @property
    def size(self) -> int:
        return sum(p.numel() for p in self.params.values())

    @property
    def num_data(self) -> int:
        return sum(len(X) for X, _ in self.data)

    def ours(self, kind: Any, **options: Any) -> Any:
        return kind(self.model, LOSS, self.params, self.data, check_deterministic=False, **options)

    def peer(self, kind: Any, **options: Any) -> Any:
        listed = list(self.params.values())
        return kind(self.model, LOSS, listed, self.data, check_deterministic=False, num_data=self.num_data, **options)


def medians(works: list[Callable[[], Any]], rounds: int) -> list[float]:
    """Median seconds of each, alternating; the first two rounds are not counted."""
    seconds: list[list[float]] = [[] for _ in works]
    for k in range(rounds + 2):
        for times, work in zip(seconds, works, strict=True):
            start = time.perf_counter()
            work()
            if k > 1:
                times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in seconds]


def compared(
    problem: Problem, work: str, ours: Callable[[], Any], peer: Callable[[], Any], rounds: int, note: str = ""
) -> Row:
    """Both libraries and the gradient, alternating."""
    try:
        peer()
    except Exception as error:  # what the peer cannot do is a result of this benchmark
        own, gradient = medians([ours, problem.gradient], rounds)
        return Row(problem.name, work, own / gradient, None, f"peer: {type(error).__name__}")
    own, other, gradient = medians([ours, peer, problem.gradient], rounds)
    return Row(problem.name, work, own / gradient, other / gradient, note)


def product_rows(problem: Problem, work: list[str], rounds: int) -> Iterator[Row]:
    """Products with one vector and with columns, and dense matrices where they are small."""
    v, block = torch.randn(problem.size), torch.randn(problem.size, COLUMNS)
    for name, (our_kind, peer_kind) in PRODUCTS.items():
        if "one" in work:
            yield compared(
                problem,
                f"{name} product, one-off",
                lambda: problem.ours(our_kind) @ v,  # noqa: B023 (used at once)
                lambda: problem.peer(peer_kind) @ v,  # noqa: B023
                rounds,
            )
        ours, peer = problem.ours(our_kind), problem.peer(peer_kind)
        if "repeated" in work:
            row = compared(problem, f"{name} product, repeated", lambda: ours @ v, lambda: peer @ v, rounds)  # noqa: B023
            difference = (ours @ v - peer @ v).norm() / (ours @ v).norm()
            yield Row(row.model, row.work, row.ours, row.peer, f"difference {difference:.0e}")
        if "columns" in work and name != "EF":
            few = max(2, rounds // 3)
            yield compared(problem, f"{name}, {COLUMNS} columns", lambda: ours @ block, lambda: peer @ block, few)  # noqa: B023
        if "dense" in work and problem.size < 1000:
            eye = torch.eye(problem.size)
            yield compared(
                problem,
                f"dense {name}",
                lambda: problem.ours(our_kind).to_dense(),  # noqa: B023
                lambda: problem.peer(peer_kind) @ eye,  # noqa: B023
                3,
            )


def kronecker_rows(problem: Problem, rounds: int) -> Iterator[Row]:
    """KFAC and EKFAC of the parameters that the peer covers too."""
    problem = replace(problem, params=models.linear_parameters(problem.model))
    terms = LOSS(problem.model(problem.data[0][0]), problem.data[0][1]).numel() and problem.data[0][1][0].numel()
    for kind, fisher_type in (("KFAC", "mc"), ("EKFAC", "mc"), ("EKFAC", "type-2")):
        if fisher_type == "type-2" and terms > 1:
            continue  # the peer refuses, and we take one backward pass for each term and class
        name = f"{kind}LinearOperator"
        our_kind, peer_kind = getattr(curvops, name), getattr(curvlinops, name)

        def ours(kind: Any = our_kind, fisher_type: str = fisher_type) -> None:
            _ = problem.ours(kind, fisher_type=fisher_type).blocks

        def peer(kind: Any = peer_kind, name: str = kind, fisher_type: str = fisher_type) -> None:
            operator = problem.peer(kind, fisher_type=fisher_type, num_per_example_loss_terms=terms)
            operator.compute_kronecker_factors()
            if name == "EKFAC":
                operator.compute_eigenvalue_correction()

        yield compared(problem, f"{kind}, {fisher_type}", ours, peer, max(3, rounds // 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default=",".join(models.PROBLEMS))
    parser.add_argument("--work", default="one,repeated,columns,dense,kfac")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    work = options.work.split(",")
    lines = ["| model | work | ours (gradients) | peer (gradients) | peer / ours | |", "|---|---|---|---|---|---|"]
    print("\n".join(lines), flush=True)
    for name in options.models.split(","):
        torch.manual_seed(0)
        model, data = models.PROBLEMS[name]()
        problem = Problem(name, model, data, dict(model.named_parameters()))
        rows = list(product_rows(problem, work, options.rounds)) if set(work) - {"kfac"} else []
        rows += list(kronecker_rows(problem, options.rounds)) if "kfac" in work else []
        lines += map(str, rows)
        print("\n".join(map(str, rows)), flush=True)
    if options.write:
        about = f"PyTorch {torch.__version__}, curvlinops-for-pytorch, {options.threads} threads, float32; medians of {options.rounds} rounds"
        options.write.write_text("\n".join(["# Cost in gradients", "", f"`make bench` on {about}.", "", *lines, ""]))


if __name__ == "__main__":
    main()
