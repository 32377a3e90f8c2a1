"""A weight is a weight by whatever path the model or the loss reaches it."""

import copy
import functools
import types
import weakref

import pytest
import torch
import torch.nn.functional as F
from oracles import KINDS, Case
from torch import nn
from torch.func import functional_call, vmap
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from trust.support import CE, Net, data, right_or_refused, rotate

GLOBAL = {}


def net_with(reach):
    """A net that reaches the weight of its second layer in a way of its own."""
    net = Net()
    second = reach(net)
    net.forward = lambda X: second(net.a(X).tanh())
    return net


class Times(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g @ w, g.T @ x


class Exp(nn.Module):
    def forward(self, w):
        return w.exp()


def by_setting_hook(net):
    """As the old `weight_norm` does: a hook sets a plain attribute."""
    net.c = nn.Identity()
    net.c.register_forward_pre_hook(lambda m, _: m.__dict__.update(w=net.b.weight.exp()))
    return lambda h: F.linear(net.c(h), net.c.w)


def by_shallow_copy(net):
    net.c = copy.copy(net.b)
    return lambda h: net.c(h) + net.b(h)


def by_force(net):
    """The output is itself a derivative."""

    def force(h):
        with torch.enable_grad():
            x = h if h.requires_grad else h.detach().requires_grad_()
            return torch.autograd.grad(net.b(x).tanh().square().sum(), x, create_graph=True)[0][:, :3]

    return force


def bind(tensor, use):
    return lambda h: use(h, tensor)


def row_by_row(h, rows):
    return torch.stack([h @ row for row in rows], 1)


REACH = {
    "plain list": lambda n: bind([n.b.weight], lambda h, w: F.linear(h, w[0])),
    "list of modules": lambda n: bind([n.b], lambda h, modules: modules[0](h)),
    "closure": lambda n: bind(n.b.weight, F.linear),
    "default argument": lambda n: lambda h, w=n.b.weight: F.linear(h, w),
    "partial": lambda n: functools.partial(F.linear, weight=n.b.weight, bias=n.b.bias),
    "bound method": lambda n: n.b.forward,
    "weak reference": lambda n: bind(weakref.ref(n.b.weight), lambda h, w: F.linear(h, w())),
    "global": lambda n: GLOBAL.update(w=n.b.weight) or (lambda h: F.linear(h, GLOBAL["w"])),
    "__dict__": lambda n: n.__dict__.update(w=n.b.weight) or (lambda h: F.linear(h, n.w, n.b.bias)),
    "namespace": lambda n: bind(types.SimpleNamespace(t=({"w": n.b.weight},)), lambda h, s: F.linear(h, s.t[0]["w"])),
    "view made before": lambda n: bind(n.b.weight.view(-1), lambda h, w: h @ w.view(3, 4).T),
    "rows made before": lambda n: bind(list(n.b.weight), row_by_row),
    "transpose made before": lambda n: bind(n.b.weight.T, torch.matmul),
    "forward hook": lambda n: n.b.register_forward_hook(lambda m, _, h: h + F.linear(h, n.a.weight)[:, :3]) and n.b,
    "pre-hook": lambda n: n.b.register_forward_pre_hook(lambda m, args: (args[0] * n.a.bias,)) and n.b,
    "attribute set by a hook": by_setting_hook,
    "in place": lambda n: lambda h: n.b(h).mul_(2).add_(n.b.bias).tanh_(),
    "by Fourier transform": lambda n: lambda h: (torch.fft.rfft(h) @ torch.fft.rfft(n.b.weight).mH).real,
    "autograd.Function": lambda n: lambda h: Times.apply(h, n.b.weight) + n.b.bias,
    "autograd.Function and list": lambda n: bind([n.b.weight], lambda h, w: Times.apply(h, w[0])),
    "shallow copy of a module": by_shallow_copy,
    "checkpoint": lambda n: lambda h: checkpoint(n.b, h, use_reentrant=False),
    "checkpoint of a closure": lambda n: lambda h: checkpoint(lambda t: n.b(t.sin()), h, use_reentrant=False),
    "vmap inside": lambda n: lambda h: vmap(lambda w, b: h @ w + b, out_dims=1)(n.b.weight, n.b.bias),
    "functional_call inside": lambda n: lambda h: functional_call(n.b, {"weight": n.b.weight * n.a.bias}, (h,)),
    "gradient inside": by_force,
    "penalty on all": lambda n: lambda h: n.b(h) * sum(p.square().sum() for p in n.parameters()),
    "detached scale": lambda n: lambda h: n.b(h) / n.b.weight.detach().norm(),
    "straight-through": lambda n: lambda h: F.linear(h, n.b.weight + (n.b.weight.sign() - n.b.weight).detach()),
    "parametrized": lambda n: parametrize.register_parametrization(n.b, "weight", Exp()),
    "orthogonal": lambda n: parametrizations.orthogonal(n.b),
    "spectral norm": lambda n: parametrizations.spectral_norm(n.b).eval(),
}


@pytest.mark.parametrize("way, kinds", rotate(REACH))
def test_in_the_model(way, kinds):
    Case(net_with(REACH[way]), CE, data()).check(*kinds)


def test_frozen_parameters():
    net = net_with(REACH["plain list"])
    net.b.requires_grad_(False)
    Case(net, CE, data(), params={"b.weight": net.b.weight, "a.bias": net.a.bias}).check(*KINDS)
    assert not net.b.weight.requires_grad and net.a.weight.grad is None


@pytest.mark.parametrize("kind", KINDS)
def test_cached_parametrizations(kind):
    case = Case(net_with(REACH["parametrized"]), CE, data())
    truth = case.truth(kind)
    with parametrize.cached():
        case.check(kind, truth=truth)


def test_parameters_that_are_no_part_of_the_module():
    """The tensors count, not the names; or the name is refused."""
    hidden = nn.Linear(4, 3)
    net = net_with(lambda n: [hidden].__getitem__(0).forward)
    params = {"hidden.w": hidden.weight, "a.weight": net.a.weight}
    right_or_refused(Case(net, CE, data(), params=params), tuple(KINDS), "hidden.w")


COPIES = {
    "detached": lambda net: {n: p.detach() for n, p in net.named_parameters()},
    "state_dict": lambda net: dict(net.state_dict()),
    "clones": lambda net: {n: p.clone() for n, p in net.named_parameters()},
    "other values": lambda net: {n: (p + 0.3).detach() for n, p in net.named_parameters()},
    "rows": lambda net: {"a.weight": net.a.weight[:2]},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", COPIES)
def test_copies_of_the_parameters(how, kind):
    """They stand in for the parameters of their name, or are refused; never constants."""
    net = Net()
    case, twin = Case(net, CE, data(), params=COPIES[how](net)), copy.deepcopy(net)
    if how != "rows":
        twin.load_state_dict(case.params)
    right_or_refused(case, kind, "weight", Case(twin, CE, data()).truth(kind))


def test_a_function_that_reaches_past_its_arguments():
    net = Net()
    params = {name: p for name, p in net.named_parameters() if name != "a.bias"}
    function = lambda p, X: F.linear((X @ p["a.weight"].T).tanh(), net.b.weight, p["b.bias"])  # noqa: E731
    Case(function, CE, data(), {}, params).check(*KINDS)


class Regularised(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.of = [net]

    def forward(self, z, y):
        return F.cross_entropy(z, y) + 0.1 * sum(p.square().sum() + p.sum().sin() for p in self.of[0].parameters())


LOSSES = {
    "module with a regulariser": Regularised,
    "closure with a regulariser": lambda n: lambda z, y: F.cross_entropy(z, y) + n.a.weight.pow(4).sum(),
    "temperature": lambda n: lambda z, y: F.cross_entropy(z * n.a.bias.exp().sum(), y),
    "partial": lambda n: functools.partial(lambda z, y, w: F.cross_entropy(z + w, y), w=n.b.bias),
    "margin by a weight": lambda n: lambda z, y: (z.gather(1, y[:, None]) - n.b.weight.norm()).cosh().mean(),
}


@pytest.mark.parametrize("way", LOSSES)
def test_in_the_loss(way):
    net = Net()
    Case(net, LOSSES[way](net), data(), {"reduction": "mean"}).check("Hessian", "GGN", "GGNDiagonal")


def test_a_loss_with_parameters_of_its_own():
    log_t = nn.Parameter(torch.tensor(0.3))
    case = Case(Net(), lambda z, y: F.cross_entropy(z * log_t.exp(), y), data(), {"reduction": "mean"})
    case.check("Hessian")
    case.params["log_t"] = log_t
    right_or_refused(case, "Hessian", "log_t")


def test_reentrant_checkpoints():
    """`autograd.grad` refuses them: so may we."""
    net = Net()
    truth = Case(net, CE, data()).truth("Hessian")
    net.forward = lambda X: checkpoint(lambda h: net.b(h.tanh()), net.a(X), use_reentrant=True)
    right_or_refused(Case(net, CE, data()), "Hessian", "reentrant", truth)
