"""PyTorch's default device is for what the caller makes: nothing here takes it for the model's or for its own.

Its stand-in is "meta", whose tensors have no entries, so that one that is made there cannot go unseen.
"""

import pytest
import torch
from conformance import OPERATORS, draws
from problems import PROBLEMS

from curvops import JacobianLinearOperator
from curvops.clients.check import check
from curvops.kronecker.operator import StateOperator, load

SAMPLED = {"num_products": 9}
FEW = ["hessian", "ggn", "mc fisher", "ef", "difference", "inverse", "kfoc type-2", "diagonal type-2"]
FEW += ["kfac mc reduce joint", "ekfac type-2 expand joint"]


def quantities(op, v, u, path):
    yield op @ v
    yield u @ op
    yield op.to_dense()
    with op.linearized():
        yield op @ torch.stack([v, u], 1)
    yield torch.from_numpy(op.to_scipy() @ v.numpy())
    yield op.trace(**SAMPLED)
    yield op.diagonal(**SAMPLED)
    yield op.frobenius_norm(**SAMPLED)
    yield op.block_norms().squared
    yield op.trace(groups={"first": slice(0, 4)}, **SAMPLED)["first"]
    yield op.eigenpairs(2).values
    yield op.spectral_density(num_vectors=2, depth=4).density().values
    yield op.solve(v, 9.0).x
    if op.psd:
        yield op.logdet(1.0, num_products=60)
    if isinstance(op, StateOperator):
        yield op.inverse(1.0) @ v
        yield op.power(-0.5, 1.0) @ v
        yield op.refresh(seed=4) @ v
        op.save(path / "operator")
        yield load(path / "operator") @ v


def assert_same(make, asked):
    expected = list(asked(make()))
    with torch.device("meta"):
        found = list(asked(make()))
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.device.type == "cpu" and torch.equal(a, b)


@pytest.mark.parametrize("operator", FEW)
def test_operators(operator, tmp_path):
    p = PROBLEMS["mlp"]()
    args, v, u = p.args(2, 4), draws(p.dim), draws(p.dim, seed=1)
    assert_same(lambda: OPERATORS[operator](*args), lambda op: quantities(op, v, u, tmp_path))


@pytest.mark.parametrize("problem", ["transformer", "lstm"])
@pytest.mark.parametrize("operator", ["hessian", "ggn", "kfac mc reduce joint"])
def test_models(operator, problem):
    p = PROBLEMS[problem]()
    args, v = p.args(2, 4), draws(p.dim)
    assert_same(lambda: OPERATORS[operator](*args), lambda op: [op @ v])


def test_jacobians():
    p = PROBLEMS["mlp"]()
    params, data, v, u = p.params, p.data(2, 4), draws(p.dim), draws(18)
    assert_same(lambda: JacobianLinearOperator(p.model, params, data), lambda J: [J @ v, J.T @ u, J.to_dense()])


def test_the_check():
    args = PROBLEMS["mlp"]().args(2, 4)
    with torch.device("meta"):
        report = check(*args)
    assert report.ok, str(report)
