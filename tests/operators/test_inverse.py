"""Inverses by solvers, as operators; the conformance suite has one of a damped GGN."""

import pytest
import torch
from conformance import close, draws
from operators.test_algebra import Matrix, space

from curvops import kronecker_product
from curvops.operators.block_diagonal import StructuredOperator
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


def test_every_square_operator_has_one():
    """By the solver that `solve` would take, of A + δI."""
    dense, shift, v = spd(), 0.5 * torch.eye(6), draws(6)
    indefinite, other = dense - 1.5 * torch.eye(6), torch.eye(6) + 0.1 * draws(6, 6)
    matrices = operator(dense, psd=True), operator(indefinite, symmetric=True), operator(other)
    for matrix, solver in zip(matrices, ("cg", "minres", "lsmr"), strict=True):
        for damping in (0.0, 0.5, dict.fromkeys(matrix.domain.names, 0.5)):
            inverse = matrix.inverse(damping, tolerance=1e-13)
            assert inverse.solver == solver and inverse.psd == matrix.psd and inverse.symmetric == matrix.symmetric
            expected = torch.linalg.inv(matrix.dense + (shift if damping else 0.0))
            close(inverse @ v, expected @ v, 1e-8)
            close(v @ inverse, v @ expected, 1e-8)
    close((matrices[0] + matrices[0]).inverse(1.0) @ v, torch.linalg.solve(2 * dense + 2 * shift, v), 1e-5)


def test_what_has_structure_keeps_it():
    kfac = kronecker_product(spd(2), spd(3))
    v = draws(6)
    for op in (-1 * (-kfac), 0.5 * (-2 * (-kfac))):
        assert isinstance(op.inverse(0.1), StructuredOperator)
        close(op.inverse(0.1) @ v, kfac.inverse(0.1) @ v)
    negative = (-kfac).damped(100.0)
    close(negative.inverse() @ v, torch.linalg.solve(100 * torch.eye(6) - kfac.to_dense(), v), 1e-5)


def test_what_has_no_inverse():
    matrix = operator(spd(), psd=True)
    for call, error, message in (
        (
            lambda: operator(draws(7, 4)).inverse(),
            ValueError,
            r"expected a square operator, .*InverseOperator\(op, 'lsmr'\)",
        ),
        (lambda: matrix.inverse(-1.0), ValueError, "damping: expected a number ≥ 0"),
        (lambda: matrix.inverse(1.0, solver="lu"), ValueError, "solver: expected one of"),
        (lambda: matrix.inverse(1.0, kind="exact"), TypeError, "cg: unknown options kind"),
        (
            lambda: operator(draws(6, 6)).inverse(1.0, solver="cg") @ draws(6),
            ValueError,
            "cg: expected a symmetric matrix",
        ),
        (lambda: (-matrix).inverse(solver="cg") @ draws(6), ValueError, "expected a positive semi-definite matrix"),
        (lambda: (0 * matrix + 0 * matrix).inverse() @ draws(6), RuntimeError, "add damping"),
    ):
        with pytest.raises(error, match=message):
            call()
