"""After any call, also one that failed, each of the caller's tensors is the very object that it was."""

import copy

import pytest
import torch
from oracles import KINDS, Case, real
from torch import nn

from curvops import EmpiricalRisk
from trust.support import CE, PAIRS, data, picture, rotate, used


class Twice(nn.Module):
    """Modules, tensors and buffers under several names."""

    def __init__(self, share):
        super().__init__()
        self.a, self.c = nn.Linear(3, 3), nn.Linear(3, 3)
        self.register_buffer("scale", torch.ones(3))
        share(self)

    def forward(self, X):
        return self.c((self.b if hasattr(self, "b") else self.a)(self.a(X).tanh()).tanh()) * self.scale


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


PLACES = ["module", "hook", "loss", "data", "backward"]


def problem(share):
    net = Twice(SHARES[share])
    net.c.weight.requires_grad_(False)
    net.a.weight.grad = torch.ones(3, 3)
    return Case(net, CE, data())


@pytest.mark.parametrize("share, kinds", rotate(SHARES, *PAIRS, ("EF", "KFOC"), ("GGN", "KFAC")))
def test_nothing_is_swapped(share, kinds):
    case = problem(share)
    optimizer, before = torch.optim.SGD(case.model.parameters(), lr=0.1), picture(case.model)
    for kind in kinds:
        op = used(case, kind, check_deterministic=True)
        op @ torch.ones(op.shape[1], 40)
        op.to_dense()
        with op.linearized():
            op @ torch.ones(op.shape[1])
        if kind in KINDS:
            case.check(kind, op=op)
    risk = EmpiricalRisk(case.model, case.loss, case.params, case.data)
    assert torch.allclose(risk.value(), case.risk(case.outputs()))
    risk.gradient()
    assert picture(case.model) == before
    z = case.model(real(5, 3))
    optimizer.step()
    assert not torch.equal(case.model(real(5, 3)), z)
    case.check(kinds[0])


@pytest.mark.parametrize("kind", ["Hessian", "GGN", "EKFAC"])
@pytest.mark.parametrize("where, error", rotate(PLACES, KeyboardInterrupt, torch.OutOfMemoryError))
def test_after_failures(kind, error, where):
    case, left = problem("by_attribute"), [0]
    net, batches = case.model, case.data

    def fail(value=None, at=where):
        left[0] -= at == where
        if left[0] == 0 and at == where:
            raise error("stop")
        return value

    class Loader:
        def __iter__(self):
            return (fail(batch, "data") for batch in batches)

    case.loss, case.data, case.options = lambda z, y: fail(CE(z, y), "loss"), Loader(), {"reduction": "mean"}
    net.c.register_forward_pre_hook(lambda m, args: fail(args, "module"))
    net.c.register_forward_hook(lambda m, args, out: fail(out, "hook"))
    if where == "backward":
        net.a.register_forward_hook(lambda m, _, out: (out.requires_grad and out.register_hook(fail), out)[1])
    before, grads = picture(net), torch.is_grad_enabled()
    for at in (1, 2, 4):
        left[0] = at
        try:
            used(case, kind, check_deterministic=at == 4)
        except error:
            assert left[0] == 0
        assert picture(net) == before and torch.is_grad_enabled() == grads
        assert not torch.overrides._get_current_function_mode_stack()
    left[0] = 0
    case.check(kind)
