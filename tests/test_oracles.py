"""The oracle ladder: operators = dense autograd = blocks = closed forms; the zoo has central differences."""

from contextlib import nullcontext

import pytest
import torch
from conformance import close, draws, substitutions
from kronecker.cases import masked
from problems import LOSSES, PROBLEMS, WEIGHT
from torch import nn
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call
from torch.nn.functional import one_hot

from curvops import (
    EFLinearOperator,
    EKFACLinearOperator,
    EmpiricalRisk,
    GGNLinearOperator,
    HessianLinearOperator,
    KFACLinearOperator,
)

ALL = {**PROBLEMS, **{name: LOSSES[name] for name in ("ce_all_mean", "ce_soft_all_mean", "bce_weight_sum", "mse_mean")}}
# those that PyTorch differentiates right on its own
PLAIN = ["mlp", "cnn", "ce_all_mean", "ce_soft_all_mean", "bce_weight_sum", "mse_mean"]


def flat(problem):
    params = problem.params
    start = torch.cat([p.detach().flatten() for p in params.values()])

    def named(vector):
        parts = vector.split([p.numel() for p in params.values()])
        return {n: part.reshape(p.shape) for (n, p), part in zip(params.items(), parts, strict=True)}

    return start, named


def outputs(problem, plain=False):
    start, named = flat(problem)
    with nullcontext() if plain else substitutions():
        J = jacobian(lambda vector: functional_call(problem.model, named(vector), (problem.X,)), start)
    return problem.model(problem.X).detach(), J.flatten(0, -2)


@pytest.mark.parametrize("name", [*ALL, "function_sum", "positions_mean"])
def test_risk_and_gradient_are_pytorchs(name):
    p = {**ALL, **LOSSES}[name]()
    risk = EmpiricalRisk(*p.args(2, 1, 3), **p.options)
    value = p.loss(p.model(p.X), p.y)
    close(risk.value(), value.detach(), 1e-13)
    expected = torch.autograd.grad(value, list(p.params.values()), allow_unused=True, materialize_grads=True)
    for found, slope in zip(risk.gradient(), expected, strict=True):
        torch.testing.assert_close(found, slope, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_hessian_is_autograds_on_all_data_in_one_batch(name):
    p = ALL[name]()
    start, named = flat(p)
    with substitutions():
        expected = hessian(lambda v: p.risk(named(v)), start)
    op = HessianLinearOperator(*p.args(2, 1, 3))
    close(op.to_dense(), expected)
    close(op @ draws(p.dim), expected @ draws(p.dim))


@pytest.mark.parametrize("name", ALL)
def test_ggn_is_the_contraction_of_jacobian_and_loss_hessian(name):
    p = ALL[name]()
    z, J = outputs(p, name in PLAIN)
    H = hessian(lambda z: p.loss(z, p.y), z).reshape(len(J), len(J))
    close(GGNLinearOperator(*p.args(1, 5)).to_dense(), J.T @ H @ J)


def test_empirical_fisher_with_weights_and_smoothing():
    """√ω (p − t̃ ⊙ w / ω), by hand."""
    p = LOSSES["ce_all_mean"]()
    z, J = outputs(p, plain=True)
    probabilities, counts = z.softmax(1), p.y != 7
    t = 0.8 * one_hot(p.y % 7, 3).double() + 0.2 / 3
    omega = t @ WEIGHT
    s = omega.sqrt()[:, None] * (probabilities - t * WEIGHT / omega[:, None])
    rows = torch.einsum("nc,ncd->nd", s, J.unflatten(0, s.shape))[counts]
    c = 1 / WEIGHT[p.y[counts]].sum()
    close(EFLinearOperator(*p.args(2, 4)).to_dense(), c * rows.T @ rows)


@pytest.mark.parametrize("cls", [HessianLinearOperator, GGNLinearOperator, EFLinearOperator])
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
    p = {**ALL, **LOSSES}[name]()
    p.X, p.y = p.X[2:3], p.y[2:3]
    op = cls(*p.args(), fisher_type="type-2", kfac_approx=approximation)
    close(op.to_dense(), masked(GGNLinearOperator(*p.args()).to_dense(), op), 1e-9)


@pytest.mark.parametrize("name", ["mlp", "transformer", "bce_weight_sum", "mse_mean", "ce_all_mean", "huber_mean"])
def test_monte_carlo_fishers_approach_the_ggn(name):
    """The mean squared error is variance / M: measured over independent seeds at two M that are 16 apart."""
    p = {**ALL, **LOSSES}[name]()
    ggn = GGNLinearOperator(*p.args()).to_dense()

    def errors(samples, repeats=24):
        fishers = [
            GGNLinearOperator(*p.args(), mc_samples=samples, seed=seed, check_deterministic=False).to_dense()
            for seed in range(repeats)
        ]
        mean = torch.stack(fishers).mean(0)
        squares = torch.stack([(f - ggn).square().sum() for f in fishers])
        return mean, squares.mean(), squares.std() / repeats**0.5

    mean, few, few_error = errors(4)
    _, many, many_error = errors(64)
    # unbiased: the mean over the seeds is off by no more than its own spread allows (E = few / 24)
    assert (mean - ggn).square().sum() < 5 * few / 24
    ratio, spread = few / many, (few / many) * ((few_error / few) ** 2 + (many_error / many) ** 2).sqrt()
    assert (ratio - 16).abs() < 4 * spread + 0.5
