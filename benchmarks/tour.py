"""Seconds of the tour's six matrices, ours and curvlinops' alternating in one process, and whether they agree.

Usage: python benchmarks/tour.py [--rounds 7] [--dtype float32] [--device cpu] [--threads 2] [--at-least RATIO]
       [--write FILE]
Both libraries get the same model, loss and data, construct their operator anew each time and run
without the check for determinism. Exit status 1 if matrices disagree or the ratio is not reached.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import curvlinops
import torch
from document import Section
from torch import Tensor

from curvops import GGNLinearOperator
from curvops.tour.matrices import OPERATORS, make_operator
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
    return make_operator(title, setup, check_deterministic=False).to_dense().detach()


def peer(title: str, setup: Setup) -> Tensor:
    """Return the matrix in the peer's documented way: the operator times the identity."""
    make, options = PEER[title]
    params = [p for p in setup.model.parameters() if p.requires_grad]
    operator = make(setup.model, setup.loss, params, setup.data, check_deterministic=False, **options)
    return (operator @ torch.eye(setup.num_params, device=setup.device, dtype=params[0].dtype)).detach()


def timed(compute: Callable[[str, Setup], Tensor], title: str, setup: Setup) -> tuple[float, Tensor]:
    """Return seconds and matrix."""
    start = time.perf_counter()
    matrix = compute(title, setup)
    if setup.device.type == "cuda":
        torch.cuda.synchronize(setup.device)
    return time.perf_counter() - start, matrix


def compare_times(setup: Setup, rounds: int, section: Section) -> float:
    """Print the medians and return how many times faster all six are together."""
    seconds: dict[tuple[str, Callable[[str, Setup], Tensor]], list[float]] = {}
    for number in range(rounds + 1):
        for title in OPERATORS:
            for compute in (ours, peer) if number % 2 else (peer, ours):
                taken, _ = timed(compute, title, setup)
                if number:  # the first round warms up
                    seconds.setdefault((title, compute), []).append(taken)
    medians = {key: statistics.median(taken) for key, taken in seconds.items()}
    section.table(["matrix", "ours (ms)", "peer (ms)", "peer / ours"])
    for title in OPERATORS:
        section.row(cost_cells(title, medians[title, ours], medians[title, peer]))
    a, b = (sum(medians[title, compute] for title in OPERATORS) for compute in (ours, peer))
    section.row(cost_cells("all", a, b))
    return b / a


def cost_cells(title: str, own: float, other: float) -> list[str]:
    """A row of the table of times."""
    return [title, f"{1e3 * own:.1f}", f"{1e3 * other:.1f}", f"{other / own:.1f}"]


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
        f"{version('curvlinops-for-pytorch')}, each made anew.",
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
