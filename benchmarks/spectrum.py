"""Ten eigenvalues at each end of Hessians in double precision: ours, SciPy's `eigsh`, hessian-eigenthings' Lanczos.

Usage: python benchmarks/spectrum.py [--models gpt,residual] [--rounds 3] [--tolerances 1e-4,1e-8]
Both solve with the same operator, inside its `linearized()`, alternating in one process, from random starts. SciPy goes first, with
its defaults or with a larger subspace (ncv); ours is asked for the residual that it reached. hessian-eigenthings, where
it is installed, takes one end at a time and a number of steps that is given: the least multiple of ten that reaches the
residual. Exit status 1 if an eigenvalue is farther than 1e-8 from the dense matrix's, or if ours takes more products.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from statistics import median
from typing import Any

import models
import numpy as np
import torch
from problem import LOSS, Problem
from scipy.sparse.linalg import LinearOperator, eigsh

from curvops.spectrum.lanczos import eigenpairs

ENDS, STEPS = 10, 30  # eigenvalues at each end; steps of training before
NCV = (None, 80)  # SciPy's subspaces: its default, and one that suits it better where products are cheap
FAR = 1e-8


def gpt() -> models.Made:
    """A GPT with 3,898 parameters, 16 sequences of 16 tokens in batches of 8."""
    model = models.GPT(vocabulary=10, width=16, heads=2, depth=1, length=16)
    return model, [(torch.randint(10, (8, 16)), torch.randint(10, (8, 16))) for _ in range(2)]


def residual() -> models.Made:
    """A residual CNN with 2,650 parameters, 32 images of 8 × 8 in batches of 16."""
    return models.Residual(8), [(torch.rand(16, 3, 8, 8), torch.randint(10, (16,))) for _ in range(2)]


PROBLEMS: dict[str, Callable[[], models.Made]] = {"gpt": gpt, "residual": residual}


def trained(name: str) -> Problem:
    """A problem as it is after some steps of Adam."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    model, data = PROBLEMS[name]()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(STEPS):
        X, y = data[step % len(data)]
        optimizer.zero_grad()
        LOSS(model(X), y).backward()
        optimizer.step()
    return Problem(name, model, data)


def scipys(hessian: Any, tolerance: float, ncv: int | None, seed: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """SciPy's values, vectors, and the products that it took."""
    count = 0

    def product(vector: np.ndarray) -> np.ndarray:
        nonlocal count
        count += 1
        return (hessian @ torch.from_numpy(vector.reshape(-1))).numpy()

    start = np.random.default_rng(seed).standard_normal(hessian.shape[0])
    with hessian.linearized():
        counted = LinearOperator(hessian.shape, matvec=product, dtype=np.float64)
        values, vectors = eigsh(counted, 2 * ENDS, which="BE", tol=tolerance, ncv=ncv, v0=start)
    order = values.argsort()
    return torch.from_numpy(values[order]), torch.from_numpy(vectors[:, order].copy()), count


def eigenthings(problem: Problem, dense: torch.Tensor, wanted: float, largest: float) -> None:
    """Print what hessian-eigenthings takes for a residual."""
    import hessian_eigenthings as library

    operator = library.HessianOperator(problem.model, problem.data, library.supervised_loss(LOSS))
    products, seconds = 0, 0.0
    for which in ("LA", "SA"):
        for steps in range(2 * ENDS, 300, 10):
            begun = time.perf_counter()
            found = library.lanczos(operator, k=ENDS, max_iter=steps, which=which, reorthogonalize=True, seed=0)
            taken = time.perf_counter() - begun
            vectors = found.eigenvectors if len(found.eigenvectors) == len(dense) else found.eigenvectors.T
            reached = (dense @ vectors - vectors * found.eigenvalues).norm(dim=0).max() / largest
            if reached <= wanted:
                break
        products, seconds = products + steps, seconds + taken
    print(f"{problem.name:9} eigenthings, residual {wanted:.1e}: {products} products  {seconds:.2f} s", flush=True)


def residual_of(dense: torch.Tensor, values: torch.Tensor, vectors: torch.Tensor) -> float:
    """The largest residual, relative to the largest eigenvalue."""
    return float((dense @ vectors - vectors * values).norm(dim=0).max() / values.abs().max())


def compare(name: str, tolerances: list[float], rounds: int) -> bool:
    """Print a line for each tolerance and subspace; whether all is as it should be."""
    problem = trained(name)
    hessian = problem.ours("Hessian")
    dense = torch.as_tensor(hessian.to_dense())
    exact = torch.linalg.eigvalsh(dense)
    exact, good = torch.cat([exact[:ENDS], exact[-ENDS:]]), True
    largest = float(exact.abs().max())
    for tolerance in tolerances:
        for ncv in NCV:
            seen: dict[str, list[tuple[float, int, float, float]]] = {"scipy": [], "ours": []}
            for seed in range(rounds):
                begun = time.perf_counter()
                values, vectors, count = scipys(hessian, tolerance, ncv, seed)
                seconds, reached = time.perf_counter() - begun, residual_of(dense, values, vectors)
                seen["scipy"].append((seconds, count, reached, float((values - exact).abs().max())))
                begun = time.perf_counter()
                pairs = eigenpairs(hessian, ENDS, "both", tolerance=reached, seed=seed)
                seconds, found = time.perf_counter() - begun, residual_of(dense, pairs.values, pairs.vectors)
                seen["ours"].append((seconds, pairs.products, found, float((pairs.values - exact).abs().max())))
            for who, rows in seen.items():
                seconds, count, reached, error = (median(column) for column in zip(*rows, strict=True))
                asked = f"tol {tolerance:.0e}, ncv {ncv or 'default'}" if who == "scipy" else "the same residual"
                print(
                    f"{name:9} {who:6} {asked:24} {count:5.0f} products  {seconds:7.2f} s  residual {reached:.1e}  "
                    f"error {error:.1e}",
                    flush=True,
                )
            if ncv is None and find_spec("hessian_eigenthings"):
                eigenthings(problem, dense, median(row[2] for row in seen["ours"]), largest)
            good &= median(row[1] for row in seen["ours"]) <= median(row[1] for row in seen["scipy"])
    pairs = eigenpairs(hessian, ENDS, "both")
    error = float((pairs.values - exact).abs().max())
    print(f"{name:9} ours   {'defaults':24} {pairs.products:5} products  error {error:.1e}  {pairs.reason}", flush=True)
    return good and error < FAR


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(PROBLEMS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tolerances", default="1e-4,1e-8")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tolerances = [float(text) for text in arguments.tolerances.split(",")]
    results = [compare(name, tolerances, arguments.rounds) for name in arguments.models.split(",")]
    sys.exit(not all(results))


if __name__ == "__main__":
    main()
