"""Seconds of the tour's six matrices, ours in three ways and curvlinops' in turn, and whether they agree.

Usage: python benchmarks/tour.py [--rounds 7] [--dtype float32] [--device cpu] [--threads 2] [--at-least RATIO]
       [--write FILE]
Both libraries get the same model, loss and data, construct their operator anew each time and run
without the check for determinism. Exit status 1 if matrices disagree or the ratio is not reached.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import curvlinops
import torch
from document import Section
from torch import Tensor

from curvops import EmpiricalRisk, GGNLinearOperator
from curvops.tour.matrices import OPERATORS, make_operator
from curvops.tour.meter import measured
from curvops.tour.setups import Setup, tutorial

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-9}
SAMPLES = (1, 8, 64)
KRONECKER = {"fisher_type": "type-2", "separate_weight_and_bias": False}
PEER = {
    "Hessian": (curvlinops.HessianLinearOperator, {}),
    "Generalized Gauss-Newton": (curvlinops.GGNLinearOperator, {}),
    "Empirical Fisher": (curvlinops.EFLinearOperator, {}),
    "EKFAC": (curvlinops.EKFACLinearOperator, KRONECKER),
    "Monte-Carlo Fisher": (curvlinops.FisherMCLinearOperator, {"mc_samples": 1}),
    "KFAC": (curvlinops.KFACLinearOperator, KRONECKER),
}


def ours(title: str, setup: Setup) -> Tensor:
    """Return the matrix as the tour computes it."""
    return make_operator(title, setup, check_deterministic=False).to_dense()


def identity(setup: Setup) -> Tensor:
    """Return the identity in the setup's precision."""
    return torch.eye(setup.num_params, device=setup.device, dtype=next(iter(setup.params.values())).dtype)


def columns(title: str, setup: Setup) -> Tensor:
    """Return the matrix as the peer's tutorial computes it: the operator times the identity."""
    return make_operator(title, setup, check_deterministic=False) @ identity(setup)


def peer(title: str, setup: Setup) -> Tensor:
    """Return the peer's matrix in the same way, which is its documented one."""
    make, options = PEER[title]
    params = list(setup.params.values())
    operator = make(setup.model, setup.loss, params, setup.data, check_deterministic=False, **options)
    return (operator @ identity(setup)).detach()


def shared(setup: Setup) -> Callable[[str, Setup], Tensor]:
    """Return matrices whose operators are made of one risk."""
    risk = EmpiricalRisk(setup.model, setup.loss, setup.params, setup.data)

    def compute(title: str, setup: Setup) -> Tensor:
        make, options = OPERATORS[title]
        return make.of(risk, **options).to_dense()

    return compute


def compare_times(setup: Setup, rounds: int, section: Section) -> float:
    """Print the medians and return how many times faster all six are together, in the slowest of our ways."""
    names = ("to_dense()", "@ torch.eye", "of one risk")
    seconds: dict[tuple[str, str], list[float]] = {}
    for number in range(rounds + 1):
        ways = dict(zip((*names, "peer"), (ours, columns, shared(setup), peer), strict=True))
        for title in OPERATORS:
            for way in ways if number % 2 else reversed(ways):
                with measured(setup.device) as cost:
                    ways[way](title, setup)
                if number:  # the first round warms up
                    seconds.setdefault((title, way), []).append(cost.seconds)
    medians = {key: statistics.median(taken) for key, taken in seconds.items()}
    medians |= {("all", way): sum(medians[title, way] for title in OPERATORS) for way in (*names, "peer")}
    section.table(["matrix", *(f"{way} (ms)" for way in (*names, "peer")), *(f"peer / {way}" for way in names)])
    for title in (*OPERATORS, "all"):
        times = [medians[title, way] for way in (*names, "peer")]
        section.row(
            [title, *(f"{1e3 * taken:.1f}" for taken in times), *(f"{times[-1] / own:.1f}" for own in times[:-1])]
        )
    return min(medians["all", "peer"] / medians["all", way] for way in names)


def compare_matrices(setup: Setup, dtype: torch.dtype, section: Section) -> bool:
    """Print how far the deterministic matrices are from the peer's, and the sampled ones from the GGN."""
    agree = True
    section.table(["matrix", "relative distance", "verdict"])
    for title in OPERATORS:
        if title == "Monte-Carlo Fisher":
            continue
        found, expected = ours(title, setup), peer(title, setup)
        distance = float((found - expected).norm() / expected.norm())
        agree &= distance <= TOLERANCE[dtype]
        verdict = "ok" if distance <= TOLERANCE[dtype] else "DIFFERS"
        section.row([title, f"to the peer's {distance:.1e}", verdict])

    distances = [sampling_error(setup, samples) for samples in SAMPLES]
    # 8 times the samples, 1/√8 of the distance; a root mean square of 20 draws is good to some 20 %
    falls = all(2 < a / b < 4 for a, b in pairwise(distances))
    shown = ", ".join(f"{d:.4f}" for d in distances)
    about = f"to the GGN {shown} with {', '.join(map(str, SAMPLES))} samples"
    section.row(["Monte-Carlo Fisher", about, "ok" if falls else "DIFFERS"])
    return agree and falls


def sampling_error(setup: Setup, samples: int, seeds: int = 20) -> float:
    """Return the root mean square of a Monte-Carlo Fisher's relative distance to the GGN."""
    arguments = setup.model, setup.loss, setup.params, setup.data
    exact = GGNLinearOperator(*arguments, check_deterministic=False).to_dense()
    squares = []
    for seed in range(seeds):
        sampled = GGNLinearOperator(*arguments, mc_samples=samples, seed=seed, check_deterministic=False).to_dense()
        squares.append(float((sampled - exact).norm() / exact.norm()) ** 2)
    return statistics.mean(squares) ** 0.5


def main() -> int:
    """Run the benchmark and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--at-least", type=float, default=0.0, metavar="RATIO", help="fail if all six are not so much faster"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--write", type=Path)
    given = parser.parse_args()
    warnings.filterwarnings("ignore", module="curvlinops|backpack|einconv")
    dtype = getattr(torch, given.dtype)
    setup = tutorial(device=given.device, dtype=dtype)
    torch.set_num_threads(given.threads)
    section = Section(
        "The tour's matrices",
        f"Six dense matrices of the tutorial's CNN with {setup.num_params} parameters, ours and curvlinops' "
        f"{version('curvlinops-for-pytorch')}, each made anew, by "
        '`to_dense()` or, as in the peer\'s tutorial, by `operator @ torch.eye(D)`; "of one risk" is `to_dense()` of six '
        "operators that share one `EmpiricalRisk`, made anew too.",
        f"{given.device}, {given.dtype}, medians of {given.rounds} rounds",
    )
    agree = compare_matrices(setup, dtype, section)
    ratio = compare_times(setup, given.rounds, section)
    section.write(given.write)
    if not agree:
        print("the matrices disagree", file=sys.stderr)
    if ratio < given.at_least:
        print(f"{ratio:.1f} times faster, not {given.at_least:g}", file=sys.stderr)
    return 0 if agree and ratio >= given.at_least else 1


if __name__ == "__main__":
    sys.exit(main())
