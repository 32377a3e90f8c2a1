"""Curvature beside other libraries than curvlinops: BackPACK, NNGeometry, laplace-torch, PyHessian, hessian-eigenthings.

Usage: python benchmarks/peers.py [--models cnn,mlp] [--rounds 5] [--threads 2] [--at-least RATIO] [--write FILE]
Both sides get the same model, loss and data and alternate in one process; libraries that take one batch at a time are
compared on all data in one batch. Figures are medians, in gradients of the risk over the same batches. Where numbers
differ by more than single precision explains, the same quantity by autograd alone, in double precision, says which
side is right; KFAC's is the definition of `expand` (Eschenhagen et al. 2023), term by term. Exit status 1 if it does not speak for us.
"""

from __future__ import annotations

import argparse
import math
import resource
import statistics
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import models
import torch
from document import Section
from peers_libraries import LIBRARIES, Library, Work, ours
from peers_oracle import numbers
from problem import Problem, installed
from timing import medians

DENSE = 1000  # parameters up to which a dense matrix is asked for


@dataclass(frozen=True)
class Row:
    """One piece of work on one model by one library, beside ours."""

    model: str
    work: str
    library: str
    ours: float
    other: float
    numbers: str
    fine: bool = True

    @property
    def cells(self) -> list[str]:
        costs = (self.ours, self.other, self.other / self.ours)
        shown = ("—" if math.isnan(cost) else f"{cost:.2f}" for cost in costs)
        return [self.model, self.work, self.library, *shown, self.numbers]


def failure(error: Exception) -> str:
    """An error in a cell of a table."""
    text = str(error).split("\n")[0].replace("|", "/")
    return "fails: out of memory" if "allocate memory" in text else f"fails: {type(error).__name__}: {text[:90]}"


def compared(problem: Problem, work: str, library: Library, mine: Work, its: Work, rounds: int) -> Row:
    """Both sides and the gradient, alternating."""
    try:
        found = its()
    except Exception as error:  # what a library cannot do is a result of this benchmark
        (own, gradient), other = medians([mine, problem.gradient], rounds), float("nan")
        return Row(problem.name, work, str(library), own / gradient, other, failure(error))
    text, fine = numbers(problem, work, mine(), found)
    own, other, gradient = medians([mine, its, problem.gradient], rounds, at_most=20.0)
    return Row(problem.name, work, str(library), own / gradient, other / gradient, text, fine)


def rows_of(problem: Problem, library: Library, rounds: int, section: Section) -> list[Row]:
    """What one library can do on one problem."""
    problem = problem.joined() if library.one_batch else problem
    try:
        works = library.works(problem)
    except Exception as error:
        section.row([problem.name, "—", library, "—", "—", "—", failure(error)])
        return []
    own, rows = ours(problem), []
    for work, its in works.items():
        if "dense" in work and problem.size > DENSE:
            continue
        rows.append(compared(problem, work, library, own[work], its, rounds))
        section.row(rows[-1].cells)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", default="cnn,mlp")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", type=float, default=8.0, metavar="GIB", help="what the process may take at most")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--at-least", type=float, default=0.0, metavar="RATIO", help="fail if the median is not so much"
    )
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    # some libraries hold a Jacobian of each datum; that is then a failure, and not the machine's
    limit = int(options.memory * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    packages = dict.fromkeys(library.package for library in LIBRARIES)
    versions = ", ".join(f"{package} {installed(package)}" for package in packages)
    section = Section(
        "Other libraries",
        f"Costs in gradients, ours and theirs, and how far apart the numbers are. {versions}.",
        f"float32, medians of {options.rounds} rounds, at most {options.memory:g} GiB",
    )
    section.table(["model", "work", "library", "ours", "theirs", "theirs / ours", "numbers"])
    rows: list[Row] = []
    for name in options.models.split(","):
        torch.manual_seed(0)
        problem = Problem(name, *models.PROBLEMS[name]())
        for library in LIBRARIES:
            rows += rows_of(problem, library, options.rounds, section)
    ratios = [row.other / row.ours for row in rows if not math.isnan(row.other)]
    median = statistics.median(ratios or [math.nan])
    slower = sum(ratio < 1 for ratio in ratios)
    section.say("", f"{len(ratios)} comparisons, median ratio {median:.2f}; in {slower} of them ours takes longer.")
    section.write(options.write)
    wrong = [row for row in rows if not row.fine]
    for row in wrong:
        print(f"the oracle does not speak for us: {row.model}, {row.work}, {row.library}", file=sys.stderr)
    return int(bool(wrong) or median < options.at_least)


if __name__ == "__main__":
    sys.exit(main())
