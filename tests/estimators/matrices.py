"""Symmetric matrices with spectra built by hand, and one of a small net."""

import torch
from problems import PROBLEMS

from curvops import HessianLinearOperator

D = 60
SPECTRA = {
    "flat": torch.linspace(1, 3, D, dtype=torch.float64),
    "harmonic": 1 / torch.arange(1, D + 1, dtype=torch.float64),
    "geometric": 0.7 ** torch.arange(D, dtype=torch.float64),
    "indefinite": torch.linspace(-1, 2, D, dtype=torch.float64) ** 3,
}
GROUPS = {"first": slice(0, 10), "second": slice(10, 35), "third": torch.arange(35, 60)}


def with_spectrum(spectrum: torch.Tensor, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(len(spectrum), len(spectrum), dtype=torch.float64, generator=generator)
    basis = torch.linalg.qr(random).Q
    return (basis * spectrum) @ basis.T


def low_rank(size: int, rank: int) -> torch.Tensor:
    return with_spectrum(torch.cat([torch.linspace(1, 5, rank), torch.zeros(size - rank)]).double())


def block(matrix: torch.Tensor, rows) -> torch.Tensor:
    return matrix[rows][:, rows]


def hessian() -> tuple[HessianLinearOperator, torch.Tensor]:
    operator = HessianLinearOperator(*PROBLEMS["mlp"]().args())
    return operator, operator.to_dense()
