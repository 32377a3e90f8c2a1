"""Sums, multiples and products of operators, their derivatives in the vector, and what they refuse."""

import copy
import operator
import pickle
import re
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from conformance import close, draws

from curvops import DiagonalOperator, LinearOperator, TensorSpace


def space(*sizes):
    return TensorSpace({f"p{k}": torch.zeros(size, dtype=torch.float64) for k, size in enumerate(sizes)})


class Matrix(LinearOperator):
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
    assert (symmetric @ symmetric).psd and not (symmetric @ (2 * symmetric)).symmetric


NUMBERS = [2, 2.0, True, np.float64(2), np.float32(2), np.int64(2)]
TENSORS = [torch.tensor(2.0), torch.tensor([2]), np.array(2.0)]


@pytest.mark.parametrize("scalar", NUMBERS + TENSORS)
def test_scalars(symmetric, scalar):
    value = 1 if scalar is True else 2
    for scaled in (scalar * symmetric, symmetric * scalar):
        close(scaled.to_dense(), value * symmetric.dense)
    close((symmetric / scalar).to_dense(), symmetric.dense / value)


@pytest.mark.parametrize("other", ["2", None, 1j, torch.ones(2), torch.tensor(1j), [2.0], np.ones(3), np.array(1j)])
def test_no_scalars(symmetric, other):
    for operation in (operator.mul, operator.add, operator.sub):
        with pytest.raises(TypeError):
            operation(symmetric, other)
    with pytest.raises(TypeError):
        other * symmetric


class Forward(LinearOperator):
    def _apply(self, columns):
        return draws(3, 3) @ columns


def test_parts_of_one_operator_know_each_other(symmetric):
    """Equal slices are other objects of the same matrix."""
    S, A = Matrix(symmetric.dense, space(1, 2), None, psd=True), Matrix(draws(5, 5), space(2, 2, 1), None)
    for op in (S, A, 2.0 * S + S, A.T):
        names = op.domain.names
        one, two = [names[0]], names[1:]
        for product in (op[one, two].T @ op[one, two], op[two, one] @ op[two, one].T, op[two].T @ op[two]):
            assert product.psd
            close(product.to_dense(), product.to_dense().T)
        nested = op[two][two].T @ op[two]
        assert nested.psd and (op[one, two].T @ op[one] @ op[one, two]).symmetric == op.symmetric
        mirrored = op[one, two] @ op[two, one]
        assert mirrored.psd == mirrored.symmetric == (op[two] @ op[two]).psd == op.symmetric
        assert (op[one, two] @ op.T[two, one]).psd
        assert not (op[one, two].T @ Matrix(op.to_dense(), op.domain, None)[one, two]).symmetric


def test_sums_begin_at_zero(symmetric):
    total = sum([symmetric, 2 * symmetric, symmetric])
    close(total.to_dense(), 4 * symmetric.dense)
    assert sum([symmetric]) is symmetric and 0.0 + symmetric is symmetric and total.psd
    for call in (lambda: symmetric + 0, lambda: 1 + symmetric, lambda: sum([symmetric], 0.5)):
        with pytest.raises(TypeError, match="a number is no operator"):
            call()


def test_what_does_not_fit(rectangular, symmetric):
    other, nested = Matrix(symmetric.dense, space(2, 1), None), 2.5 * (symmetric + symmetric @ symmetric)
    huge = Matrix(torch.zeros(0), TensorSpace({"p": torch.zeros((), dtype=torch.float64).expand(10_000_000)}), None)
    assert nested.name == "2.5 · (Matrix + (Matrix @ Matrix))"
    for call, error, message in (
        (lambda: symmetric / 0, ZeroDivisionError, "by zero"),
        (
            lambda: rectangular + symmetric,
            ValueError,
            r"A \+ B: expected operators between the same spaces.*5 × 3.*3 × 3",
        ),
        (lambda: symmetric @ rectangular, ValueError, "A @ B: expected B to give what A takes"),
        (lambda: symmetric + other, ValueError, "between the same spaces"),
        (
            lambda: 3 @ symmetric,
            TypeError,
            "expected a tensor, an array, a list of tensors or a dict of tensors, got int",
        ),
        (lambda: nested @ draws(4), ValueError, rf"'{re.escape(nested.name)} @ v': expected 3 rows .* got 4"),
        (huge.to_dense, MemoryError, r"Matrix\.to_dense\(\): a 10000000 × 10000000 matrix takes 800,000 GB"),
        ((2 * huge + huge).to_dense, MemoryError, r"takes 800,000 GB"),
        (lambda: LinearOperator(space(1)), TypeError, "abstract"),
        (
            lambda: Forward(space(3)).T @ draws(3),
            NotImplementedError,
            "Forward: it is not symmetric, and gives no products with its",
        ),
    ):
        with pytest.raises(error, match=message):
            call()


class Counting(Matrix):
    open = 0

    @contextmanager
    def linearized(self):
        self.open += 1
        try:
            yield self
        finally:
            self.open -= 1


def test_linearized_reaches_all_parts():
    A, B = Counting(draws(3, 3), space(3), None), Counting(draws(2, 3), space(3), space(2))
    C = Matrix(draws(3, 3), space(3), None)
    op = (B @ (2 * A - C)).T
    with op.linearized() as same:
        assert same is op and A.open == B.open == 1
        with (A + A).linearized():
            assert A.open == 3
    with pytest.raises(KeyError), op.linearized():
        raise KeyError
    assert A.open == B.open == 0
    with C.linearized() as same:
        assert same is C


def combined(rectangular, symmetric):
    A, S = rectangular.dense, symmetric.dense
    op = (2 * rectangular - rectangular @ symmetric) @ (rectangular.T @ rectangular + symmetric / 3)
    return op, (2 * A - A @ S) @ (A.T @ A + S / 3)


def test_products_are_differentiable_in_the_vector(rectangular, symmetric):
    op, dense = combined(rectangular, symmetric)
    for of, matrix in ((op, dense), (op.T, dense.T), (symmetric, symmetric.dense)):
        for columns in (None, 2):
            v, w = draws(of.shape[1], columns).requires_grad_(), draws(of.shape[0], columns, seed=1)
            (w * (of @ v)).sum().backward()
            close(v.grad, matrix.T @ w)
            assert torch.autograd.gradcheck(lambda u, of=of: of @ u, v)
            assert torch.autograd.gradgradcheck(lambda u, of=of: of @ u.sin(), v)
    v = draws(5).requires_grad_()
    (gradient,) = torch.autograd.grad((v @ op * draws(3)).sum(), v)
    close(gradient, dense @ draws(3))
    v = draws(3).requires_grad_()
    (gradient,) = torch.autograd.grad(v @ (symmetric @ v), v, create_graph=True)
    close(gradient.detach(), 2 * symmetric.dense @ v.detach())
    (again,) = torch.autograd.grad(gradient @ draws(3), v)
    close(again, 2 * symmetric.dense @ draws(3))


@pytest.mark.parametrize("make", [list, tuple, lambda tensors: dict(zip(("p0", "p1"), tensors, strict=True))])
@pytest.mark.parametrize("needed", [(True, True), (False, True)])
def test_derivatives_in_all_formats(rectangular, make, needed):
    tensors = [t.clone().requires_grad_(n) for t, n in zip(draws(3).split([1, 2]), needed, strict=True)]
    found = rectangular @ make(tensors)
    parts = list(found.values()) if isinstance(found, dict) else list(found)
    w = draws(5, seed=1)
    (w[:2] @ parts[0] + w[2:] @ parts[1]).backward()
    expected = (rectangular.dense.T @ w).split([1, 2])
    for tensor, gradient, need in zip(tensors, expected, needed, strict=True):
        assert (tensor.grad is not None) == need
        if need:
            close(tensor.grad, gradient)


def test_a_backward_pass_after_a_change_is_an_error(symmetric):
    symmetric._leaves = lambda: [symmetric.dense]
    v = draws(3).requires_grad_()
    found = ((2 * symmetric + symmetric) @ v).sum()
    found.backward(retain_graph=True)
    symmetric.dense.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.backward()


def dual(product, v):
    with torch.autograd.forward_ad.dual_level():
        return product(torch.autograd.forward_ad.make_dual(v, v))


TRANSFORMS = {
    "vmap": lambda product, v: torch.func.vmap(product)(v.expand(2, -1)),
    "grad": lambda product, v: torch.func.grad(lambda u: product(u).sum())(v),
    "jvp": lambda product, v: torch.func.jvp(product, (v,), (v,)),
    "jacfwd": lambda product, v: torch.func.jacfwd(product)(v),
    "functionalize": lambda product, v: torch.func.functionalize(product)(v),
    "vectorized": lambda product, v: torch.autograd.functional.jacobian(product, v, vectorize=True),
    "forward mode": dual,
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_are_told_what_to_do_instead(rectangular, transform):
    with pytest.raises(TypeError, match=r"@ v': expected a plain tensor, got one inside .* \[D, K\].*linearized"):
        TRANSFORMS[transform](lambda v: rectangular @ v, draws(3))
    if transform not in ("functionalize", "vectorized"):
        with pytest.raises(TypeError, match="got one inside a transform"):
            TRANSFORMS[transform](lambda v: (rectangular @ list(v.split([1, 2])))[0], draws(3))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda op: pickle.loads(pickle.dumps(op))], ids=["copy", "pickle"])
def test_copies(rectangular, symmetric, copied):
    op, dense = combined(rectangular, symmetric)
    for each, matrix in ((op, dense), (op.T, dense.T), (symmetric, symmetric.dense)):
        found = copied(each)
        assert found is not each and (found.name, found.shape, found.psd) == (each.name, each.shape, each.psd)
        assert (found.domain, found.codomain) == (each.domain, each.codomain)
        close(found.to_dense(), matrix)
    found = copied(rectangular)
    found.dense.zero_()
    assert rectangular.dense.any()


def test_a_multiple_has_no_gradient(symmetric):
    with pytest.raises(TypeError, match=r"Take s \* \(A @ v\)"):
        symmetric * torch.tensor(2.0, requires_grad=True)


def test_scipy_views_of_whole_numbers_are_refused():
    op = DiagonalOperator(torch.tensor([0.3, 0.7], dtype=torch.float64))
    for kind in (int, bool, "uint8"):
        with pytest.raises(TypeError, match="to_scipy: expected a floating-point or complex dtype, got"):
            op.to_scipy(kind)
    assert abs(op.to_scipy("float32") @ [1.0, 1.0] - [0.3, 0.7]).max() < 1e-7
