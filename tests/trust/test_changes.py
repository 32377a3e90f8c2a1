"""An operator means the model, the loss and the data as they are now, whatever was changed since its last product."""

import gc
import types
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import IMPLICIT, Case, close, differentiable, real, slopes
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from curvops import EmpiricalRisk
from trust.support import labels, rotate, used

GLOBAL = {"slope": 1.0}


class Net(nn.Module):
    """A model with every kind of state that a forward pass may read."""

    power = 1.0

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.register_buffer("scale", torch.ones(4))
        self.config, self.steps, self.plain = {"act": {"slope": 1.0}}, [torch.tanh], torch.ones(4)
        self.array, self.pair, self.space = np.ones(4), (nn.Identity(), 1.0), types.SimpleNamespace(shift=0.0)
        self.cell = (lambda box: lambda h: h * box[0])([1.0])
        self.eval()

    def forward(self, X):
        h = self.norm(self.a(X)) * self.config["act"]["slope"] * self.plain * self.scale * torch.as_tensor(self.array)
        for step in self.steps:
            h = step(h)
        h = self.pair[0](self.cell(h + self.space.shift)) * self.pair[1] * GLOBAL["slope"]
        return self.b(h + self.frozen(h) ** 2 * self.power)


class Twice(nn.Module):
    def forward(self, w):
        return 2 * w


class Power(nn.Module):
    """A loss with options of its own."""

    def __init__(self):
        super().__init__()
        self.gamma, self.parts, self.w = 2.0, {"smooth": 0.1}, torch.ones(3)

    def forward(self, z, y):
        t = F.one_hot(y, 3) * (1 - self.parts["smooth"])
        return (((z - t).square() + 1).pow(self.gamma / 2) * self.w).sum(1).mean()


class Loader:
    """Batches that can be changed in any way, with a transform of their own."""

    def __init__(self):
        X, y = real(9, 3), labels(9)
        self.batches, self.gain = [(X[:5].clone(), y[:5].clone()), (X[5:].clone(), y[5:].clone())], 1.0

    def __iter__(self):
        return ((X * self.gain, y) for X, y in self.batches)


def case(loss=None, data=None):
    options = {"reduction": "mean"} if isinstance(loss, Power) else {}
    net = Net()
    params = {n: p for n, p in net.named_parameters() if not n.startswith("frozen")}
    return Case(net, loss or nn.CrossEntropyLoss(torch.ones(3), label_smoothing=0.1), data or Loader(), options, params)


def change(c, code):
    """Run statements on m(odel), p(arameters), l(oss) and d(ata)."""
    with torch.no_grad():
        exec(code, {**globals(), "m": c.model, "p": c.params, "l": c.loss, "d": c.data})


MODEL = {
    "parameter in place": "p['a.weight'].mul_(-1)",
    "parameter by .data": "p['b.weight'].data.mul_(2)",
    "parameter's .data replaced": "p['a.weight'].data = p['a.weight'].data.roll(1, 0)",
    "numpy view": "p['a.weight'].detach().numpy()[0] += 1",
    "numpy shuffle": "np.random.RandomState(0).shuffle(p['a.weight'].detach().numpy())",
    "sign flips": "p['a.weight'].view(-1)[:2].neg_()",
    "two rows swapped": "w = p['a.weight']; w.copy_(w[[1, 0, 2, 3]])",
    "load_state_dict": "torch.manual_seed(5); m.load_state_dict(Net().state_dict())",
    "optimizer": "[setattr(q, 'grad', torch.ones_like(q)) for q in p.values()]; torch.optim.SGD(p.values(), 0.3).step()",
    "buffer in place": "m.scale.mul_(2)",
    "buffer replaced": "m.scale = torch.arange(4.0)",
    "running statistics": "m.norm.running_var.add_(1)",
    "train mode": "m.norm.train(); m.norm.track_running_stats = False; m.norm.running_mean = m.norm.running_var = None",
    "eps": "m.norm.eps = 0.5",
    "plain tensor in place": "m.plain.mul_(2)",
    "plain tensor replaced": "m.plain = torch.arange(4.0)",
    "config": "m.config['act']['slope'] = 2.0",
    "list of functions": "m.steps[0] = torch.sin",
    "list grown": "m.steps.append(torch.sin)",
    "numpy attribute": "m.array[0] = 3",
    "tuple replaced": "m.pair = (nn.Tanh(), 2.0)",
    "namespace": "m.space.shift = 1.0",
    "closure": "m.cell.__closure__[0].cell_contents[0] = 2.0",
    "closure replaced": "m.cell = torch.sin",
    "class attribute": "Net.power = 0.5",
    "global": "GLOBAL['slope'] = 1.5",
    "class": "m.__class__ = type('Other', (Net,), {'forward': lambda self, X: 2 * Net.forward(self, X).sin()})",
    "forward on the instance": "f = m.a.forward; m.a.forward = lambda x: f(x).sin()",
    "frozen submodule replaced": "torch.manual_seed(5); m.frozen = nn.Linear(4, 4).requires_grad_(False)",
    "frozen weight": "m.frozen.weight.mul_(2)",
    "frozen weight replaced": "m.frozen.weight = nn.Parameter(m.frozen.weight * 2, requires_grad=False)",
    "frozen by assignment": "m.frozen.load_state_dict({k: 2 * v for k, v in m.frozen.state_dict().items()}, assign=True)",
    "unfrozen": "m.frozen.requires_grad_(True)",
    "parameter frozen": "p['a.weight'].requires_grad_(False)",
    "hook": "m.a.register_forward_hook(lambda m, a, out: out * 2)",
    "hook of the same id": "m.a.register_forward_hook(lambda m, a, out: out).remove(); m.a.register_forward_hook(lambda m, a, out: 2 * out)",
    "pre-hook": "m.b.register_forward_pre_hook(lambda m, a: (a[0].sin(),))",
    "parametrized": "nn.utils.parametrize.register_parametrization(m.a, 'weight', Twice())",
}  # fmt: skip
LOSS = {
    "weight in place": "l.weight[1] = 5",
    "weight by .data": "l.weight.data[1] = 5",
    "weight replaced": "l.weight = torch.tensor([1.0, 2.0, 3.0])",
    "weights of zero": "l.weight.copy_(torch.tensor([0.0, 0.0, 2.0]))",
    "weight by numpy": "l.weight.numpy()[0] = 4",
    "label_smoothing": "l.label_smoothing = 0.5",
    "ignore_index": "l.ignore_index = 1",
    "reduction": "l.reduction = 'sum'",
    "hook": "l.register_forward_hook(lambda m, a, out: 3 * out)",
    "class": "l.__class__ = type('Other', (nn.CrossEntropyLoss,), {'forward': lambda s, z, y: 2 * F.cross_entropy(z.sin(), y, reduction=s.reduction)})",
}
POWER = {
    "gamma": "l.gamma = 3.0",
    "config": "l.parts['smooth'] = 0.5",
    "tensor in place": "l.w[0] = 4",
    "class": "l.__class__ = type('Other', (Power,), {'forward': lambda s, z, y: (z - F.one_hot(y, 3)).cosh().mean()})",
}
DATA = {
    "labels in place": "d.batches[0][1].copy_((d.batches[0][1] + 1) % 3)",
    "labels by numpy": "d.batches[0][1].numpy()[:] = 1",
    "labels shuffled": "np.random.RandomState(1).shuffle(d.batches[0][1].numpy())",
    "append": "d.batches.append((real(2, 3, seed=7), labels(2)))",
    "pop": "d.batches.pop()",
    "batch replaced": "d.batches[0] = (real(3, 3, seed=7), labels(3))",
    "inputs in place": "d.batches[0][0].mul_(2)",
    "inputs exchanged": "a, b = d.batches[0][0], d.batches[1][0]; t = a[0].clone(); a[0] = b[0]; b[0] = t",
    "inputs shuffled": "np.random.RandomState(1).shuffle(d.batches[0][0].numpy())",
    "signs": "d.batches[0][0].view(-1)[:2].neg_()",
    "transform": "d.gain = 2.0",
    "bigger": "d.batches[0] = tuple(torch.cat([t, t]) for t in d.batches[0])",
    "method": "d.__class__ = type('Other', (Loader,), {'__iter__': lambda s: iter([s.batches[1]])})",
}


SET = {
    "labels in place": "d.dataset.tensors[1].fill_(1)",
    "tensors replaced": "t = d.dataset.tensors; d.dataset.tensors = (t[0] * 2, t[1])",
    "inputs in place": "d.dataset.tensors[0].mul_(-1)",
}
OF_FUNCTIONS = {"what they refer to": "l.__closure__[0].cell_contents['t'] = 2.0"}


def with_power():
    return case(Power())


def with_huber():
    c = case(nn.HuberLoss(delta=1.0))
    c.data.batches = [(X, real(len(X), 3, seed=5)) for X, _ in c.data.batches]
    return c


def with_data_set():
    return case(data=DataLoader(TensorDataset(real(9, 3), labels(9)), 4))


def of_functions():
    box, c = {"t": 1.0}, case()
    net, c.options = c.model, {"reduction": "mean"}
    c.loss, c.model = lambda z, y: F.cross_entropy(z * box["t"], y), lambda params, X: net(X) * box["t"]
    return c


CHANGES = {
    f"{make.__name__}, {part}: {what}": (make, code)
    for make, part, table in [
        (case, "model", MODEL),
        (case, "loss", LOSS),
        (with_power, "loss", POWER),
        (with_huber, "loss", {"delta": "l.delta = 0.05", "reduction": "l.reduction = 'sum'"}),
        (case, "data", DATA),
        (with_data_set, "data", SET),
        (of_functions, "loss", OF_FUNCTIONS),
    ]
    for what, code in table.items()
}
NONE = ("case, model: unfrozen", "case, model: parameter frozen")


@pytest.fixture(autouse=True)
def _class_and_global_as_before():
    yield
    GLOBAL["slope"], Net.power = 1.0, 1.0


@pytest.mark.parametrize("name, kind", rotate(CHANGES, "Hessian", "GGN"))
def test_operators_and_risks_follow(name, kind):
    """Those that were used before a change give the truth after it."""
    make, code = CHANGES[name]
    c = make()
    op, before = used(c, kind), c.truth(kind)
    op @ torch.ones(op.shape[1])
    risk = EmpiricalRisk(c.model, c.loss, c.params, c.data, **c.options)
    close(risk.value(), c.risk(c.outputs()))
    change(c, code)
    c.check(kind, op=op)
    assert torch.equal(before, c.truth(kind)) == (name in NONE)
    with differentiable(c.params) as leaves:
        value = c.risk(c.outputs())
        close(risk.value(), value)
        close(torch.cat([g.flatten() for g in risk.gradient()]), slopes(value, leaves))


REPLACED = [
    "torch.manual_seed(5); m.a = nn.Linear(3, 4)",
    "m.a.weight = nn.Parameter(m.a.weight * 2)",
    "m.load_state_dict({k: 2 * v for k, v in m.state_dict().items()}, assign=True)",
]


@pytest.mark.parametrize("code, kind", rotate(REPLACED, *IMPLICIT))
def test_a_parameter_that_is_replaced(code, kind):
    """The model has lost a tensor of `params`: an error that names it, or the one that has its name now, but no zero."""
    c = case()
    op = used(c, kind)
    v = real(op.shape[1])
    change(c, code)
    try:
        found = op @ v
    except (ValueError, RuntimeError) as error:
        assert "a.weight" in str(error)
    else:
        c.params = {name: p for name, p in c.model.named_parameters() if name in c.params}
        close(found, c.truth(kind) @ v)


SNAPSHOT = [MODEL["parameter in place"], LOSS["weight in place"], DATA["append"]]


@pytest.mark.parametrize("code, kind", rotate(SNAPSHOT, "KFAC", "EKFAC", "GGNDiagonal"))
def test_a_kronecker_operator_is_a_snapshot(code, kind):
    c = case()
    op, same = c.make(kind), c.make(kind).to_dense()
    change(c, code)
    assert torch.equal(op.to_dense(), same)
    if kind != "KFAC":
        c.check(kind)


INSIDE = "parameter in place", "load_state_dict", "optimizer", "buffer in place", "running statistics", "frozen weight"


@pytest.mark.parametrize("code, kind", rotate([*(MODEL[k] for k in INSIDE), "m.norm.train()", "m.train()"], *IMPLICIT))
def test_inside_linearized_a_change_is_an_error(code, kind):
    c = case()
    op = c.make(kind)
    with op.linearized():
        op @ torch.ones(op.shape[1])
        change(c, code)
        with pytest.raises((RuntimeError, ValueError), match="linearized"):
            op @ torch.ones(op.shape[1])
    c.model.eval()
    c.check(kind, op=op)


@pytest.mark.parametrize("kind", IMPLICIT)
def test_linearized_ends(kind):
    c = case()
    op = c.make(kind)
    total, v = op + 2 * op, real(op.shape[1])
    with pytest.raises(KeyError), op.linearized():
        op @ v
        raise KeyError
    for code in (MODEL["buffer in place"], DATA["append"], MODEL["config"]):
        change(c, code)
        truth = c.truth(kind) @ v
        close(op @ v, truth)
        with op.linearized(), op.linearized():
            close(op @ v, truth)
        with total.linearized():
            close(total @ v, 3 * truth)


def tensors():
    gc.collect()
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


@pytest.mark.parametrize("kind", [*IMPLICIT, "KFAC"])
def test_nothing_outlives_a_call_or_the_operator(kind):
    gc.collect()
    gc.freeze()  # what was there before need not be looked at
    c = case()
    op = used(c, kind, check_deterministic=True)
    v = real(op.shape[1])
    before = tensors()
    for _ in range(3):
        op @ v
        with op.linearized():
            op @ v
    assert tensors() == before
    parts = [weakref.ref(part) for part in (c.model, c.loss, c.data)]
    del op, c
    gc.collect()
    gc.unfreeze()
    assert [part() for part in parts] == [None] * 3
