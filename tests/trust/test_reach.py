"""A weight is a weight by whatever path the model or the loss reaches it."""

import copy
import functools
import types
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, vmap
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from trust.oracle import KINDS, Case, labels, real

GLOBAL = {}


class Net(nn.Module):
    """Two layers; subclasses of one line reach the second one's weight in their own way."""

    def __init__(self, reach=None):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 3)
        self.reach = reach and reach(self)

    def forward(self, X):
        h = self.a(X).tanh()
        return self.b(h) if self.reach is None else self.reach(h)


def hooked(pre):
    def reach(net):
        if pre:
            net.b.register_forward_pre_hook(lambda m, args: (args[0] * net.a.bias,))
        else:
            net.b.register_forward_hook(lambda m, args, out: out + F.linear(out, net.a.weight)[:, :3])
        return net.b

    return reach


def by_dict(net):
    net.__dict__["w"] = net.b.weight
    return lambda h: F.linear(h, net.w, net.b.bias)


def by_setter_hook(net):
    """As the old `weight_norm` does: a hook sets a plain attribute."""
    net.c = nn.Identity()
    net.c.register_forward_pre_hook(lambda m, _: m.__dict__.update(w=net.b.weight.exp()))
    return lambda h: F.linear(net.c(h), net.c.w)


def by_global(net):
    GLOBAL["w"] = net.b.weight
    return lambda h: F.linear(h, GLOBAL["w"])


class Times(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g @ w, g.T @ x


def by_shallow_copy(net):
    net.c = copy.copy(net.b)
    return lambda h: net.c(h) + net.b(h)


def by_view(net):
    view = net.b.weight.view(-1)
    return lambda h: h @ view.view(3, 4).T


def by_slices(net):
    rows = list(net.b.weight)
    return lambda h: torch.stack([h @ row for row in rows], 1)


def by_inner_functional_call(net):
    return lambda h: functional_call(net.b, {"weight": net.b.weight + net.a.weight.T[:3].sum() / 4}, (h,))


def by_gradient(net):
    """A force: the output is itself a derivative."""

    def force(h):
        with torch.enable_grad():
            x = h if h.requires_grad else h.detach().requires_grad_()
            return torch.autograd.grad(net.b(x).tanh().square().sum(), x, create_graph=True)[0][:, :3]

    return force


def by_cell(net):
    cell = types.SimpleNamespace(weights=[{"w": (net.b.weight,)}])
    return lambda h: F.linear(h, cell.weights[0]["w"][0])


REACH = {
    "plain list": lambda net: (lambda w: lambda h: F.linear(h, w[0]))([net.b.weight]),
    "list of modules": lambda net: (lambda ms: lambda h: ms[0](h))([net.b]),
    "closure": lambda net: (lambda w, bias: lambda h: F.linear(h, w, bias))(net.b.weight, net.b.bias),
    "default argument": lambda net: lambda h, w=net.b.weight: F.linear(h, w),
    "forward hook": hooked(False),
    "forward pre-hook": hooked(True),
    "plain attribute set by a hook": by_setter_hook,
    "partial": lambda net: functools.partial(F.linear, weight=net.b.weight, bias=net.b.bias),
    "bound method": lambda net: net.b.forward,
    "weak reference": lambda net: (lambda r: lambda h: F.linear(h, r()))(weakref.ref(net.b.weight)),
    "global": by_global,
    "__dict__": by_dict,
    "namespace": by_cell,
    "view made before": by_view,
    "rows made before": by_slices,
    "transpose made before": lambda net: (lambda t: lambda h: h @ t)(net.b.weight.T),
    "autograd.Function": lambda net: lambda h: Times.apply(h, net.b.weight) + net.b.bias,
    "autograd.Function and list": lambda net: (lambda w: lambda h: Times.apply(h, w[0]))([net.b.weight]),
    "shallow copy of a module": by_shallow_copy,
    "checkpoint": lambda net: lambda h: checkpoint(net.b, h, use_reentrant=False),
    "checkpoint of a closure": lambda net: lambda h: checkpoint(lambda t: net.b(t.sin()), h, use_reentrant=False),
    "vmap inside": lambda net: lambda h: vmap(lambda w, b: h @ w + b, out_dims=1)(net.b.weight, net.b.bias),
    "functional_call inside": by_inner_functional_call,
    "gradient inside": by_gradient,
    "penalty on all": lambda net: lambda h: net.b(h) * sum(p.square().sum() for p in net.parameters()),
    "detached scale": lambda net: lambda h: net.b(h) / net.b.weight.detach().norm(),
    "straight-through": lambda net: lambda h: F.linear(h, net.b.weight + (net.b.weight.sign() - net.b.weight).detach()),
    "parametrized": lambda net: parametrize.register_parametrization(net.b, "weight", Exp()),
    "orthogonal": lambda net: parametrizations.orthogonal(net.b),
    "spectral norm": lambda net: parametrizations.spectral_norm(net.b).eval(),
}


class Exp(nn.Module):
    def forward(self, w):
        return w.exp()


def data():
    return [(real(5, 3), labels(5)), (real(4, 3, seed=1), labels(4))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", REACH)
def test_in_the_model(way, kind):
    Case(Net(REACH[way]), nn.CrossEntropyLoss(), data()).check(kind)


@pytest.mark.parametrize("kind", ["Hessian", "GGN", "EKFAC"])
def test_frozen_parameters_reached_by_a_list(kind):
    net = Net(REACH["plain list"])
    net.b.requires_grad_(False)
    case = Case(net, nn.CrossEntropyLoss(), data(), params={"b.weight": net.b.weight, "a.bias": net.a.bias})
    case.check(kind)
    assert not net.b.weight.requires_grad and net.a.weight.grad is None


@pytest.mark.parametrize("kind", KINDS)
def test_cached_parametrizations(kind):
    net = Net(REACH["parametrized"])
    case = Case(net, nn.CrossEntropyLoss(), data())
    truth = case.truth(kind)
    with parametrize.cached():
        case.check(kind, truth=truth)


def unregistered():
    hidden, net = nn.Linear(4, 3), Net()
    net.reach = [hidden].__getitem__(0).forward
    return Case(net, nn.CrossEntropyLoss(), data(), params={"hidden.w": hidden.weight, "a.weight": net.a.weight})


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_that_are_no_part_of_the_module(kind):
    case = unregistered()
    try:
        case.make(kind)
    except ValueError as error:
        assert "hidden.w" in str(error)
    else:
        case.check(kind)


class Regularised(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.of = [net]

    def forward(self, z, y):
        return F.cross_entropy(z, y) + 0.1 * sum(p.square().sum() + p.sum().sin() for p in self.of[0].parameters())


LOSSES = {
    "module with a regulariser": Regularised,
    "closure with a regulariser": lambda net: lambda z, y: F.cross_entropy(z, y) + net.a.weight.pow(4).sum(),
    "temperature": lambda net: lambda z, y: F.cross_entropy(z * net.a.bias.exp().sum(), y),
    "partial": lambda net: functools.partial(lambda z, y, w: F.cross_entropy(z + w, y), w=net.b.bias.square()),
    "margin by a weight": lambda net: lambda z, y: (z.gather(1, y[:, None]) - net.b.weight.norm()).cosh().mean(),
}


@pytest.mark.parametrize("kind", ["Hessian", "GGN", "GGNDiagonal"])
@pytest.mark.parametrize("way", LOSSES)
def test_in_the_loss(way, kind):
    net = Net()
    Case(net, LOSSES[way](net), data(), options={"reduction": "mean"}).check(kind)


def test_a_loss_with_parameters_of_its_own():
    net, log_t = Net(), nn.Parameter(torch.tensor(0.3))
    case = Case(net, lambda z, y: F.cross_entropy(z * log_t.exp(), y), data(), {"reduction": "mean"})
    case.check("Hessian")
    case.params["log_t"] = log_t
    try:
        case.make("Hessian")
    except ValueError as error:
        assert "log_t" in str(error)
    else:
        case.check("Hessian")


@pytest.mark.parametrize("kind", KINDS)
def test_a_function_that_reaches_past_its_arguments(kind):
    net = Net()

    def function(params, X):
        return F.linear(F.linear(X, params["a.weight"]).tanh(), net.b.weight, params["b.bias"])

    names = ["a.weight", "b.weight", "b.bias"]
    params = {n: p for n, p in net.named_parameters() if n in names}
    Case(function, nn.CrossEntropyLoss(), data(), params=params).check(kind)
