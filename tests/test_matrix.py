"""Products with anybody's matrices."""

import numpy as np
import pytest
import scipy.sparse.linalg as linalg
import torch

from curvops import estimators, spectrum
from curvops.matrix import Matrix, Products, normal, seeded, signs

DENSE = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["tensor", "numpy", "scipy", "bare"])
def test_products_are_counted_and_right(kind):
    class Bare:
        shape, dtype = DENSE.shape, DENSE.dtype

        def __matmul__(self, columns):
            return DENSE @ columns

        @property
        def T(self):
            bare = Bare()
            bare.__class__ = type("Adjoint", (), {"__matmul__": lambda _, columns: DENSE.T @ columns})
            return bare

    matrix = {
        "tensor": DENSE,
        "numpy": DENSE.numpy(),
        "scipy": linalg.aslinearoperator(DENSE.numpy()),
        "bare": Bare(),
    }[kind]
    assert isinstance(matrix, Matrix)
    columns = torch.ones(3, 2, dtype=torch.float64)
    with Products(matrix, "test", square=False) as products:
        torch.testing.assert_close(products(columns), DENSE @ columns)
        torch.testing.assert_close(products.adjoint(DENSE), DENSE.T @ DENSE)
    assert products.count == 5 and products.dtype == torch.float64 and products.shape == (4, 3)


def test_what_is_no_such_matrix_is_refused():
    with pytest.raises(TypeError, match=r"test: expected a matrix with 'shape' and '@', got int"):
        Products(3, "test")
    with pytest.raises(ValueError, match=r"test: expected a square matrix, got shape \(4, 3\)"):
        Products(DENSE, "test")
    with pytest.raises(TypeError, match=r"real floating-point matrix, got torch.int64"):
        Products(torch.ones(3, 3, dtype=torch.int64), "test")
    with pytest.raises(TypeError, match=r"real floating-point matrix, got torch.complex128"):
        Products(np.eye(3, dtype=complex), "test")
    products = Products(torch.eye(3), "test")
    with pytest.raises(ValueError, match=r"expected shape \(3,\) or \(3, K\), got \(4,\)"):
        products.given(torch.ones(4))
    with pytest.raises(TypeError, match=r"expected torch.float32 on cpu, got torch.float64"):
        products.given(torch.ones(3, dtype=torch.float64))
    with pytest.raises(TypeError, match="expected a tensor, got list"):
        products.given([torch.ones(3)])


def test_random_numbers_are_reproducible_and_leave_the_global_state_alone():
    before = torch.get_rng_state()
    products = Products(torch.eye(3), "test")
    a, b = (normal((3, 2), seeded(1), products) for _ in range(2))
    assert torch.equal(a, b) and a.dtype == torch.float32
    assert signs((100,), seeded(0), products).unique().tolist() == [-1, 1]
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(TypeError, match=r"seed: expected an integer, got 1.5"):
        seeded(1.5)


class Silent:
    """A matrix that says no dtype, or gives the same memory for each product."""

    def __init__(self, dense, **more):
        self.dense, self.shape, self.memory = dense, dense.shape, torch.empty_like(dense)
        vars(self).update(more)

    def __matmul__(self, columns):
        return torch.matmul(self.dense, columns, out=self.memory[:, : columns.shape[1]])


def test_a_matrix_without_a_dtype_is_told_so():
    dense = DENSE.T @ DENSE
    with pytest.raises(TypeError, match=r"got torch.float64 on cpu\. Silent says no dtype: give it a `dtype`\."):
        Products(Silent(dense), "test").given(torch.ones(3, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"expected a dense vector, got one of layout torch\.sparse_coo"):
        Products(dense, "test").given(torch.ones(3, dtype=torch.float64).to_sparse())


def test_products_that_share_memory():
    dense = torch.randn(300, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    dense = dense + dense.T
    matrix = Silent(dense, dtype=dense.dtype)
    expected = torch.linalg.eigvalsh(dense)
    torch.testing.assert_close(spectrum.eigenpairs(matrix, 300).values, expected)
    torch.testing.assert_close(
        estimators.trace_function(matrix, torch.exp, num_products=300) + 0.0, expected.exp().sum()
    )
    for each in (dense, matrix):
        found = estimators.trace(each, num_products=240, method="hutch++")
        torch.testing.assert_close(found + 0.0, estimators.trace(dense, num_products=240, method="hutch++") + 0.0)
