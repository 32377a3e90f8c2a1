"""What curvature costs as things grow: data, parameters, classes, columns, sequence length.

Usage: python benchmarks/growth.py [--only data,classes] [--rounds 3] [--threads 2] [--write DIR]
Every figure is that of a fresh operator, which is made without its checks. A gradient is that of the risk over the same batches. Peak memory is the process' high-water mark above the start.
`--write` puts the tables into the benchmarks' page in DIR, and the figure beside it.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import models
import torch
from document import Section, page
from problem import Problem
from timing import medians
from torch import Tensor, nn

from curvops.tour.meter import measured

MIB = 2**20
AT_MOST = 4.0  # seconds of timing for one size, beyond its first round
FIGURE = "benchmarks_growth.png"


Works = dict[str, Callable[[], Any]]


def product(problem: Problem, kind: str) -> Tensor:
    return problem.ours(kind) @ problem.v


def products_and_kfac(model: nn.Module, data: models.Data) -> tuple[Problem, Works]:
    problem = Problem("", model, data)
    products = {f"{kind} product": partial(product, problem, kind) for kind in ("Hessian", "GGN")}
    return problem, {**products, "KFAC-mc": partial(problem.ours, "KFAC", fisher_type="mc")}


@dataclass
class Growth:
    """Measurements at several sizes: seconds and MiB of each work, and a gradient's seconds."""

    axis: str
    each: str = ""  # what one of them is called, where the growth is meant to be linear
    sizes: list[int] = field(default_factory=list)
    gradient: list[float] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    mib: dict[str, list[float]] = field(default_factory=dict)

    def measure(self, size: int, problem: Problem, works: Works, rounds: int) -> None:
        self.sizes.append(size)
        for name, work in works.items():  # warms up as well
            with measured(torch.device("cpu")) as cost:
                work()
            peak = float("nan") if cost.peak_bytes is None else cost.peak_bytes / MIB
            self.mib.setdefault(name, []).append(peak)
        problem.gradient()
        gradient, *taken = medians([problem.gradient, *works.values()], rounds, warm_up=0, at_most=AT_MOST)
        self.gradient.append(gradient)
        for name, value in zip(works, taken, strict=True):
            self.seconds.setdefault(name, []).append(value)

    def header(self, works: Works) -> list[str]:
        cells = [self.axis, "gradient (ms)"]
        for name in works:
            cells += [f"{name} (ms)", "(gradients)", "(MiB)"]
        return cells

    def last_row(self) -> list[str]:
        cells = [f"{self.sizes[-1]:,}", f"{1e3 * self.gradient[-1]:.2f}"]
        for name in self.seconds:
            seconds = self.seconds[name][-1]
            cells += [f"{1e3 * seconds:.1f}", f"{seconds / self.gradient[-1]:.2f}", f"{self.mib[name][-1]:.1f}"]
        return cells

    def remark(self) -> str:
        """How seconds and memory grow at the end, and the constant where the growth is meant to be linear."""
        before, last = self.sizes[-2:]
        texts = []
        for name, seconds in {"gradient": self.gradient, **self.seconds}.items():
            powers = [f"time {exponent(before, last, *seconds[-2:]):.2f}"]
            if name in self.mib:
                powers.append(f"memory {exponent(before, last, *self.mib[name][-2:]):.2f}")
            constant = f" ({1e6 * seconds[-1] / last:.3g} µs a {self.each})" if self.each else ""
            texts.append(f"{name}: {', '.join(powers)}{constant}")
        return f"Exponents of the growth from {before:,} to {last:,}. {'; '.join(texts)}."


def exponent(a: int, b: int, at_a: float, at_b: float) -> float:
    """The power of the size that leads from one value to the other."""
    return math.log(at_b / at_a) / math.log(b / a) if at_a > 0 and at_b > 0 else float("nan")


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def batches(inputs: int, classes: int, batch: int, times: int = 1) -> models.Data:
    """The same batch a number of times, so that the data itself takes no memory."""
    return [(torch.randn(batch, inputs), torch.randint(classes, (batch,)))] * times


def data(size: int) -> tuple[Problem, Works]:
    return products_and_kfac(mlp(64, 256, 256, 10), batches(64, 10, 100, size // 100))


def parameters(width: int) -> tuple[Problem, Works]:
    return products_and_kfac(mlp(256, width, width, 10), batches(256, 10, 128, 2))


def classes(size: int) -> tuple[Problem, Works]:
    # sixteen features, so that the head's parameters stay few beside the body's
    problem = Problem("", mlp(64, 256, 256, 16, size), batches(64, size, 64))
    return problem, {
        "GGN product": partial(product, problem, "GGN"),
        "KFAC-mc": partial(problem.ours, "KFAC", fisher_type="mc"),
        "EKFAC, type-2": partial(problem.ours, "EKFAC", fisher_type="type-2"),
        "GGN diagonal": partial(problem.ours, "GGNDiagonal", fisher_type="type-2"),
    }


def columns(size: int) -> tuple[Problem, Works]:
    problem = Problem("", mlp(256, 256, 128, 10), batches(256, 10, 128, 2))
    V = torch.randn(problem.size, size)
    return problem, {f"{kind} product": lambda kind=kind: problem.ours(kind) @ V for kind in ("Hessian", "GGN")}


def length(size: int) -> tuple[Problem, Works]:
    text = torch.randint(65, (2, 4, size))
    return products_and_kfac(models.GPT(length=size), [(text[0], text[1])])


@dataclass(frozen=True)
class Kind:
    """A kind of growth: the problem at a size, the sizes, and what the page says about it."""

    make: Callable[[int], tuple[Problem, Works]]
    sizes: tuple[int, ...]
    axis: str
    about: str
    each: str = ""


GROWTHS = {
    "data": Kind(data, (100, 1_000, 10_000, 100_000), "data", "An MLP 64-256-256-10, batches of 100.", "datum"),
    "parameters": Kind(
        parameters,
        (32, 128, 512, 2048),
        "width",
        "An MLP 256-width-width-10 with 256 data in two batches; its parameters grow as the width's square.",
    ),
    "classes": Kind(
        classes,
        (10, 30, 100, 300, 1000),
        "classes",
        "An MLP 64-256-256-16-classes, 64 data. The last layer's own factor has classes² entries.",
    ),
    "columns": Kind(
        columns,
        (1, 2, 4, 8, 16, 32, 64),
        "columns",
        "An MLP 256-256-128-10 with 256 data in two batches.",
        "column",
    ),
    "length": Kind(
        length, (16, 32, 64, 128, 256), "tokens", "A GPT of two blocks of width 64, four sequences.", "token"
    ),
}


def grow(name: str, rounds: int, section: Section) -> Growth:
    """Measure at each size, and print the table."""
    kind = GROWTHS[name]
    growth = Growth(kind.axis, kind.each)
    torch.manual_seed(0)
    _, works = kind.make(kind.sizes[0])
    for work in works.values():  # what is loaded at first use is not measured
        work()
    section.say("", f"### {name.capitalize()}", "", kind.about)
    section.table(growth.header(works))
    for size in kind.sizes:
        torch.manual_seed(0)
        problem, works = kind.make(size)
        growth.measure(size, problem, works, rounds)
        section.row(growth.last_row())
    section.say("", growth.remark())
    return growth


def draw(growths: dict[str, Growth], path: Path) -> None:
    """Seconds and peak memory over size, one column of panels for each kind of growth."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, len(growths), figsize=(3.2 * len(growths), 5.6), squeeze=False, layout="constrained")
    for (name, growth), (top, bottom) in zip(growths.items(), axes.T, strict=True):
        top.plot(growth.sizes, growth.gradient, "k--", label="gradient")
        for work, seconds in growth.seconds.items():
            top.plot(growth.sizes, seconds, "o-", markersize=3, label=work)
            bottom.plot(growth.sizes, growth.mib[work], "o-", markersize=3, label=work)
        top.set(xscale="log", yscale="log", title=name, ylabel="seconds")
        top.legend(fontsize=7)
        bottom.set(xscale="log", xlabel=growth.axis, ylabel="peak MiB", ylim=(0, None))
    for (_, growth), column in zip(growths.items(), axes.T, strict=True):
        for panel in column:
            panel.set_xticks(growth.sizes, [f"{size:g}" if size < 1e4 else f"{size:.0e}" for size in growth.sizes])
            panel.minorticks_off()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default=",".join(GROWTHS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--write", type=Path, metavar="DIR")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    begun = time.perf_counter()
    section = Section(
        "Growth",
        "Cost of a fresh operator, as things grow.",
        f"float32, medians of {options.rounds} rounds, fewer where they take more than {AT_MOST:g} s",
    )
    growths = {name: grow(name, options.rounds, section) for name in options.only.split(",")}
    if options.write:
        draw(growths, page(options.write).with_name(FIGURE))
        section.say("", f"![Seconds and peak memory over size]({FIGURE})")
        section.write(options.write)
    print(f"\n{time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
