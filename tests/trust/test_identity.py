"""After any call, also one that failed, each of the caller's tensors is the very object that it was."""

import copy

import pytest
import torch
from torch import nn

from curvops import EmpiricalRisk
from trust.oracle import KINDS, Case, labels, picture, real

EVERY = [*KINDS, "KFAC", "KFOC"]


class Twice(nn.Module):
    """One module, tensor and buffer under several names."""

    def __init__(self, share):
        super().__init__()
        self.a, self.c = nn.Linear(3, 3), nn.Linear(3, 3)
        self.register_buffer("scale", torch.ones(3))
        share(self)

    def forward(self, X):
        return self.c(self.chain(X)) * self.scale

    def chain(self, X):
        return (self.b if hasattr(self, "b") else self.a)(self.a(X).tanh()).tanh()


def tied(net):
    net.b = nn.Linear(3, 3)
    net.b.weight, net.c.bias = net.a.weight, net.a.bias
    net.b.register_buffer("scale", net.scale)


def by_attribute(net):
    net.b = net.a


def by_list(net):
    net.blocks = nn.ModuleList([net.a, nn.Sequential(net.a, net.c)])
    net.plain, net.table = [net.a], {"a": net.a.weight}


def by_copy(net):
    net.b = copy.copy(net.a)


def by_parameter(net):
    net.weights = nn.ParameterList([net.a.weight, net.a.weight])
    net.alias = net.c.bias


def by_self(net):
    net.__dict__["me"] = net
    net.b = nn.Sequential(net.a, net.c)
    net.b.add_module("again", net.a)


SHARES = {f.__name__: f for f in (tied, by_attribute, by_list, by_copy, by_parameter, by_self)}


def problem(share):
    net = Twice(SHARES[share])
    net.c.weight.requires_grad_(False)
    net.a.weight.grad = torch.ones(3, 3)
    return Case(net, nn.CrossEntropyLoss(), [(real(5, 3), labels(5)), (real(4, 3, seed=1), labels(4))])


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("kind", EVERY)
def test_nothing_is_swapped(kind, share):
    case = problem(share)
    optimizer, before = torch.optim.SGD(case.model.parameters(), lr=0.1), picture(case.model)
    op = case.make(kind, check_deterministic=True)
    op @ torch.ones(op.shape[1])
    op @ torch.ones(op.shape[1], 40)
    op.to_dense()
    with op.linearized():
        op @ torch.ones(op.shape[1])
    assert picture(case.model) == before
    z = case.model(real(5, 3))
    optimizer.step()
    assert not torch.equal(case.model(real(5, 3)), z)
    if kind in KINDS:
        case.check(kind)


@pytest.mark.parametrize("share", SHARES)
def test_nothing_is_swapped_by_the_risk(share):
    case = problem(share)
    before = picture(case.model)
    risk = EmpiricalRisk(case.model, case.loss, case.params, case.data)
    assert torch.allclose(risk.value(), case.risk(case.outputs()))
    risk.gradient()
    assert picture(case.model) == before


class Failing:
    """Raises at its n-th call, after which everything works again."""

    def __init__(self, error, at):
        self.error, self.left = error, at

    def __call__(self, *_):
        self.left -= 1
        if self.left == 0:
            raise self.error("stop")


@pytest.mark.parametrize("where", ["module", "hook", "loss", "data", "backward"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, torch.OutOfMemoryError, SystemExit])
@pytest.mark.parametrize("kind", ["Hessian", "GGN", "EKFAC", "GGNDiagonal"])
def test_after_failures(kind, error, where):
    case, fail = problem("by_attribute"), Failing(error, 0)
    net, plain, batches = case.model, case.loss, case.data

    def loss(z, y):
        fail() if where == "loss" else None
        return plain(z, y)

    class Loader:
        def __iter__(self):
            for batch in batches:
                fail() if where == "data" else None
                yield batch

    case.loss, case.data, case.options = loss, Loader(), {"reduction": "mean"}
    if where == "module":
        net.c.register_forward_pre_hook(fail)
    if where == "hook":
        net.c.register_forward_hook(lambda m, args, out: (fail(), out)[1])
    if where == "backward":

        def watch(m, args, out):
            if out.requires_grad:
                out.register_hook(lambda g: fail())

        net.a.register_forward_hook(watch)
    before, grads = picture(net), torch.is_grad_enabled()
    for at in (1, 2, 4):
        fail.left = at
        try:
            op = case.make(kind, check_deterministic=at == 4)
            op @ torch.ones(op.shape[1])
        except error:
            pass
        assert picture(net) == before and torch.is_grad_enabled() == grads
        assert not torch.overrides._get_current_function_mode_stack()
    fail.left = 0
    case.check(kind)
