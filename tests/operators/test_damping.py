"""Damped and scaled operators: against dense matrices, with their structure kept."""

import copy
import pickle
from functools import partial

import pytest
import torch
from conformance import close, draws
from problems import PROBLEMS

from curvops import (
    EKFACLinearOperator,
    GGNDiagonalLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    IdentityOperator,
    InverseOperator,
    KFACLinearOperator,
    LowRankPlusDiagonalOperator,
    TensorSpace,
    block_diagonal,
)
from curvops.operators.block_diagonal import BlockDiagonalOperator

KINDS = {
    "kfac": KFACLinearOperator,
    "joint kfac": lambda *a, **k: KFACLinearOperator(*a, separate_weight_and_bias=False, **k),
    "ekfac": EKFACLinearOperator,
    "diagonal": GGNDiagonalLinearOperator,
}


@pytest.fixture(params=KINDS)
def op(request):
    p = PROBLEMS["mlp"]()
    return KINDS[request.param](*p.args(), fisher_type="type-2")


def eye(op):
    return torch.eye(op.shape[0], dtype=op.dtype)


def changed(op):
    """6 · (2 · op + 0.3 I) + 0.1 I, and densely."""
    return (6 * (2 * op).damped(0.3)).damped(0.1), 12 * op.to_dense() + 1.9 * eye(op)


def test_multiples_and_shifts_keep_the_structure(op):
    found, dense = changed(op)
    assert isinstance(found, BlockDiagonalOperator) and found.psd
    v = draws(op.shape[1], 3)
    close(found.to_dense(), dense)
    close(found @ v, dense @ v)
    close(found.trace(), dense.trace())
    close(found.diagonal(), dense.diagonal())
    close(found.frobenius_norm(), dense.norm())
    close(found.eigenvalues(), torch.linalg.eigvalsh(dense))
    close(found.logdet(0.2), torch.logdet(dense + 0.2 * eye(op)))
    close(found.inverse(0.2).to_dense(), torch.linalg.inv(dense + 0.2 * eye(op)))
    close(found.inverse().to_dense(), torch.linalg.inv(dense))
    half = found.power(0.5)
    close((half @ half).to_dense(), dense)
    values, vectors = found.eigenpairs(3)
    close(dense @ vectors, vectors * values)
    root = found.sample(4, 0.2, torch.Generator().manual_seed(0))
    noise = torch.randn(op.shape[0], 4, dtype=op.dtype, generator=torch.Generator().manual_seed(0))
    # for the same noise, samples of N(0, A⁻¹) have the length of the noise in the metric A
    close((root * ((dense + 0.2 * eye(op)) @ root)).sum(0), noise.square().sum(0))


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_heuristic_inverse_of_a_multiple_is_that_of_as_many_data(damping):
    p = PROBLEMS["mlp"]()
    mean = KFACLinearOperator(*p.args(), fisher_type="type-2")
    p.loss.reduction = "sum"
    total = KFACLinearOperator(*p.args(), fisher_type="type-2").damped(1e-2)
    found = (len(p.X) * mean).damped(1e-2)
    for kind in ("exact", "heuristic"):
        expected = total.inverse(damping, kind, min_damping=1e-3).to_dense()
        close(found.inverse(damping, kind, min_damping=1e-3).to_dense(), expected, 1e-9)


def test_the_eigenbasis_is_found_once(monkeypatch):
    import curvops.operators.blocks as blocks

    p = PROBLEMS["mlp"]()
    op = KFACLinearOperator(*p.args(), fisher_type="type-2")
    calls, eigh = [], blocks.eigh
    monkeypatch.setattr(blocks, "eigh", lambda *a: calls.append(1) or eigh(*a))
    for factor in (1.0, 6.0, 36.0):
        (factor * op).damped(0.1).logdet(1.0)
    assert len(calls) == len({id(t) for placed in op.blocks for t in placed.block.tensors.values()})


def test_damping_by_name(op):
    p = PROBLEMS["mlp"]()
    damping = {"0.weight": 0.1, "0.bias": 0.1, "2.weight": 0.3, "2.bias": 0.3}
    added = torch.cat([torch.full((t.numel(),), damping[name], dtype=op.dtype) for name, t in p.params.items()])
    for each in (op, HessianLinearOperator(*p.args())):
        found = each.damped(dict(reversed(damping.items())))
        close(found.to_dense(), each.to_dense() + added.diag())
        assert found.psd == each.psd


@pytest.mark.parametrize("make", [HessianLinearOperator, GGNLinearOperator])
def test_any_operator_is_damped(make):
    op = make(*PROBLEMS["mlp"]().args())
    found = op.damped(0.5)
    assert found.symmetric and found.psd == op.psd and found.name == f"({op.name} + 0.5 · I)"
    close(found.to_dense(), op.to_dense() + 0.5 * eye(op))
    close((op + 0.5 * IdentityOperator(op.domain)).to_dense(), found.to_dense())
    close((op - 0.5 * IdentityOperator(op.domain)).to_dense(), op.to_dense() - 0.5 * eye(op))


def test_adding_a_multiple_of_the_identity_keeps_the_structure(op):
    for found in (op + 0.5 * IdentityOperator(op.domain), 0.5 * IdentityOperator(op.domain) + op):
        assert isinstance(found, BlockDiagonalOperator)
        close(found.logdet(), torch.logdet(op.to_dense() + 0.5 * eye(op)))
    for indefinite in (op - IdentityOperator(op.domain), -op):
        assert isinstance(indefinite, BlockDiagonalOperator) == op.is_diagonal and not indefinite.psd
    close((-op).to_dense(), -op.to_dense())
    close((0 * op).to_dense(), torch.zeros(op.shape, dtype=op.dtype))
    assert (0 * op).logdet() == -torch.inf


@pytest.mark.parametrize("number", [1e-3, 1, torch.tensor(0.5)])
def test_numbers_are_not_added(op, number):
    for call in (lambda: op + number, lambda: number + op):
        with pytest.raises(TypeError, match=r"op\.damped\("):
            call()


def test_what_is_no_damping(op):
    for damping, error, message in (
        (-1.0, ValueError, r"expected a number ≥ 0, got -1\.0"),
        (float("nan"), ValueError, "expected a number ≥ 0, got nan"),
        ("1", TypeError, "expected a number ≥ 0 or a tensor with one, got '1'"),
        (torch.ones(2), TypeError, "expected a number ≥ 0"),
        ({"0.weight": 1.0}, ValueError, "missing: '0.bias', '2.weight', '2.bias'"),
        (torch.tensor(1.0, requires_grad=True), TypeError, r"a number without a gradient.*logdet"),
    ):
        with pytest.raises(error, match=message):
            op.damped(damping)
    square = block_diagonal({"a": torch.eye(2)})
    with pytest.raises(ValueError, match="expected a square operator"):
        HessianLinearOperator(*PROBLEMS["mlp"]().args())["0.bias", "2.*"].damped(1.0)
    assert square.damped(0.0).logdet() == 0


@pytest.mark.parametrize("zero", [False, True])
def test_what_would_lose_the_gradient_of_a_damping(op, zero):
    ggn = GGNLinearOperator(*PROBLEMS["mlp"]().args())
    low = LowRankPlusDiagonalOperator(draws(op.shape[0], 2), draws(op.shape[0]).abs() + 1, space=op.domain)
    tau = torch.tensor(float(not zero), dtype=torch.float64, requires_grad=True)
    each = dict.fromkeys(op.domain.names, tau)
    v = draws(op.shape[0])
    calls = [one.inverse for one in (op, ggn, low)] + [one.damped for one in (op, ggn, low)]
    calls += [partial(one.solve, v) for one in (op, ggn, low)]
    calls += [partial(op.power, -1.0), partial(op.sample, 3), lambda damping: InverseOperator(ggn, damping=tau)]
    for call in calls:
        for damping in (tau, each):
            with pytest.raises(TypeError, match=r"a number without a gradient, got .* pass damping\.detach\(\)\."):
                call(damping)


def test_logdet_that_is_differentiable_in_one_damping_only():
    ggn = GGNLinearOperator(*PROBLEMS["mlp"]().args())
    tau = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    with pytest.raises(
        TypeError, match=r"differentiable in one damping only\. Pass one tensor for all parameters, or numbers"
    ):
        ggn.logdet(dict.fromkeys(ggn.domain.names, tau))
    found = ggn.logdet(dict.fromkeys(ggn.domain.names, tau.detach()))
    close(found, ggn.logdet(tau).detach())
    assert ggn.logdet(tau).requires_grad


def test_logdet_is_differentiable_in_the_damping(op):
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    for found, dense in ((op, op.to_dense()), changed(op)):
        assert torch.autograd.gradcheck(found.logdet, tau)
        (gradient,) = torch.autograd.grad(found.logdet(tau), tau, create_graph=True)
        inverse = torch.linalg.inv(dense + 0.3 * eye(op))
        close(gradient.detach(), inverse.trace())
        (second,) = torch.autograd.grad(gradient, tau)
        close(second, -(inverse @ inverse).trace())
    assert torch.autograd.gradcheck(lambda t: (6 * op).logdet(t.reshape(1)), tau)


def test_logdet_is_differentiable_in_each_parameters_damping():
    op = 6 * KFACLinearOperator(*PROBLEMS["mlp"]().args(), fisher_type="type-2")
    taus = draws(len(op.domain.names)).square().requires_grad_()

    def logdet(values):
        return op.logdet(dict(zip(op.domain.names, values, strict=True)))

    assert torch.autograd.gradcheck(logdet, taus)
    joint = KFACLinearOperator(*PROBLEMS["mlp"]().args(), fisher_type="type-2", separate_weight_and_bias=False)
    layers = torch.ones(2, dtype=torch.float64, requires_grad=True)
    shared = {name: layers[0 if name.startswith("0") else 1] for name in joint.domain.names}
    with pytest.raises(ValueError, match="expected one tensor for the block"):
        joint.logdet(shared)
    a, b = layers.unbind()
    found = joint.logdet({name: a if name.startswith("0") else b for name in joint.domain.names})
    (gradient,) = torch.autograd.grad(found, layers)
    inverse = torch.linalg.inv(joint.to_dense() + eye(joint)).diagonal().split([16, 15])
    close(gradient, torch.stack([part.sum() for part in inverse]))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda op: pickle.loads(pickle.dumps(op))], ids=["copy", "pickle"])
def test_copies(op, copied):
    for each in (op.damped(0.1), (2 * op)["0.*"].damped(0.1)):
        close(copied(each).inverse().to_dense(), each.inverse().to_dense())


def test_indefinite_diagonals():
    op = IdentityOperator(TensorSpace.flat(3, torch.float64), -2.0)
    assert op.symmetric and not op.psd and op.name == "-2 · I"
    close(op.inverse().to_dense(), -0.5 * torch.eye(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="an eigenvalue is negative"):
        op.logdet()
    with pytest.raises(ValueError, match=r"the power 0\.5 does not exist"):
        op.power(0.5)
    close(op.logdet(3.0), torch.zeros((), dtype=torch.float64))
