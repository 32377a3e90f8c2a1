"""MINRES against dense solutions and SciPy's."""

import pytest
import scipy.sparse.linalg as linalg
import torch

from curvops.solvers.cg import cg
from curvops.solvers.minres import minres
from solvers.support import Declared, Foreign, draws, relative, scipy_iterations, symmetric

INDEFINITE = torch.cat([torch.linspace(-20, -1, 20), torch.linspace(1, 60, 60)])


@pytest.mark.parametrize("columns", [1, 4])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_dense(columns, preconditioned):
    matrix, b = symmetric(INDEFINITE), draws(80, columns)
    damped = matrix + 0.25 * torch.eye(80).double()
    inverse = symmetric(1 / (INDEFINITE.abs() + 3)) if preconditioned else None  # of the same eigenvectors
    found = minres(matrix, b, damping=0.25, preconditioner=inverse, tolerance=1e-10)
    assert found.converged and (found.residual <= 1e-10).all()
    torch.testing.assert_close(found.residual, relative(damped, found.x, b), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.x, torch.linalg.solve(damped, b), rtol=0, atol=1e-8)


@pytest.mark.parametrize("steps", [1, 7, 30])
def test_the_residual_is_the_least_of_the_krylov_space(steps):
    matrix, b = symmetric(INDEFINITE), draws(80)
    basis = b[:, None] / b.norm()
    for _ in range(steps - 1):
        following = matrix @ basis[:, -1:]
        for _ in range(2):
            following = following - basis @ (basis.T @ following)
        basis = torch.cat([basis, following / following.norm()], 1)
    least = basis @ torch.linalg.lstsq(matrix @ basis, b[:, None]).solution
    torch.testing.assert_close(minres(matrix, b, max_iterations=steps).x, least[:, 0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("solver", [cg, minres])
@pytest.mark.parametrize("dtype, size", [(torch.float64, 1e-170), (torch.float32, 1e-20)])
def test_a_far_start_ends(solver, dtype, size):
    """A start of which the residual's squares are no numbers, in one column of two."""
    matrix = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=dtype))
    b = torch.ones(3, 2, dtype=dtype) * torch.tensor([size, 1.0], dtype=dtype)
    found = solver(matrix, b, x0=torch.ones(3, 2, dtype=dtype), max_iterations=5)
    assert not found.converged and "squares of the residual overflow" in found.reason


@pytest.mark.parametrize("solver", [cg, minres])
@pytest.mark.parametrize("scale, size", [(1e-12, 1e30), (1e12, 1e-35)])
def test_a_solution_that_the_precision_does_not_hold_is_told(solver, scale, size):
    found = solver(torch.diag(torch.tensor([1.0, 2.0, 3.0])) * scale, torch.full((3,), size))
    assert not found.converged and "x has entries that torch.float32 does not hold" in found.reason


def test_what_a_preconditioner_minimises():
    direction = torch.tensor([0.8, 0.6]).double()
    weights = torch.tensor([[10.0, 3.0], [3.0, 1.0]]).double()
    found = minres(torch.outer(direction, direction), torch.tensor([0.0, 1.0]).double(), preconditioner=weights)
    assert not found.converged and "x minimises the residual in the preconditioner's norm" in found.reason


@pytest.mark.parametrize("solver", [cg, minres])
def test_nothing_to_solve(solver):
    found = solver(torch.zeros(0, 0), torch.zeros(0, 2))
    assert found.converged and found.x.shape == (0, 2)


def test_iterations_are_scipys():
    matrix, b = symmetric(INDEFINITE), draws(80)
    found = minres(matrix, b, tolerance=1e-8)
    # SciPy's tolerance is relative to the norms of the matrix and x
    x = torch.from_numpy(linalg.minres(matrix.numpy(), b.numpy(), rtol=1e-9)[0])
    reached = float(relative(matrix, x[:, None], b[:, None]))
    most = scipy_iterations(linalg.minres, matrix, b, rtol=1e-9)
    assert minres(matrix, b, tolerance=reached * 1.001).iterations <= most + 2
    assert found.converged and found.products == found.iterations + 1


def test_as_many_iterations_as_distinct_eigenvalues():
    matrix = symmetric(torch.tensor([-1.0, 2.0, 5.0]).repeat(10))
    found = minres(matrix, draws(30, 2), tolerance=1e-12)
    assert found.converged and found.iterations == 3


def test_columns_are_as_if_alone_and_leave():
    matrix, b = Foreign(symmetric(INDEFINITE)), draws(80, 3)
    b[:, 1] = torch.linalg.eigh(matrix.dense).eigenvectors[:, 3]
    found = minres(matrix, b, tolerance=1e-9)
    alone = [minres(matrix.dense, column, tolerance=1e-9) for column in b.T]
    torch.testing.assert_close(found.x, torch.stack([one.x for one in alone], 1), rtol=0, atol=1e-7)
    assert matrix.widths[0] == 3 and matrix.widths[1] == 2  # an eigenvector takes one iteration
    assert found.iterations == max(one.iterations for one in alone)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_singular_matrices_are_found_out(dtype):
    matrix, b = symmetric(torch.cat([torch.linspace(-5, 10, 60), torch.zeros(20)])).to(dtype), draws(80, 2).to(dtype)
    b[:, 1] = matrix @ b[:, 1]
    found = minres(matrix, b, tolerance=1e-4)
    assert not found.converged and "singular" in found.reason and "add damping" in found.reason
    assert found.residual[1] <= 1e-4
    least = relative(matrix, torch.linalg.pinv(matrix.double(), rtol=1e-5).to(dtype) @ b, b)[0]
    torch.testing.assert_close(found.residual[0], least, rtol=1e-3, atol=0)
    assert minres(matrix, b, damping=0.5, tolerance=1e-3).converged


def test_refusals_and_no_convergence():
    matrix, b = symmetric(INDEFINITE), draws(80)
    with pytest.raises(ValueError, match=r"minres: expected a symmetric matrix, got declared.*by lsmr"):
        minres(Declared(matrix, symmetric=False), b)
    found = minres(matrix, b, max_iterations=3)
    assert not found.converged and found.reason.startswith("no convergence in 3 iterations: increase max_iterations")
    bad = minres(matrix, b, preconditioner=-torch.eye(80).double())
    assert not bad.converged and "preconditioner is not positive definite" in bad.reason
