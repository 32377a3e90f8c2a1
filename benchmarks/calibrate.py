"""The measurements behind each rule of `curvops/products/rules.py`: both ways, forced, and which one the rule takes.

Usage: python benchmarks/calibrate.py [--only matrix_pays,rows_pay] [--rounds 5] [--threads 2]
Figures are medians, alternating, in gradients of the risk. "NO" in the last column is a choice that takes more than a
fifth longer than the other way.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import models
import torch
from document import Section
from problem import Problem
from timing import medians
from torch import Tensor, nn

from curvops import JacobianLinearOperator
from curvops.products import rules
from curvops.products.layered import layers
from curvops.products.record import Recorder

Case = tuple[str, Problem, bool, Callable[[], Any]]
PAIRS = ("Hessian", "GGN")
MANY = 64  # products that whoever opens `linearized` may want


def mlp(inputs: int, width: int, size: int, classes: int = 10) -> Problem:
    model = nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, classes))
    return Problem("linear layers", model, [(torch.rand(size, inputs), torch.randint(classes, (size,)))])


def deep(depth: int, width: int) -> Problem:
    inner = (layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.Tanh()))
    model = nn.Sequential(nn.Linear(3, width), *inner, nn.Linear(width, 2))
    return Problem(f"{depth} layers of width {width}", model, [(torch.rand(20, 3), torch.randint(2, (20,)))])


def convolutions(width: int) -> Problem:
    return Problem("convolutions", models.Residual(width), [(torch.rand(16, 3, 16, 16), torch.randint(10, (16,)))])


def norms(width: int) -> Problem:
    stages = ((nn.Conv2d(i, width, 3, padding=1), nn.GroupNorm(4, width), nn.ReLU()) for i in (3, width, width))
    model = nn.Sequential(*(layer for stage in stages for layer in stage), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Problem("group norms", nn.Sequential(model, nn.Linear(width, 10)), convolutions(4).data)


def attention(width: int) -> Problem:
    return Problem("attention", models.GPT(width=width), [(torch.randint(65, (8, 32)), torch.randint(65, (8, 32)))])


def recorded(problem: Problem) -> Recorder:
    """What a forward pass of the first batch does."""
    X, y = problem.data[0]
    with Recorder(len(y)) as record:
        record.finish(problem.model(X))
    return record


def columns_of(problem: Problem, kind: str, number: int) -> Callable[[], Tensor]:
    V = torch.randn(problem.size, number)
    return lambda: problem.ours(kind) @ V


def identity(problem: Problem, kind: str) -> Callable[[], Tensor]:
    return lambda: problem.ours(kind) @ torch.eye(problem.size)


def dense(problem: Problem, kind: str) -> Callable[[], Tensor]:
    return lambda: problem.ours(kind).to_dense()


def many(problem: Problem) -> None:
    with problem.ours("GGN").linearized() as operator:
        for _ in range(MANY):
            operator @ problem.v


def matrix_pays() -> Iterator[Case]:
    grown = [mlp(10, width, 50, 5) for width in (8, 32, 128)] + [convolutions(4)]
    for problem, share, kind in product(grown, (16, 8, 4, 2, 1), PAIRS):
        number = -(-problem.size // share)
        title = f"{kind}, 1/{share} of {problem.size:,} columns, {problem.name}"
        columns = identity(problem, kind) if share == 1 else columns_of(problem, kind, number)
        yield title, problem, rules.matrix_pays(number, problem.size), columns


def jacobian_pays() -> Iterator[Case]:
    for problem in (mlp(10, 32, 50, 5), mlp(10, 128, 50, 5), mlp(256, 64, 64, 10), convolutions(4), convolutions(16)):
        operator = JacobianLinearOperator(problem.model, problem.params, problem.data, check_deterministic=False)
        rows = operator.shape[0]
        for share in (1, 2, 4, 8, 16):
            V = torch.randn(problem.size, -(-rows // share))
            title = f"{V.shape[1]} columns, {problem.name}, {rows} rows, {problem.size:,} parameters"
            chosen = rules.jacobian_pays(V.shape[1], rows, problem.size)
            yield title, problem, chosen, partial(operator.__matmul__, V)


def together_pays() -> Iterator[Case]:
    grown = [mlp(64, width, 64) for width in (16, 64, 256, 1024, 4096)]
    grown += [*map(convolutions, (4, 8, 16, 32)), *map(norms, (8, 32)), *map(attention, (16, 32, 64, 128))]
    for problem, kind in product(grown, PAIRS):
        record = recorded(problem)
        title = f"{kind}, 16 columns, {problem.name}, {record.work:,} operations"
        chosen = rules.together_pays(16, record, kind == "GGN")
        yield title, problem, chosen, columns_of(problem, kind, 16)


def rows_pay() -> Iterator[Case]:
    sizes = ((16, 16, 32, 2), (16, 16, 32, 10), (256, 1024, 8, 2), (64, 256, 64, 10), (256, 1024, 64, 10))
    for inputs, width, size, classes in sizes:
        problem = mlp(inputs, width, size, classes)
        work, title = recorded(problem).work, f"{size} data, {classes} classes, {problem.size:,} parameters"
        for number in (4, 16, MANY):
            chosen = rules.rows_pay(number, size * classes, problem.size, size, work)
            yield f"GGN, {number} columns, {title}", problem, chosen, columns_of(problem, "GGN", number)
    one_row = [mlp(*sizes) for sizes in ((64, 64, 256), (64, 256, 64), (256, 256, 128), (256, 1024, 8))]
    for problem in (*one_row, convolutions(8), convolutions(32)):
        data, work = len(problem.data[0][1]), recorded(problem).work
        title = f"{problem.name}, {data} data, {problem.size:,} parameters"
        for number in (4, 16, MANY):
            chosen = rules.rows_pay(number, data, problem.size, data, work)
            yield f"EF, {number} columns, {title}", problem, chosen, columns_of(problem, "EF", number)
    for inputs, width, size, classes in ((10, 20, 2000, 3), (20, 40, 2000, 5), (64, 32, 1000, 10), (30, 60, 3000, 2)):
        problem = mlp(inputs, width, size, classes)
        work = recorded(problem).work
        for kind, rows in (("GGN", size * classes), ("EF", size)):
            title = f"{kind}, {{}}, {size} data, {rows} rows, {problem.size:,} parameters"
            chosen = rules.rows_pay(problem.size, rows, problem.size, size, work, True)
            yield title.format("the matrix"), problem, chosen, dense(problem, kind)
            chosen = rules.rows_pay(MANY, rows, problem.size, size, work)
            yield title.format(f"{MANY} columns"), problem, chosen, columns_of(problem, kind, MANY)


def layered() -> Iterator[Case]:
    for problem in (*(deep(*sizes) for sizes in ((60, 1), (30, 3), (12, 6))), convolutions(4)):
        sizes = {name: p.numel() for name, p in problem.params.items()}
        passes = [len(layers(sizes, columns)) for columns in (rules.LAYERED, 0)]
        title = f"dense Hessian, {problem.name}, {passes[0]} passes for {passes[1]} layers"
        yield title, problem, True, dense(problem, "Hessian")


def pulls_pay() -> Iterator[Case]:
    for problem in (mlp(16, 16, 16, 2), mlp(256, 1024, 8, 10), convolutions(4), norms(8)):
        X, y = problem.data[0]
        rows, work = len(y) * problem.model(X).shape[1], recorded(problem).work
        for number in (rows // 2, rows, 2 * rows):
            title = f"GGN, {number} columns, {problem.name}, {rows} rows, {problem.size:,} parameters"
            chosen = rules.pulls_pay(number, rows, problem.size, work)
            yield title, problem, chosen, columns_of(problem, "GGN", number)


def kept_rows_pay() -> Iterator[Case]:
    for inputs, width, size, classes in ((16, 16, 32, 2), (16, 16, 32, 10), (64, 256, 64, 10), (256, 1024, 64, 10)):
        problem = mlp(inputs, width, size, classes)
        chosen = rules.kept_rows_pay(size * classes, problem.size, recorded(problem).work)
        title = f"GGN, {MANY} products inside linearized(), {size} data, {classes} classes, {problem.size:,} parameters"
        yield title, problem, chosen, partial(many, problem)


def forward_mode_pays() -> Iterator[Case]:
    grown = [*map(convolutions, (8, 16, 32)), *map(norms, (8, 32)), *map(attention, (32, 128))]
    for problem in (*grown, mlp(256, 64, 128), mlp(256, 1024, 128)):
        title = f"GGN product, {problem.name}, {problem.size:,} parameters"
        yield title, problem, rules.forward_mode_pays(recorded(problem)), columns_of(problem, "GGN", 1)


RULES: dict[str, tuple[Callable[[], Iterator[Case]], str, str, tuple[str, ...]]] = {
    # the cases, both ways, and the rules that would not let it come to this one
    "matrix_pays": (matrix_pays, "dense matrix", "columns", ()),
    "together_pays": (together_pays, "together", "one by one", ("matrix_pays", "rows_pay")),
    "rows_pay": (rows_pay, "rows Sᵀ J", "products", ("matrix_pays",)),
    "pulls_pay": (pulls_pay, "rows by a backward pass each", "products", ("matrix_pays", "rows_pay", "together_pays")),
    "kept_rows_pay": (kept_rows_pay, "rows Sᵀ J", "graph", ()),
    "jacobian_pays": (jacobian_pays, "rows of J", "products", ()),
    "LAYERED": (layered, "small layers together", "each alone", ()),
    "forward_mode_pays": (forward_mode_pays, "forward mode", "reverse over reverse", ()),
}


def forced(work: Callable[[], Any], answers: dict[str, bool]) -> Callable[[], None]:
    """Work during which rules answer as told."""

    def done() -> None:
        before = {name: getattr(rules, name) for name in answers}
        try:
            for name, answer in answers.items():
                way = before[name]
                setattr(rules, name, (lambda *_, answer=answer: answer) if callable(way) else way * answer)
            work()
        finally:
            for name, rule in before.items():
                setattr(rules, name, rule)

    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default=",".join(RULES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    section = Section("Rules", "Both ways of each rule, in gradients.", f"float32, medians of {options.rounds} rounds")
    for rule in options.only.split(","):
        torch.manual_seed(0)
        cases, *ways, off = RULES[rule]
        way = getattr(rules, rule)
        section.say("", f"### {rule}", "", (way.__doc__ or "").split("\n")[0] if callable(way) else f"{way:,}")
        section.table(["work", *ways, "the rule takes", "right"])
        for title, problem, chosen, work in cases():
            works = [forced(work, dict.fromkeys(off, False) | {rule: answer}) for answer in (True, False)]
            *costs, gradient = medians([*works, problem.gradient], options.rounds)
            right = "yes" if costs[not chosen] <= 1.2 * min(costs) else "NO"
            section.row([title, *(f"{cost / gradient:.2f}" for cost in costs), ways[not chosen], right])


if __name__ == "__main__":
    main()
