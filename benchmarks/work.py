"""Cost of products, columns and Kronecker factors, ours and curvlinops' alternating in one process, in gradients.

Usage: python benchmarks/work.py [--models cnn,mlp,residual,gpt] [--work one,repeated,columns,dense,kfac] [--rounds 9]
       [--threads 2] [--write FILE]
`--models minilm` is a pretrained transformer, whose weights are in an environment of their own: `make bench-minilm`.
Both libraries get the same model, loss and data, and run without their checks. A figure is the median over
the rounds; a gradient is that of the risk by autograd over the same batches, timed in the same rounds.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import models
import torch
from document import Section
from timing import WARM_UP, medians
from torch import Tensor, nn

import curvops

LOSS = nn.CrossEntropyLoss()
COLUMNS = 16
FAR = 1e-4  # relative distance that single precision does not explain
PRODUCTS = ("Hessian", "GGN", "EF")


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

    @property
    def cells(self) -> list[str]:
        peer = "fails" if self.peer is None else f"{self.peer:.2f}"
        return [self.model, self.work, f"{self.ours:.2f}", peer, self.ratio, self.note]


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
        return sum(len(y) for _, y in self.data)

    def ours(self, kind: str, **options: Any) -> Any:
        make = getattr(curvops, f"{kind}LinearOperator")
        return make(self.model, LOSS, self.params, self.data, check_deterministic=False, **options)

    def peer(self, kind: str, **options: Any) -> Any:
        import curvlinops  # here, since not being there is one of the ways to fail

        make, listed = getattr(curvlinops, f"{kind}LinearOperator"), list(self.params.values())
        return make(self.model, LOSS, listed, self.data, check_deterministic=False, num_data=self.num_data, **options)


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


def product_rows(problem: Problem, kind: str, work: list[str], rounds: int) -> Iterator[Row]:
    """Products with one vector and with columns, and dense matrices where they are small."""
    v, block = torch.randn(problem.size), torch.randn(problem.size, COLUMNS)
    ours, peer = problem.ours(kind), cache(lambda: problem.peer(kind))
    if "one" in work:
        yield compared(
            problem, f"{kind} product, one-off", lambda: problem.ours(kind) @ v, lambda: problem.peer(kind) @ v, rounds
        )
    if "one" in work and kind == "GGN":
        own = first(problem, lambda fresh: fresh.ours(kind) @ v, rounds)
        yield compared(problem, f"{kind} product, first of a model", own, lambda: problem.peer(kind) @ v, rounds)
    if "repeated" in work:
        row = compared(problem, f"{kind} product, repeated", lambda: ours @ v, lambda: peer() @ v, rounds)
        if row.peer is not None:
            row = replace(row, note=difference(problem, kind, v, ours @ v, peer() @ v))
        yield row
    if "columns" in work and kind != "EF":
        few = max(2, rounds // 3)
        yield compared(problem, f"{kind}, {COLUMNS} columns", lambda: ours @ block, lambda: peer() @ block, few)
    if "dense" in work and problem.size < 1000:
        eye = torch.eye(problem.size)
        yield compared(
            problem, f"dense {kind}", lambda: problem.ours(kind).to_dense(), lambda: problem.peer(kind) @ eye, 3
        )


def first(problem: Problem, work: Callable[[Problem], Any], rounds: int) -> Callable[[], Any]:
    """Work on a copy of the model that nothing is known of: operators of one model share what was certified of it."""
    copies = [copy.deepcopy(problem.model) for _ in range(rounds + WARM_UP)]

    def once() -> Any:
        model = copies.pop()
        params = dict(model.named_parameters())
        return work(replace(problem, model=model, params={name: params[name] for name in problem.params}))

    return once


def difference(problem: Problem, kind: str, v: Tensor, mine: Tensor, its: Tensor) -> str:
    """How far apart two products are, and where that is far, how far off each is from the Hessian by autograd alone."""
    text = f"difference {relative(its, mine):.0e}"
    if kind != "Hessian" or relative(its, mine) < FAR:
        return text
    truth = hessian_product(problem, v).to(mine)
    return f"{text}; off the oracle: ours {relative(mine, truth):.0e}, peer's {relative(its, truth):.0e}"


def relative(a: Tensor, b: Tensor) -> float:
    """Distance relative to the second."""
    return float((a - b).norm() / b.norm())


def hessian_product(problem: Problem, v: Tensor) -> Tensor:
    """The Hessian of the mean loss times a vector, in double precision and reverse over reverse."""
    model = copy.deepcopy(problem.model).double()
    params = list(model.parameters())
    parts = [part.view_as(p) for part, p in zip(v.double().split([p.numel() for p in params]), params, strict=True)]
    total, entries = torch.zeros_like(v, dtype=torch.float64), 0
    for X, y in problem.data:
        loss = LOSS(model(X.double() if X.is_floating_point() else X), y) * y.numel()
        slopes = torch.autograd.grad(loss, params, create_graph=True)
        found = torch.autograd.grad(slopes, params, parts, materialize_grads=True)
        total += torch.cat([f.flatten() for f in found])
        entries += y.numel()
    return total / entries


def kronecker_rows(problem: Problem, rounds: int) -> Iterator[Row]:
    """KFAC and EKFAC of the parameters that the peer covers too."""
    problem = replace(problem, params=models.linear_parameters(problem.model))
    terms = problem.data[0][1][0].numel()
    few = max(3, rounds // 2)
    yield compared(
        problem,
        "KFAC, mc, first of a model",
        first(problem, lambda fresh: our_factors(fresh, "KFAC", "mc"), few),
        partial(peer_factors, problem, "KFAC", "mc", terms),
        few,
    )
    for kind, fisher_type in (("KFAC", "mc"), ("EKFAC", "mc"), ("EKFAC", "type-2")):
        if fisher_type == "type-2" and terms > 1:
            continue  # the peer refuses, and we take one backward pass for each term and class
        yield compared(
            problem,
            f"{kind}, {fisher_type}",
            partial(our_factors, problem, kind, fisher_type),
            partial(peer_factors, problem, kind, fisher_type, terms),
            few,
        )


def our_factors(problem: Problem, kind: str, fisher_type: str) -> None:
    _ = problem.ours(kind, fisher_type=fisher_type).blocks


def peer_factors(problem: Problem, kind: str, fisher_type: str, terms: int) -> None:
    operator = problem.peer(kind, fisher_type=fisher_type, num_per_example_loss_terms=terms)
    operator.compute_kronecker_factors()
    if kind == "EKFAC":
        operator.compute_eigenvalue_correction()


def installed(package: str) -> str:
    """A package's version."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default=",".join(name for name in models.PROBLEMS if name != "minilm"))
    parser.add_argument("--work", default="one,repeated,columns,dense,kfac")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    work = options.work.split(",")
    names = options.models.split(",")
    section = Section(
        "Products and factors" + (" of a pretrained transformer" if names == ["minilm"] else ""),
        f"Costs in gradients of the risk over the same batches, ours and curvlinops' {installed('curvlinops-for-pytorch')}.",
        f"float32, medians of {options.rounds} rounds, fewer for columns, dense matrices and factors",
    )
    section.table(["model", "work", "ours", "peer", "peer / ours", ""])
    for name in names:
        torch.manual_seed(0)
        model, data = models.PROBLEMS[name]()
        problem = Problem(name, model, data, dict(model.named_parameters()))
        for row in rows(problem, work, options.rounds):
            section.row(row.cells)
    section.write(options.write)


def rows(problem: Problem, work: list[str], rounds: int) -> Iterator[Row]:
    """All work on one model."""
    for kind in PRODUCTS if set(work) - {"kfac"} else ():
        yield from product_rows(problem, kind, work, rounds)
    if "kfac" in work:
        yield from kronecker_rows(problem, rounds)


if __name__ == "__main__":
    main()
