"""The largest eigenvalues of Hessians of real size, where no dense matrix fits: values, residuals, products, minutes.

Usage: python benchmarks/top_eigenvalues.py [--models resnet18,minilm] [-k 5] [--which largest] [--tolerance 1e-3] [--threads 2]
`minilm` has its pretrained weights and needs their environment: `make .venv-models/.peer`, then `.venv-models/bin/python`.
Float32. A residual is ‖H v − λ v‖ relative to the largest |λ|.
"""

from __future__ import annotations

import argparse
import time

import models
import torch
from problem import Problem


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", default="resnet18")
    parser.add_argument("-k", type=int, default=5)
    parser.add_argument("--which", default="largest")
    parser.add_argument("--tolerance", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.models.split(","):
        torch.manual_seed(0)
        problem = Problem(name, *models.PROBLEMS[name]())
        begun = time.perf_counter()
        pairs = problem.ours("Hessian").eigenpairs(options.k, options.which, tolerance=options.tolerance)
        minutes = (time.perf_counter() - begun) / 60
        values = ", ".join(f"{value:.4g}" for value in pairs.values)
        worst = float(pairs.residuals.max() / pairs.values.abs().max())
        print(f"{name}, {problem.size:,} parameters: {values}")
        print(
            f"  {pairs.products} products, {minutes:.1f} minutes, largest residual {worst:.1e}, {pairs.reason}",
            flush=True,
        )


if __name__ == "__main__":
    main()
