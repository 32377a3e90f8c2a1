"""The oracle ladder: operators = dense autograd = blocks = closed forms; the zoo has central differences."""

from functools import partial

import pytest
import torch
from conformance import close, draws, substitutions
from kronecker.cases import masked
from oracles import IMPLICIT, KRONECKER, Case, jacobian
from problems import LOSSES, PROBLEMS, WEIGHT
from torch import nn
from torch.nn.functional import one_hot

from curvops import (
    EFLinearOperator,
    EKFACLinearOperator,
    EmpiricalRisk,
    GGNLinearOperator,
    HessianLinearOperator,
    KFACLinearOperator,
)

ALL = {**PROBLEMS, **LOSSES}


@pytest.mark.parametrize("name", ALL)
def test_risk_and_operators_are_pytorchs(name):
    p = ALL[name]()
    risk = EmpiricalRisk(*p.args(2, 1, 3), **p.options)
    value = p.loss(p.model(p.X), p.y)
    close(risk.value(), value.detach(), 1e-13)
    expected = torch.autograd.grad(value, list(p.params.values()), allow_unused=True, materialize_grads=True)
    for found, slope in zip(risk.gradient(), expected, strict=True):
        torch.testing.assert_close(found, slope, rtol=0, atol=1e-12)
    whole = Case(p.model, p.loss, p.data(), p.options, p.params)
    with substitutions():
        truths = {kind: whole.truth(kind) for kind in ("Hessian", "GGN")}
    parts = Case(p.model, p.loss, p.data(2, 1, 3), p.options, p.params)
    parts.check("Hessian", truth=truths["Hessian"])
    parts.check("GGN", *(() if name.startswith("margin") else KRONECKER), truth=truths["GGN"])
    if not name.startswith("margin"):
        diagonal = parts.make("GGNDiagonal").to_dense()
        close(diagonal, torch.diag(truths["GGN"].diagonal()))


def test_empirical_fisher_with_weights_and_smoothing():
    """√ω (p − t̃ ⊙ w / ω), by hand."""
    p = LOSSES["ce_all_mean"]()
    z = p.model(p.X)
    J = jacobian([z], list(p.params.values()))
    probabilities, counts = z.detach().softmax(1), p.y != 7
    t = 0.8 * one_hot(p.y % 7, 3).double() + 0.2 / 3
    omega = t @ WEIGHT
    s = omega.sqrt()[:, None] * (probabilities - t * WEIGHT / omega[:, None])
    rows = torch.einsum("nc,ncd->nd", s, J.unflatten(0, s.shape))[counts]
    c = 1 / WEIGHT[p.y[counts]].sum()
    close(EFLinearOperator(*p.args(2, 4)).to_dense(), c * rows.T @ rows)


JOINT = partial(KFACLinearOperator, fisher_type="type-2", separate_weight_and_bias=False)


@pytest.mark.parametrize(
    "cls", [HessianLinearOperator, GGNLinearOperator, EFLinearOperator, JOINT], ids=[*IMPLICIT, "joint KFAC"]
)
@pytest.mark.parametrize("name", ["mlp", "transformer", "odd"])
def test_fewer_parameters_give_a_block(cls, name):
    p = ALL[name]()
    whole = cls(*p.args())
    dense = whole.to_dense()
    for some in (list(p.params)[::2], list(p.params)[::-1]):
        op = cls(p.model, p.loss, {n: p.params[n] for n in some}, p.data(3, 3))
        index = torch.cat([torch.arange(p.dim)[whole.domain.slice(n)] for n in some])
        close(op.to_dense(), dense[index][:, index])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_linear_regression_in_closed_form(reduction):
    """Hessian = GGN = 2 c I ⊗ X Xᵀ, with a one appended for the bias; so are KFAC and EKFAC, joint and separate."""
    X, y = draws(7, 3), draws(7, 2, seed=1)
    model, loss = nn.Linear(3, 2).double(), nn.MSELoss(reduction=reduction)
    ones = torch.cat([X, torch.ones(7, 1).double()], 1)
    c = 2 / 14 if reduction == "mean" else 2
    joint = c * torch.kron(torch.eye(2).double(), ones.T @ ones)
    order = torch.arange(8).reshape(2, 4)
    order = torch.cat([order[:, :3].flatten(), order[:, 3]])  # weights first, then biases
    expected = joint[order][:, order]
    args = model, loss, dict(model.named_parameters()), [(X[:2], y[:2]), (X[2:], y[2:])]
    for cls in (HessianLinearOperator, GGNLinearOperator):
        close(cls(*args).to_dense(), expected, 1e-13)
    for cls in (KFACLinearOperator, EKFACLinearOperator):
        together = cls(*args, fisher_type="type-2", separate_weight_and_bias=False).to_dense()
        close(together, expected, 1e-12)
        apart = expected.clone()
        apart[:6, 6:] = apart[6:, :6] = 0
        close(cls(*args, fisher_type="type-2").to_dense(), apart, 1e-12)


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("cls", [KFACLinearOperator, EKFACLinearOperator])
@pytest.mark.parametrize("name", ["mlp", "ce_all_mean", "ce_soft_all_sum", "bce_pos_weight_mean", "huber_mean"])
def test_one_datum_makes_kfac_exact(cls, name, approximation):
    p = ALL[name]()
    p.X, p.y = p.X[2:3], p.y[2:3]
    op = cls(*p.args(), fisher_type="type-2", kfac_approx=approximation)
    close(op.to_dense(), masked(GGNLinearOperator(*p.args()).to_dense(), op), 1e-9)
