"""The coarse tour against the dense matrices: are the norms of blocks within the errors that they state?

Usage: python benchmarks/coarse.py [--seeds 100] [--products 8] [--threads 1] [--write DIR]
On small models whose matrices can be formed: the tutorial's CNN, and a GPT of two blocks. For each matrix, norms of all
blocks and traces are estimated for several seeds, and compared with those of the dense matrix in standard errors (z).
`--write` puts the table into the benchmarks' page in DIR.
"""

from __future__ import annotations

import argparse
import time
from itertools import accumulate, pairwise
from pathlib import Path

import models
import torch
from document import Section
from torch import Tensor, nn

from curvops import EmpiricalRisk
from curvops.estimators import BlockNorms, block_norms
from curvops.tour import OPERATORS, tutorial
from curvops.tour.coarse import MOST
from curvops.tour.groups import sizes_of

Rows = dict[str, slice]


def tutorial_cnn() -> EmpiricalRisk:
    """The tutorial's CNN with 683 parameters, 50 data."""
    return tutorial(dtype=torch.float64).risk()


def small_gpt() -> EmpiricalRisk:
    """A GPT of two blocks of width 8, 4 sequences of 6 tokens."""
    torch.manual_seed(0)
    model = models.GPT(vocabulary=9, width=8, heads=2, depth=2, length=6).double()
    data = [(torch.randint(9, (2, 6)), torch.randint(9, (2, 6))) for _ in range(2)]
    return EmpiricalRisk(model, nn.CrossEntropyLoss(), dict(model.named_parameters()), data)


def truth(matrix: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """Norms `[G, G]` of the blocks, and traces `[G]`."""
    norms = torch.stack([torch.stack([matrix[i, j].norm() for j in rows.values()]) for i in rows.values()])
    return norms, torch.stack([matrix[i, i].trace() for i in rows.values()])


def scores(found: list[BlockNorms], norms: Tensor, traces: Tensor) -> tuple[Tensor, Tensor]:
    """Differences from the truth in standard errors, where these are not zero, and relative errors of the norms."""
    z = []
    for one in found:
        for estimate, exact in ((one.norms, norms), (one.traces, traces)):
            sampled = estimate.standard_error > 0
            z.append(((estimate.as_subclass(Tensor) - exact) / estimate.standard_error)[sampled])
    off = torch.stack([(one.norms.as_subclass(Tensor) - norms) / norms for one in found])
    return torch.cat(z), off[:, norms > 0].abs()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--products", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    section = Section(
        "The coarse tour against dense matrices",
        "Norms ‖A_ij‖ of all pairs of modules and traces of their diagonal blocks, from products with random signs in one "
        "module at a time, against those of the dense matrix, over seeds. z is the difference in stated standard errors: "
        "its mean square is 1 for right errors of many samples, and 1.4 for 8 samples of a normal distribution.",
        f"{options.products} products a module, {options.seeds} seeds, double precision",
    )
    header = (
        "model",
        "matrix",
        "modules",
        "products",
        "mean z²",
        "beyond 2",
        "largest z",
        "norms off by",
        "seconds",
        "dense",
    )
    section.table(header)
    for make in (tutorial_cnn, small_gpt):
        risk = make()
        groups = sizes_of("modules", risk.space.dim, risk.space.shapes, most=MOST)
        edges = accumulate(groups.values(), initial=0)
        rows = {name: slice(*ends) for name, ends in zip(groups, pairwise(edges), strict=True)}
        for title, (kind, how) in OPERATORS.items():
            operator = kind.of(risk, **how)
            operator @ torch.ones(risk.space.dim, dtype=risk.space.dtype)  # the first product in all takes longer
            begin = time.perf_counter()
            first = operator.block_norms(rows, num_products=options.products)
            seconds, begin = time.perf_counter() - begin, time.perf_counter()
            matrix = operator.to_dense()
            dense, exact = time.perf_counter() - begin, truth(matrix, rows)
            cells = [f"{make.__name__}, {len(matrix):,}", title, len(rows), first.norms.products]
            if first.norms.exact:
                assert torch.allclose(first.norms.as_subclass(Tensor), exact[0])
                cells += ["exact", "", "", "0", f"{seconds:.2f}", f"{dense:.2f}"]
            else:
                further = [
                    block_norms(matrix, rows, num_products=options.products, symmetric=True, seed=seed)
                    for seed in range(1, options.seeds)
                ]
                found = [first, *further]
                z, off = scores(found, *exact)
                beyond = float((z.abs() > 2).double().mean())
                cells += [f"{float(z.square().mean()):.2f}", f"{beyond:.1%}", f"{float(z.abs().max()):.1f}"]
                cells += [f"{float(off.median()):.0%}", f"{seconds:.2f}", f"{dense:.2f}"]
            section.row(cells)
    section.write(options.write)


if __name__ == "__main__":
    main()
