"""Cost of products, columns and Kronecker operators, ours and curvlinops' alternating in one process, in gradients.

Usage: python benchmarks/work.py [--models cnn,mlp,residual,gpt,resnet18,training] [--rounds 9] [--threads 2]
       [--work first,columns,loop,repeated,kfac,inverse,step] [--write FILE]
`--models minilm` is a pretrained transformer, whose weights are in an environment of their own: `make bench-minilm`.
Both libraries get the same model, loss and data, and run without their checks but where a row says so. Figures are
medians; a gradient is that of the same batches in the same rounds. Exit status 1 if the median is below --at-least.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import curvlinops
import models
import torch
from document import Section
from peers_oracle import numbers
from problem import Problem, installed
from timing import WARM_UP, medians
from torch import Tensor, nn

from curvops.kronecker.operator import StateOperator

COLUMNS, PRODUCTS = 16, 40
DAMPING = 1e-3
FAR = 1e-4  # relative distance that single precision does not explain
FLOORS = {"Hessian": 2.0, "GGN": 4 / 3, "EF": 4 / 3}  # of a product whose graph is kept, in gradients
WORK = {
    **dict.fromkeys(("cnn", "mlp", "residual", "gpt"), ("first", "columns", "loop", "repeated", "kfac", "inverse")),
    "resnet18": ("first", "repeated", "inverse"),
    "minilm": ("first", "repeated", "kfac"),
    "training": ("step",),
}
SLOW = 60.0  # seconds of a row after which no further round begins


@dataclass(frozen=True)
class Row:
    """One piece of work on one model: ours and the peer's cost in gradients, and the least that it could cost."""

    model: str
    work: str
    ours: float
    peer: float | None
    floor: float | None = None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        return None if self.peer is None else self.peer / self.ours

    @property
    def cells(self) -> list[str]:
        numbers = (self.ours, self.peer, self.ratio, self.floor and self.ours / self.floor)
        return [self.model, self.work, *("—" if number is None else f"{number:.2f}" for number in numbers), self.note]


Works = dict[str, Callable[[], Any]]


def compared(
    problem: Problem, ours: Works, peer: Callable[[], Any], rounds: int, floor: float | None = None, warm_up: int = 1
) -> Iterator[Row]:
    """Both libraries and the gradient, alternating; several pieces of ours may do what one of the peer does."""
    try:
        peer()
        others, note = [peer], ""
    except Exception as error:  # what the peer cannot do is a result of this benchmark
        others, note = [], f"peer: {type(error).__name__}"
    *costs, gradient = medians(
        [*ours.values(), *others, problem.gradient], rounds, warm_up=warm_up, at_most=SLOW / 2 if others else SLOW
    )
    other = costs[-1] / gradient if others else None
    for work, cost in zip(ours, costs, strict=False):
        yield Row(problem.name, work, cost / gradient, other, floor, note)


def product_rows(problem: Problem, kind: str, work: list[str], rounds: int) -> Iterator[Row]:
    """Products with vectors and columns."""
    v, floor, few = problem.v, FLOORS[kind], max(2, rounds // 3)  # of 40 products
    if "first" in work:
        title = f"{kind}, first product of an unseen model"
        own = unseen(problem, lambda p: p.ours(kind) @ v, rounds)
        yield from compared(problem, {title: own}, unseen(problem, lambda p: p.peer(kind) @ v, rounds), rounds)
    if "columns" in work:
        V = torch.randn(problem.size, COLUMNS)
        ours = {f"{kind}, {COLUMNS} columns of a new operator": lambda: problem.ours(kind) @ V}
        yield from compared(problem, ours, lambda: problem.peer(kind) @ V, rounds, COLUMNS * floor)
    if "loop" in work and kind != "EF":

        def linearized() -> None:
            with problem.ours(kind).linearized() as operator:
                loop(operator, v)

        title = f"{kind}, {PRODUCTS} products"
        ours = {title: lambda: loop(problem.ours(kind), v), f"{title}, linearized": linearized}
        yield from compared(problem, ours, lambda: loop(problem.peer(kind), v), few, PRODUCTS * floor, warm_up=0)
    if "repeated" in work:
        peer = problem.peer(kind)
        with problem.ours(kind).linearized() as operator:
            title = f"{kind}, a product inside linearized()"
            mine = operator @ v
            for row in compared(problem, {title: lambda: operator @ v}, lambda: peer @ v, rounds, floor):
                far = FAR if kind == "Hessian" else math.inf  # the oracle of others is for one term a datum
                yield row if row.peer is None else replace(row, note=numbers(problem, kind, mine, peer @ v, far)[0])


def loop(operator: Any, v: Tensor) -> None:
    for _ in range(PRODUCTS):
        operator @ v


def unseen(problem: Problem, work: Callable[[Problem], Any], rounds: int) -> Callable[[], Any]:
    """Work on a copy of the model that was never used."""
    copies = [problem.apart() for _ in range(rounds + WARM_UP)]
    return lambda: work(copies.pop())


def kfac_rows(problem: Problem, rounds: int) -> Iterator[Row]:
    """KFAC and EKFAC of the parameters that the peer covers too."""
    terms = problem.data[0][1][0].numel()
    for kind, fisher_type in (("KFAC", "mc"), ("EKFAC", "mc"), ("EKFAC", "type-2")):
        if fisher_type == "type-2" and terms > 1:
            continue  # the peer refuses, and we take one backward pass for each term and class
        ours = {f"{kind}, {fisher_type}": partial(problem.ours, kind, fisher_type=fisher_type)}
        peer = partial(problem.peer_factors, kind, fisher_type=fisher_type)
        yield from compared(problem, ours, peer, rounds, kfac_floor(problem) if kind == "KFAC" else None)


def kfac_floor(problem: Problem) -> float:
    """KFAC with one sample: a gradient but for the weights' own, and half of the factors' squares."""
    work: list[tuple[int, int]] = []

    def count(layer: nn.Module, inputs: tuple[Tensor], out: Tensor) -> None:
        width, height = layer.weight.flatten(1).shape
        rows, passes = out.numel() // width, 1 + inputs[0].requires_grad  # no layer is before the first
        gradient = rows * width * height
        work.append((gradient * (passes + 1), gradient * passes + rows * (width**2 + height**2) // 2))

    layers = [m for m in problem.model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    problem.model(problem.data[0][0])
    for hook in hooks:
        hook.remove()
    gradient, kfac = map(sum, zip(*work, strict=True))
    return kfac / gradient


def inverse_rows(problem: Problem, rounds: int) -> Iterator[Row]:
    """A product with the inverse of a KFAC that is there."""
    kfac, peer = problem.ours("KFAC"), problem.peer_factors("KFAC")

    def ours(kind: str) -> Tensor:
        # from the state, lest the eigenvectors of the round before serve
        return StateOperator(kfac.state).inverse(DAMPING, kind) @ problem.v

    def theirs(kind: str) -> Tensor:
        how = {f"use_{kind}_damping": True}
        return curvlinops.KFACInverseLinearOperator(peer, damping=DAMPING, **how) @ problem.v

    for kind in ("exact", "heuristic"):
        title = f"KFAC.inverse, {kind} damping"
        yield from compared(problem, {title: partial(ours, kind)}, partial(theirs, kind), rounds)


def step_rows(problem: Problem, rounds: int) -> Iterator[Row]:
    """KFAC made anew while the parameters change, with the libraries' checks and without."""

    def step(make: Callable[[], Any]) -> None:
        make()
        with torch.no_grad():
            torch._foreach_mul_(list(problem.params.values()), 0.999)

    for check in (False, True):
        title = "KFAC, mc, at each step" + (", with the libraries' checks" if check else "")
        ours = {title: partial(step, partial(problem.ours, "KFAC", check))}
        if not check:
            ours["KFAC, mc, refreshed at each step"] = partial(step, problem.ours("KFAC").refresh)
        peer = partial(step, partial(problem.peer_factors, "KFAC", check))
        yield from compared(problem, ours, peer, 4 * rounds, kfac_floor(problem))


def rows(problem: Problem, work: list[str], rounds: int) -> Iterator[Row]:
    """All work on one model."""
    for kind in FLOORS:
        yield from product_rows(problem, kind, work, rounds)
    covered = replace(problem, linear=True)
    for title, make in {"kfac": kfac_rows, "inverse": inverse_rows, "step": step_rows}.items():
        if title in work:
            yield from make(covered, rounds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default=",".join(name for name in WORK if name != "minilm"))
    parser.add_argument("--work", default=",".join(dict.fromkeys(one for works in WORK.values() for one in works)))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--at-least", type=float, default=0.0, metavar="RATIO", help="fail if the median is less")
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    names, found = options.models.split(","), []
    peer = installed("curvlinops-for-pytorch")
    section = Section(
        "Products and factors" + (" of a pretrained transformer" if names == ["minilm"] else ""),
        f"Costs in gradients of the risk over the same batches, ours and curvlinops' {peer}, and how many times the floor "
        f"ours is. A floor counts an MLP's matrix products: {FLOORS['Hessian']:g} gradients for a Hessian product whose "
        f"graph is kept, {FLOORS['GGN']:.2f} for a GGN product, no less for each of several columns or products; for KFAC "
        "a gradient without the products that give the weights' gradients, and half of its factors' squares.",
        f"float32, medians of {options.rounds} rounds, fewer of 40 products and of what takes long",
    )
    section.table(["model", "work", "ours", "peer", "peer / ours", "ours / floor", ""])
    for name in names:
        torch.manual_seed(0)
        problem = Problem(name, *models.PROBLEMS[name]())
        for row in rows(problem, [work for work in WORK[name] if work in options.work.split(",")], options.rounds):
            found.append(row)
            section.row(row.cells)
    ratios = [row.ratio for row in found if row.ratio is not None]
    median, slower = statistics.median(ratios), [row for row in found if row.ratio is not None and row.ratio < 1]
    section.say(
        "", f"{len(ratios)} comparisons, median ratio {median:.2f}; in {len(slower)} of them ours takes longer."
    )
    section.write(options.write)
    return int(median < options.at_least)


if __name__ == "__main__":
    sys.exit(main())
