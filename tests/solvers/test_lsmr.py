"""LSMR against dense least squares and SciPy's."""

import pytest
import scipy.sparse.linalg as linalg
import torch

from curvops.solvers.lsmr import lsmr
from solvers.support import draws

SHAPES = [(60, 30), (30, 60), (40, 40)]


@pytest.mark.parametrize("damping", [0.0, 0.5])
@pytest.mark.parametrize("shape", SHAPES)
def test_dense(shape, damping):
    matrix, b = draws(*shape), draws(shape[0], 3, seed=1)
    found = lsmr(matrix, b, damping=damping, tolerance=1e-12)
    rows = torch.cat([matrix, damping**0.5 * torch.eye(shape[1]).double()])
    expected = torch.linalg.pinv(rows) @ torch.cat([b, torch.zeros(shape[1], 3).double()])
    assert found.converged and found.products <= 6 * found.iterations + 6  # Aᵀb, and the residual at the end
    torch.testing.assert_close(found.x, expected, rtol=0, atol=1e-8)
    residual = torch.linalg.vector_norm(b - matrix @ found.x, dim=0) / torch.linalg.vector_norm(b, dim=0)
    torch.testing.assert_close(found.residual, residual, rtol=0, atol=1e-11)


@pytest.mark.parametrize("shape,damping", [((60, 30), 0.0), ((60, 30), 0.5), ((30, 60), 0.5)])
def test_iterations_are_scipys(shape, damping):
    matrix, b = draws(*shape), draws(shape[0], seed=1)
    most = linalg.lsmr(matrix.numpy(), b.numpy(), damp=damping**0.5, atol=1e-8, btol=1e-8)[2]
    found = lsmr(matrix, b, damping=damping, tolerance=1e-8)
    assert found.converged and found.iterations <= most + 2


@pytest.mark.parametrize("steps", [1, 6])
def test_iterates_are_scipys(steps):
    matrix, b = draws(40, 25), draws(40, seed=1)
    for damping in (0.0, 0.3):
        x = linalg.lsmr(matrix.numpy(), b.numpy(), damp=damping**0.5, atol=0, btol=0, conlim=0, maxiter=steps)[0]
        found = lsmr(matrix, b, damping=damping, max_iterations=steps)
        assert not found.converged and found.reason.startswith(f"no convergence in {steps} iterations")
        torch.testing.assert_close(found.x, torch.from_numpy(x), rtol=0, atol=1e-12)


def test_columns_are_as_if_alone():
    matrix, b = draws(40, 25), draws(40, 3, seed=1)
    b[:, 1] = matrix @ draws(25, seed=2)
    found = lsmr(matrix, b, tolerance=1e-9)
    alone = [lsmr(matrix, column, tolerance=1e-9) for column in b.T]
    torch.testing.assert_close(found.x, torch.stack([one.x for one in alone], 1), rtol=0, atol=1e-9)
    assert abs(found.iterations - max(one.iterations for one in alone)) <= 1
    # rounding may cost or save a column an iteration of two products
    assert abs(found.products - sum(one.products for one in alone)) <= 2 * len(alone)


def test_as_many_iterations_as_distinct_singular_values():
    left, right = torch.linalg.qr(draws(12, 12)).Q, torch.linalg.qr(draws(9, 9, seed=1)).Q
    matrix = left[:, :9] @ torch.diag(torch.tensor([1.0, 2.0, 4.0]).repeat(3).double()) @ right
    found = lsmr(matrix, draws(12, seed=2), tolerance=1e-12)
    assert found.converged and found.iterations == 3 and "least-squares" in found.reason


def test_what_the_adjoint_takes_to_zero():
    matrix = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]).double()
    found = lsmr(matrix, torch.tensor([0.0, 0.0, 1.0]).double())
    assert found.converged and not found.x.any() and found.residual == 1
