"""Sums, multiples and products of operators, and what they refuse."""

import numpy as np
import pytest
import torch
from conformance import close, draws

from curvops import LinearOperator, TensorSpace


def space(*sizes):
    return TensorSpace({f"p{k}": torch.zeros(size, dtype=torch.float64) for k, size in enumerate(sizes)})


class Matrix(LinearOperator):
    """A dense matrix, not symmetric and not square."""

    def __init__(self, dense, domain, codomain, **structure):
        super().__init__(domain, codomain, **structure)
        self.dense = dense

    def _apply(self, columns):
        return self.dense @ columns

    def _apply_adjoint(self, columns):
        return self.dense.T @ columns


@pytest.fixture
def rectangular():
    return Matrix(draws(5, 3), space(1, 2), space(2, 3))


@pytest.fixture
def symmetric():
    a = draws(3, 3)
    return Matrix(a @ a.T, space(1, 2), None, psd=True)


def test_rectangular_operators(rectangular, symmetric):
    A, S = rectangular.dense, symmetric.dense
    assert rectangular.shape == (5, 3) and rectangular.T.shape == (3, 5)
    close(rectangular.to_dense(), A)
    close(rectangular.T.to_dense(), A.T)
    assert rectangular.T.T is rectangular and "Matrix.T" in repr(rectangular.T)
    close((rectangular @ symmetric).to_dense(), A @ S)
    close((rectangular @ symmetric).T.to_dense(), S @ A.T)
    close((2 * rectangular - rectangular @ symmetric).T.to_dense(), (2 * A - A @ S).T)
    close((rectangular.T @ rectangular + symmetric).to_dense(), A.T @ A + S)
    assert [t.shape[0] for t in rectangular @ list(draws(3).split([1, 2]))] == [2, 3]
    close(draws(5) @ rectangular, draws(5) @ A)
    close(draws(2, 5) @ rectangular, draws(2, 5) @ A)
    named = {"p0": draws(2), "p1": draws(3)}
    assert set(named @ rectangular) == {"p0", "p1"} and (named @ rectangular)["p1"].shape == (2,)


def test_structure_is_declared(symmetric):
    assert symmetric.psd and (symmetric + symmetric).psd and (3 * symmetric).psd and (0 * symmetric).psd
    assert (-symmetric).symmetric and not (-symmetric).psd and not (symmetric - symmetric).psd
    assert not (symmetric @ symmetric).symmetric


@pytest.mark.parametrize(
    "scalar",
    [
        2,
        2.0,
        True,
        np.float64(2),
        np.float32(2),
        np.int64(2),
        torch.tensor(2.0),
        torch.tensor([2]),
        torch.tensor(2.0, requires_grad=True),
    ],
)
def test_scalars(symmetric, scalar):
    value = 1 if scalar is True else 2
    for scaled in (scalar * symmetric, symmetric * scalar):
        close(scaled.to_dense(), value * symmetric.dense)
    close((symmetric / scalar).to_dense(), symmetric.dense / value)


@pytest.mark.parametrize("other", ["2", None, 1j, torch.ones(2), torch.tensor(1j), [2.0], np.ones(3)])
def test_no_scalars(symmetric, other):
    with pytest.raises(TypeError):
        symmetric * other
    with pytest.raises(TypeError):
        other * symmetric
    with pytest.raises(TypeError):
        symmetric + other
    with pytest.raises(TypeError):
        symmetric - other


def test_division_by_zero(symmetric):
    with pytest.raises(ZeroDivisionError):
        symmetric / 0


def test_what_does_not_fit(rectangular, symmetric):
    with pytest.raises(ValueError, match=r"A \+ B: expected operators between the same spaces.*5 × 3.*3 × 3"):
        rectangular + symmetric
    with pytest.raises(ValueError, match="A @ B: expected B to give what A takes"):
        symmetric @ rectangular
    other = Matrix(symmetric.dense, space(2, 1), None)
    with pytest.raises(ValueError, match="between the same spaces"):
        symmetric + other
    with pytest.raises(TypeError, match="expected a tensor, a list of tensors or a dict of tensors, got ndarray"):
        np.ones(3) @ symmetric


def test_nested_names_and_messages(symmetric):
    nested = 2.5 * (symmetric + symmetric @ symmetric)
    assert nested.name == "2.5 · (Matrix + (Matrix @ Matrix))"
    with pytest.raises(ValueError, match=r"'2\.5 · \(Matrix \+ \(Matrix @ Matrix\)\) @ v': expected 3 rows .* got 4"):
        nested @ draws(4)


def test_a_matrix_that_does_not_fit_into_memory():
    huge = Matrix(torch.zeros(0), TensorSpace({"p": torch.zeros((), dtype=torch.float64).expand(10_000_000)}), None)
    with pytest.raises(MemoryError, match=r"Matrix\.to_dense\(\): a 10000000 × 10000000 matrix takes 745058\.1 GiB"):
        huge.to_dense()
    with pytest.raises(MemoryError, match=r"takes 745058\.1 GiB"):
        (2 * huge + huge).to_dense()


def test_an_abstract_operator_cannot_be_made():
    with pytest.raises(TypeError, match="abstract"):
        LinearOperator(space(1))
