"""Each way of linearizing one batch, against plain autograd."""

import pytest
import torch
from conformance import close, draws
from torch.func import hessian, jacrev

from curvops import TensorSpace
from curvops.products.layered import COLUMNS, layered_hessian, layers
from curvops.products.per_datum import pulled_rows
from curvops.products.reference import GradientLinearization, OutputLinearization

SHAPES = {"a.weight": (3, 2), "a.bias": (3,), "b.weight": (2, 3), "scale": (), "unused": (2,)}
SPACE = TensorSpace({name: torch.zeros(shape).double() for name, shape in SHAPES.items()})
THETA, X = draws(SPACE.dim), draws(4, 2, seed=1)


def named(flat):
    return dict(zip(SHAPES, SPACE.split(flat), strict=True))


def forward(params, x):
    return torch.tanh(x @ params["a.weight"].T + params["a.bias"]) @ params["b.weight"].T * params["scale"].exp()


def value(params):
    return forward(params, X).square().sin().sum()


def leaves():
    return {name: p.clone().requires_grad_() for name, p in named(THETA).items()}


def test_jacobian_products():
    J = jacrev(lambda flat: forward(named(flat), X))(THETA).flatten(0, 1)
    given = leaves()
    linear = OutputLinearization(forward(given, X), given, SPACE)
    for seed in range(2):
        v, u = draws(SPACE.dim, seed=seed), draws(8, seed=seed + 5)
        close(linear.jvp(v).flatten(), J @ v)
        close(linear.vjp(u.reshape(4, 2)), J.T @ u)


def test_hessian_products():
    given = leaves()
    linear = GradientLinearization(value(given), given, SPACE)
    dense = hessian(lambda flat: value(named(flat)))(THETA)
    close(linear.product(draws(SPACE.dim)), dense @ draws(SPACE.dim))
    close(linear.products(draws(SPACE.dim, 3).T).T, dense @ draws(SPACE.dim, 3))


@pytest.mark.parametrize("constant", [torch.zeros(4, 2).double(), torch.zeros(4, 2).double().requires_grad_()])
def test_outputs_that_do_not_depend_on_the_parameters(constant):
    given = leaves()
    linear = OutputLinearization(constant, given, SPACE)
    assert not linear.jvp(THETA).any() and not linear.vjp(torch.ones(4, 2).double()).any()
    flat = GradientLinearization(constant.sum(), given, SPACE)
    assert not flat.product(THETA).any() and not flat.products(THETA[None]).any()


def test_a_linear_risk_has_no_hessian():
    given = leaves()
    linear = GradientLinearization(given["a.bias"].sum() * 3, given, SPACE)
    assert not linear.product(THETA).any()


@pytest.mark.parametrize(
    "order", [list(SHAPES), list(SHAPES)[::-1], ["b.weight", "a.bias", "scale", "unused", "a.weight"]]
)
def test_the_layered_hessian_in_any_order(order):
    params = {name: named(THETA)[name] for name in order}
    index = torch.cat([torch.arange(SPACE.dim)[SPACE.slice(name)] for name in order])
    dense = hessian(lambda flat: value(named(flat)))(THETA)
    close(layered_hessian(value, params, TensorSpace(params)), dense[index][:, index])


def test_layers_beyond_one_chunk():
    params = {"w": draws(COLUMNS + 9)}
    found = layered_hessian(lambda p: p["w"].pow(3).sum() + p["w"].sum().square(), params, TensorSpace(params))
    close(found, torch.diag(6 * params["w"]) + 2)


def test_consecutive_parameters_of_a_module_are_one_layer():
    assert layers(["a.w", "a.b", "b.w", "a.c", "x", "y"]) == [["a.w", "a.b"], ["b.w"], ["a.c"], ["x"], ["y"]]


@pytest.mark.parametrize("budget", [1, 10**9])
def test_rows_datum_by_datum(budget):
    cotangents = draws(4, 3 * 2, seed=3).reshape(4, 3, 2)
    rows = torch.cat(list(pulled_rows(forward, named(THETA), X, cotangents, SPACE, budget)))
    J = jacrev(lambda flat: forward(named(flat), X))(THETA)
    close(rows, torch.einsum("npc,ncd->npd", cotangents, J).flatten(0, 1))
    with pytest.raises(ValueError, match="does not have the data along its first axis"):
        list(pulled_rows(forward, named(THETA), X[:3], cotangents, SPACE, budget))
