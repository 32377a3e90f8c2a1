"""Inverses by solvers, as operators; the conformance suite has one of a damped GGN."""

import pytest
import torch
from conformance import close, draws
from operators.test_algebra import Matrix, space

from curvops.operators.inverse import InverseOperator


def operator(dense, **structure):
    rows, columns = (space(2, size - 2) for size in dense.shape)
    return Matrix(dense, columns, rows, **structure)


def spd(size=6):
    a = draws(size, size)
    return a @ a.T / size + torch.eye(size)


@pytest.mark.parametrize("solver", ["cg", "minres", "lsmr", "neumann"])
def test_symmetric(solver):
    dense = spd()
    options = {"scale": 0.2, "num_terms": 2000} if solver == "neumann" else {"tolerance": 1e-12}
    inverse = InverseOperator(operator(dense, psd=True), solver, **options)
    close(inverse.to_dense(), torch.linalg.inv(dense), 1e-9)
    assert inverse.symmetric and inverse.psd and inverse.adjoint() is inverse and "Matrix^-1" in repr(inverse)


def test_damped_and_preconditioned():
    dense = spd()
    options = {"damping": 0.5, "preconditioner": 1 / dense.diagonal(), "tolerance": 1e-12}
    inverse = InverseOperator(operator(dense, psd=True), **options)
    close(inverse @ draws(6), torch.linalg.solve(dense + 0.5 * torch.eye(6), draws(6)))


def test_rectangular_matrices_have_a_pseudo_inverse():
    dense = draws(7, 4)
    inverse = InverseOperator(operator(dense), "lsmr", tolerance=1e-13)
    assert inverse.shape == (4, 7)
    close(inverse.to_dense(), torch.linalg.pinv(dense), 1e-9)
    close(inverse.T.to_dense(), torch.linalg.pinv(dense).T, 1e-9)
    close(draws(4) @ inverse, draws(4) @ torch.linalg.pinv(dense), 1e-9)


def test_neumann_of_a_matrix_that_is_not_symmetric():
    dense, m = torch.eye(5) + 0.1 * draws(5, 5), torch.eye(5) + 0.05 * draws(5, 5, seed=7)
    inverse = InverseOperator(operator(dense), "neumann", preconditioner=m)
    close(inverse.to_dense(), torch.linalg.inv(dense), 1e-9)
    close(inverse.T.to_dense(), torch.linalg.inv(dense).T, 1e-9)
    few = InverseOperator(operator(dense), "neumann", preconditioner=m, num_terms=3)
    close(few.T.to_dense(), few.to_dense().T)
    assert not InverseOperator(operator(spd(), psd=True), "neumann", preconditioner=m).symmetric


def test_no_convergence():
    matrix, v = operator(spd(30), psd=True), draws(30)
    with pytest.raises(RuntimeError, match=r"Matrix\^-1: cg did not converge, residual .*: no convergence in 2 iter"):
        InverseOperator(matrix, max_iterations=2) @ v
    with pytest.warns(UserWarning, match=r"Matrix\^-1: cg did not converge"):
        InverseOperator(matrix, max_iterations=2, strict=False) @ v
    with pytest.raises(RuntimeError, match="diverges"):
        InverseOperator(matrix, "neumann", scale=10.0) @ v
    assert (InverseOperator(matrix, "neumann", scale=0.1, num_terms=2) @ v).shape == (30,)  # truncated, as asked


def test_refusals():
    matrix = operator(spd())
    with pytest.raises(ValueError, match="solver: expected one of 'cg', 'minres', 'lsmr', 'neumann', got 'gmres'"):
        InverseOperator(matrix, "gmres")
    with pytest.raises(TypeError, match="cg: unknown options num_terms"):
        InverseOperator(matrix, num_terms=3)
    with pytest.raises(ValueError, match="cg: expected a symmetric matrix, got Matrix"):
        InverseOperator(matrix) @ draws(6)
