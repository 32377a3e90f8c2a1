"""Conjugate gradients against dense solutions and SciPy's."""

import pytest
import scipy.sparse.linalg as linalg
import torch

from curvops.solvers.cg import cg
from solvers.support import Declared, Foreign, draws, relative, scipy_iterations, symmetric

SPECTRA = {
    "even": torch.linspace(1, 100, 80),
    "outliers": torch.cat([torch.logspace(0, 2, 8), torch.logspace(-3, -1, 72)]),
    "low rank": torch.cat([torch.logspace(-1, 2, 30), torch.zeros(50)]),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("columns", [1, 3, 80])
def test_dense(spectrum, columns):
    matrix, b = symmetric(SPECTRA[spectrum]), draws(80, columns)
    found = cg(matrix, b, damping=0.1, tolerance=1e-10)
    damped = matrix + 0.1 * torch.eye(80, dtype=b.dtype)
    assert found.converged and (found.residual <= 1e-10).all()
    torch.testing.assert_close(found.residual, relative(damped, found.x, b), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.x, torch.linalg.solve(damped, b), rtol=0, atol=1e-7)


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_no_more_iterations_than_scipy(spectrum, preconditioned):
    """On average over orders of the entries: each rounds in its own way, which is three iterations more or fewer."""
    matrix, b = symmetric(SPECTRA[spectrum]) + torch.eye(80).double(), draws(80)
    matrix = matrix * torch.outer(torch.logspace(0, 1, 80), torch.logspace(0, 1, 80))
    iterations, most = [], []
    for k in range(10):
        order = torch.randperm(80, generator=torch.Generator().manual_seed(k))
        A, c = matrix[order][:, order].contiguous(), b[order]
        inverse = 1 / A.diagonal()
        other = {"M": torch.diag(inverse).numpy()} if preconditioned else {}
        most.append(scipy_iterations(linalg.cg, A, c, rtol=1e-8, **other))
        found = cg(A, c, tolerance=1e-8, preconditioner=inverse if preconditioned else None)
        assert found.converged and found.products == found.iterations + 1  # and the one that gives the residual
        iterations.append(found.iterations)
    assert sum(iterations) / len(iterations) <= sum(most) / len(most) + 2


@pytest.mark.parametrize("columns", [1, 2])
def test_as_many_iterations_as_distinct_eigenvalues(columns):
    matrix = symmetric(torch.tensor([1.0, 2.0, 5.0]).repeat(10))
    found = cg(matrix, draws(30, columns), tolerance=1e-12)
    assert found.converged and found.iterations == 3


def test_a_block_searches_together():
    """Several columns give what each gives alone, for fewer products."""
    matrix, b = symmetric(SPECTRA["outliers"]), draws(80, 6)
    together = cg(matrix, b, tolerance=1e-9)
    alone = [cg(matrix, column, tolerance=1e-9) for column in b.T]
    torch.testing.assert_close(together.x, torch.stack([found.x for found in alone], 1), rtol=0, atol=1e-5)
    assert together.products < sum(found.products for found in alone) / 2


def test_dependent_columns_cost_nothing():
    matrix, b = Foreign(symmetric(SPECTRA["even"])), draws(80, 2)
    many = torch.stack([b[:, 0], b[:, 1], b[:, 0], b[:, 0] - 3 * b[:, 1], 0 * b[:, 0]], 1)
    found = cg(matrix, many, tolerance=1e-8)
    assert found.converged and max(matrix.widths[:-1]) == 2
    torch.testing.assert_close(found.x, torch.linalg.solve(matrix.dense, many), rtol=0, atol=1e-8)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_columns_of_any_size(scale):
    matrix, b = symmetric(SPECTRA["even"]), draws(80, 2) * torch.tensor([1.0, scale], dtype=torch.float64)
    found = cg(matrix, b)
    assert found.converged
    torch.testing.assert_close(
        found.x / b.abs().amax(0), torch.linalg.solve(matrix, b / b.abs().amax(0)), rtol=0, atol=1e-5
    )


def test_preconditioners():
    matrix, b = symmetric(SPECTRA["outliers"]), draws(80, 2)
    exact = cg(matrix, b, preconditioner=torch.linalg.inv(matrix), tolerance=1e-8)
    assert exact.converged and exact.iterations <= 2
    foreign = linalg.aslinearoperator(torch.linalg.inv(matrix).numpy())
    assert cg(matrix, b, preconditioner=foreign, tolerance=1e-8).iterations <= 2
    bad = cg(matrix, b, preconditioner=-torch.eye(80).double())
    assert not bad.converged and "preconditioner is not positive definite" in bad.reason


def test_indefinite_matrices_are_found_out():
    matrix = symmetric(torch.cat([torch.linspace(1, 10, 19), torch.tensor([-2.0])]))
    for columns in (1, 3):
        found = cg(matrix, draws(20, columns))
        assert not found.converged and "indefinite" in found.reason and "minres" in found.reason
    assert cg(matrix, draws(20), damping=2.5).converged


def test_singular_matrices_are_found_out():
    matrix, b = symmetric(torch.cat([torch.linspace(1, 10, 12), torch.zeros(8)])), draws(20)
    found = cg(matrix, b)
    assert not found.converged and "singular" in found.reason and "add damping" in found.reason
    assert cg(matrix, matrix @ b).converged  # where b is in the range, all is well


def test_declared_structure():
    matrix = symmetric(torch.linspace(1, 2, 5))
    with pytest.raises(ValueError, match=r"cg: expected a positive semi-definite matrix, got declared.*Use minres"):
        cg(Declared(matrix, psd=False), draws(5))
    with pytest.raises(
        ValueError,
        match=r"cg: expected a symmetric matrix, got declared, which is not\. Solve equations with such a matrix by lsmr",
    ):
        cg(Declared(matrix, symmetric=False), draws(5))
    assert cg(Declared(matrix, psd=False, symmetric=True), draws(5), damping=1.0).converged


def test_no_convergence_says_what_helps():
    matrix, b = symmetric(SPECTRA["outliers"]), draws(80)
    found = cg(matrix, b, max_iterations=5)
    assert not found.converged and found.iterations == 5 and (found.residual > 1e-6).all()
    assert found.reason.startswith("no convergence in 5 iterations: increase max_iterations, pass a preconditioner")
    torch.testing.assert_close(found.residual[0], relative(matrix, found.x[:, None], b[:, None])[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_single_and_half_precision(dtype):
    matrix, b = symmetric(torch.linspace(1, 3, 40)).to(dtype), draws(40, 2).to(dtype)
    found = cg(matrix, b, tolerance=1e-5 if dtype == torch.float32 else 2e-2)
    assert found.converged and found.x.dtype == dtype and found.residual.dtype == torch.float32
    rounded = cg(matrix, b, tolerance=1e-12)
    assert not rounded.converged and f"rounding in {dtype} keeps the residual" in rounded.reason
    assert (rounded.residual < 100 * torch.finfo(dtype).eps).all()


def test_memory():
    """Only a handful of vectors are alive at a time."""
    size, alive = 2**16, []

    class Watched(Foreign):
        def __init__(self):
            self.shape, self.dtype, self.diagonal = (size, size), torch.float64, torch.linspace(1, 50, size).double()

        def __matmul__(self, columns):
            import gc

            tensors = {
                t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for t in map(_tensor, gc.get_objects())
                if t is not None
            }
            alive.append(sum(tensors.values()))
            return self.diagonal[:, None] * columns

    assert cg(Watched(), draws(size, 4)).converged
    assert max(alive[5:]) <= alive[0] + 10 * 4 * 8 * size and alive[-2] <= alive[5]


def _tensor(thing):
    return thing if type(thing) is torch.Tensor and thing.device.type == "cpu" else None


def test_a_residual_whose_square_overflows_is_told():
    found = cg(torch.eye(3), torch.full((3,), 1e-20), x0=torch.ones(3))
    assert not found.converged and "squares of the residual overflow" in found.reason
