"""Matrices of known spectrum, and what SciPy's solvers take."""

import torch


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def symmetric(values, seed=1):
    """A symmetric matrix with these eigenvalues."""
    values = torch.as_tensor(values, dtype=torch.float64)
    basis = torch.linalg.qr(draws(len(values), len(values), seed=seed)).Q
    matrix = (basis * values) @ basis.T
    return (matrix + matrix.T) / 2


def relative(matrix, x, b):
    return torch.linalg.vector_norm(b - matrix @ x, dim=0) / torch.linalg.vector_norm(b, dim=0)


def scipy_iterations(solver, matrix, b, **options):
    """Iterations that a solver of SciPy's takes for one right-hand side."""
    count = [0]

    def counted(*_):
        count[0] += 1

    solver(matrix.numpy(), b.numpy(), callback=counted, **options)
    return count[0]


class Foreign:
    """A matrix of nobody's: a shape, a dtype and products, which are recorded."""

    symmetric = psd = None

    def __init__(self, dense, name="foreign"):
        self.dense, self.shape, self.dtype, self.name, self.widths = dense, dense.shape, dense.dtype, name, []

    def __matmul__(self, columns):
        self.widths.append(columns.shape[1])
        return self.dense @ columns


class Declared(Foreign):
    def __init__(self, dense, **structure):
        super().__init__(dense, "declared")
        vars(self).update(structure)
