"""An operator means the model, the loss and the data as they are now, and leaves each of the caller's things as it was."""

import copy
import functools
import gc
import types
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import IMPLICIT, KINDS, Case, close, differentiable, real, slopes
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from curvops import EmpiricalRisk
from trust.support import CE, PAIRS, data, labels, picture, rotate, used

GLOBAL = {"slope": 1.0}


class Net(nn.Module):
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
    def __init__(self):
        super().__init__()
        self.gamma, self.parts, self.w = 2.0, {"smooth": 0.1}, torch.ones(3)

    def forward(self, z, y):
        t = F.one_hot(y, 3) * (1 - self.parts["smooth"])
        return (((z - t).square() + 1).pow(self.gamma / 2) * self.w).sum(1).mean()


class Loader:
    def __init__(self, real_targets=False):
        X, y = real(9, 3), real(9, 3, seed=5) if real_targets else labels(9)
        self.batches, self.gain = [(X[:5].clone(), y[:5].clone()), (X[5:].clone(), y[5:].clone())], 1.0

    def __iter__(self):
        return ((X * self.gain, y) for X, y in self.batches)


def case(loss=None, data=None, **options):
    net = Net()
    params = {n: p for n, p in net.named_parameters() if not n.startswith("frozen")}
    return Case(net, loss or nn.CrossEntropyLoss(torch.ones(3), label_smoothing=0.1), data or Loader(), options, params)


def with_functions():
    box, c = {"t": 1.0}, case(reduction="mean")
    net = c.model
    c.loss, c.model = lambda z, y: F.cross_entropy(z * box["t"], y), lambda params, X: net(X) * box["t"]
    return c


MAKE = {
    "own loss": lambda: case(Power(), reduction="mean"),
    "huber": lambda: case(nn.HuberLoss(delta=1.0), Loader(True)),
    "smooth": lambda: case(nn.SmoothL1Loss(beta=1.0), Loader(True)),
    "binary": lambda: case(nn.BCEWithLogitsLoss(pos_weight=torch.ones(3)), [(X, y.sigmoid()) for X, y in Loader(True)]),
    "partial": lambda: case(functools.partial(F.cross_entropy, label_smoothing=0.1)),
    "data set": lambda: case(data=DataLoader(TensorDataset(real(9, 3), labels(9)), 4)),
    "functions": with_functions,
}


def change(c, code):
    """Run statements on m(odel), p(arameters), l(oss) and d(ata)."""
    with torch.no_grad():
        exec(code, {**globals(), "m": c.model, "p": c.params, "l": c.loss, "d": c.data})


# changes that are made one after the other
CHANGES = {
    "parameter": ["p['a.weight'].mul_(-1)", "p['a.weight'].view(-1)[:2].neg_()", "w = p['a.weight']; w.copy_(w[[1, 0, 2, 3]])"],
    "parameter by .data": ["p['b.weight'].data.mul_(2)", "p['a.weight'].data = p['a.weight'].data.roll(1, 0)"],
    "parameter by numpy": ["p['a.weight'].detach().numpy()[0] += 1", "np.random.RandomState(0).shuffle(p['a.weight'].detach().numpy())"],
    "load_state_dict": ["torch.manual_seed(5); m.load_state_dict(Net().state_dict())"],
    "optimizer": ["[setattr(q, 'grad', torch.ones_like(q)) for q in p.values()]; torch.optim.SGD(p.values(), 0.3).step()"],
    "buffers": ["m.scale.mul_(2)", "m.scale = torch.arange(4.0)", "m.norm.running_var.add_(1)", "m.norm.eps = 0.5"],
    "train mode": ["m.norm.train(); m.norm.track_running_stats = False; m.norm.running_mean = m.norm.running_var = None"],
    "tensor or array": ["m.plain.mul_(2)", "m.plain = torch.arange(4.0) + 1", "m.array[0] = 3"],
    "config": ["m.config['act']['slope'] = 2.0", "m.pair = (nn.Tanh(), 2.0)", "m.space.shift = 1.0"],
    "list of functions": ["m.steps[0] = torch.sin", "m.steps.append(torch.sin)"],
    "closure": ["m.cell.__closure__[0].cell_contents[0] = 2.0", "m.cell = torch.sin"],
    "class or global": ["Net.power = 0.5", "GLOBAL['slope'] = 1.5"],
    "class": ["m.__class__ = type('Other', (Net,), {'forward': lambda self, X: 2 * Net.forward(self, X).sin()})"],
    "forward of an instance": ["f = m.a.forward; m.a.forward = lambda x: f(x).sin()"],
    "submodule": ["torch.manual_seed(5); m.frozen = nn.Linear(4, 4).requires_grad_(False)"],
    "frozen weight": ["m.frozen.weight.mul_(2)", "m.frozen.weight = nn.Parameter(m.frozen.weight * 2, requires_grad=False)"],
    "frozen by assignment": ["m.frozen.load_state_dict({k: 2 * v for k, v in m.frozen.state_dict().items()}, assign=True)"],
    "unfrozen": ["m.frozen.requires_grad_(True); m.frozen.weight.add_(1)", "p['a.weight'].requires_grad_(False).mul_(2)"],
    "hook": ["m.a.register_forward_hook(lambda m, a, out: out * 2)", "m.b.register_forward_pre_hook(lambda m, a: (a[0].sin(),))"],
    "hook of the same id": ["m.a.register_forward_hook(lambda m, a, h: h).remove(); m.a.register_forward_hook(lambda m, a, h: 2 * h)"],
    "parametrized": ["nn.utils.parametrize.register_parametrization(m.a, 'weight', Twice())"],
    "loss's weight": ["l.weight[1] = 5", "l.weight.numpy()[0] = 4", "l.weight = torch.tensor([1.0, 2.0, 3.0])"],
    "loss's weight by .data": ["l.weight.data[1] = 5", "l.weight.copy_(torch.tensor([0.0, 0.0, 2.0]))"],
    "loss's options": ["l.label_smoothing = 0.5", "l.ignore_index = 1", "l.reduction = 'sum'"],
    "loss's hook": ["l.register_forward_hook(lambda m, a, out: 3 * out)"],
    "loss's class": ["l.__class__ = type('Other', (nn.CrossEntropyLoss,), {'forward': lambda s, z, y: 2 * F.cross_entropy(z.sin(), y, reduction=s.reduction)})"],
    "own loss, options": ["l.gamma = 3.0", "l.parts['smooth'] = 0.5", "l.w[0] = 4"],
    "own loss, class": ["l.__class__ = type('Other', (Power,), {'forward': lambda s, z, y: (z - F.one_hot(y, 3)).cosh().mean()})"],
    "huber, options": ["l.delta = 0.05", "l.reduction = 'sum'"],
    "smooth, options": ["l.beta = 0.05", "l.forward = lambda z, y: (z - y).cosh().mean()"],
    "binary, options": ["l.pos_weight.copy_(torch.tensor([0.1, 2, 5]))", "l.reduction = 'sum'"],
    "partial, options": ["l.keywords['label_smoothing'] = 0.5"],
    "functions, what they refer to": ["l.__closure__[0].cell_contents['t'] = 2.0"],
}  # fmt: skip
DATA = {
    "labels": ["d.batches[0][1].copy_((d.batches[0][1] + 1) % 3)", "d.batches[1][1].numpy()[:] = 1"],
    "labels shuffled": ["np.random.RandomState(1).shuffle(d.batches[0][1].numpy())"],
    "batches": ["d.batches.append((real(2, 3, seed=7), labels(2)))", "d.batches[0] = (real(3, 3, seed=7), labels(3))", "d.batches.pop()"],
    "inputs": ["d.batches[0][0].mul_(2)", "d.batches[0][0].view(-1)[:2].neg_()", "d.gain = 2.0"],
    "inputs exchanged": ["a, b = d.batches[0][0], d.batches[1][0]; t = a[0].clone(); a[0] = b[0]; b[0] = t"],
    "inputs shuffled": ["np.random.RandomState(1).shuffle(d.batches[0][0].numpy())"],
    "bigger": ["d.batches[0] = tuple(torch.cat([t, t]) for t in d.batches[0])"],
    "loader's class": ["d.__class__ = type('Other', (Loader,), {'__iter__': lambda s: iter([s.batches[1]])})"],
    "data set, tensors": ["d.dataset.tensors[1].fill_(1)", "t = d.dataset.tensors; d.dataset.tensors = (t[0] * 2, t[1])", "d.dataset.tensors[0].mul_(-1)"],
}  # fmt: skip


@pytest.fixture(autouse=True)
def _class_and_global_as_before():
    yield
    GLOBAL["slope"], Net.power = 1.0, 1.0


@pytest.mark.parametrize("what, kind", [*rotate(CHANGES, "Hessian", "GGN"), *rotate(DATA, "Hessian", "EF")])
def test_operators_and_risks_follow(what, kind):
    c = MAKE.get(what.split(",")[0], case)()
    op, risk, truth = c.make(kind), EmpiricalRisk(c.model, c.loss, c.params, c.data, **c.options), c.truth(kind)
    v = real(op.shape[1])
    for code in ["", *(CHANGES | DATA)[what]]:
        change(c, code)
        before, truth = truth, c.truth(kind)
        assert torch.equal(before, truth) == (code == "") or "smoothing" in code
        for _ in range(2):
            close(op @ v, truth @ v)
        with differentiable(c.params) as leaves:
            value = c.risk(c.outputs())
            close(risk.value(), value)
            close(torch.cat([g.flatten() for g in risk.gradient()]), slopes(value, leaves))
    with op.linearized():
        close(op @ v, truth @ v)
    close(op.to_dense(), truth)


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


CONVERTED = {
    "m.float()": "float64 to float32",
    "m.a.weight.data = torch.ones(5, 3).double()": r"shape \(4, 3\) to shape \(5, 3\)",
}


@pytest.mark.parametrize("code, kind", rotate([*CONVERTED, *CONVERTED], *IMPLICIT, "KFAC"))
def test_a_parameter_that_is_converted(code, kind):
    c = case()
    op = used(c, kind)
    cross = op["a.*", "b.*"]
    with op.linearized():
        op @ real(op.shape[1])
        change(c, code)
        asks = [lambda: op @ real(op.shape[1]), lambda: cross @ real(cross.shape[1])]
        if kind == "KFAC":  # a snapshot, which goes on from data
            asks = [op.refresh, lambda: next(op.layers())]
        for ask in asks:
            with pytest.raises(
                ValueError, match=f"'a.weight'.*: converted from {CONVERTED[code]} since the operator was"
            ):
                ask()
    change(c, "m.double(); m.a.weight.data = torch.ones(4, 3).double()")
    op @ real(op.shape[1])


INSIDE = [
    "p['a.weight'].mul_(-1)",
    "m.load_state_dict(Net().state_dict())",
    "m.frozen.weight.mul_(2)",
    "m.norm.train()",
]
INSIDE += ["m.scale.mul_(2)", "m.norm.running_var.add_(1)", "m.train()", *CHANGES["optimizer"]]
# the second buffer may have the first one's `id`
INSIDE += [
    "m.scale = None; m.scale = torch.full((4,), 2.0)",
    "m.pair = (nn.Identity().eval(), 1.0)",
    "m.norm.eps = 0.5",
]
INSIDE += ["m.a.register_forward_hook(lambda *_: None)", "m.norm.forward = torch.sin"]


@pytest.mark.parametrize("code, kind", rotate(INSIDE, *IMPLICIT))
def test_inside_linearized_a_change_is_an_error(code, kind):
    c = case()
    op = c.make(kind)
    with op.linearized(), op.linearized():
        op @ torch.ones(op.shape[1])
        change(c, code)
        with pytest.raises((RuntimeError, ValueError), match="linearized"):
            op @ torch.ones(op.shape[1])
    c.model.eval()
    c.check(kind, op=op)


def test_inside_linearized_what_the_model_itself_changes_is_its_own():
    c = case()
    c.model.calls = 0
    c.model.register_forward_pre_hook(lambda module, _: setattr(module, "calls", module.calls + 1))
    op = c.make("GGN")
    with op.linearized():
        expected = op @ torch.ones(op.shape[1])
        c.model(next(iter(c.data))[0])
        torch.testing.assert_close(op @ torch.ones(op.shape[1]), expected)
        c.model.more = 1
        with pytest.raises(RuntimeError, match=r"more' has changed inside linearized"):
            op @ torch.ones(op.shape[1])


@pytest.mark.parametrize("kind", IMPLICIT)
@pytest.mark.parametrize("code", [*DATA["batches"], *DATA["labels shuffled"]])
def test_inside_linearized_other_data_are_an_error_if_they_are_met(code, kind):
    """And never a product of new batches with the old constant."""
    c = case()
    op = c.make(kind, memory_budget=1)
    with op.linearized():
        op @ torch.ones(op.shape[1])
        change(c, code)
        with pytest.raises(RuntimeError, match="other batches"):
            op @ torch.ones(op.shape[1])
    c.check(kind, op=op)


def test_inside_linearized_a_tensor_of_the_graph_that_changes_is_an_error():
    """And not a product of which one pass knows the old one and another the new one."""
    c = case()
    op = c.make("Hessian")
    with op.linearized():
        op @ torch.ones(op.shape[1])
        c.model.plain.mul_(2)
        with pytest.raises(RuntimeError, match="inplace"):
            op @ torch.ones(op.shape[1])


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
    assert [part() for part in parts] == [None] * 3


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.c = nn.Linear(3, 3), nn.Linear(3, 3)
        self.register_buffer("scale", torch.ones(3))

    def forward(self, X):
        return self.c((self.b if hasattr(self, "b") else self.a)(self.a(X).tanh()).tanh()) * self.scale


SHARES = {
    "tied": "n.b = nn.Linear(3, 3); n.b.weight, n.c.bias = n.a.weight, n.a.bias; n.b.register_buffer('scale', n.scale)",
    "attribute": "n.b = n.a",
    "list": "n.blocks, n.p = nn.ModuleList([n.a, nn.Sequential(n.a, n.c)]), [n.a]; n.table = {'a': n.a.weight}",
    "copy": "n.b = copy.copy(n.a)",
    "parameter": "n.weights = nn.ParameterList([n.a.weight, n.a.weight]); n.alias = n.c.bias",
    "itself": "n.__dict__['me'] = n; n.b = nn.Sequential(n.a, n.c); n.b.add_module('again', n.a)",
}


def shared(share):
    net = Shared()
    exec(SHARES[share], {"nn": nn, "copy": copy, "n": net})
    net.c.weight.requires_grad_(False)
    net.a.weight.grad = torch.ones(3, 3)
    return Case(net, CE, data())


@pytest.mark.parametrize("share, kinds", rotate(SHARES, *PAIRS, ("EF", "KFOC"), ("GGN", "KFAC")))
def test_nothing_is_swapped(share, kinds):
    c = shared(share)
    optimizer, before = torch.optim.SGD(c.model.parameters(), lr=0.1), picture(c.model)
    for kind in kinds:
        op = used(c, kind, check_deterministic=True)
        op @ torch.ones(op.shape[1], 40)
        c.check(*{kind} & {*KINDS}, op=op)
    risk = EmpiricalRisk(c.model, c.loss, c.params, c.data)
    assert torch.allclose(risk.value(), c.risk(c.outputs()))
    risk.gradient()
    assert picture(c.model) == before
    z = c.model(real(5, 3))
    optimizer.step()
    assert not torch.equal(c.model(real(5, 3)), z)
    c.check(kinds[0])


PLACES = ["module", "hook", "loss", "data", "backward"]


@pytest.mark.parametrize("kind", ["Hessian", "GGN", "EKFAC"])
@pytest.mark.parametrize("where, error", rotate(PLACES, KeyboardInterrupt, torch.OutOfMemoryError))
def test_after_failures(kind, error, where):
    c, left = shared("attribute"), [0]
    net, batches = c.model, c.data

    def fail(value=None, at=where):
        left[0] -= at == where
        if left[0] == 0 and at == where:
            raise error("stop")
        return value

    class Failing:
        def __iter__(self):
            return (fail(batch, "data") for batch in batches)

    c.loss, c.data, c.options = lambda z, y: fail(CE(z, y), "loss"), Failing(), {"reduction": "mean"}
    net.c.register_forward_pre_hook(lambda m, args: fail(args, "module"))
    net.c.register_forward_hook(lambda m, args, out: fail(out, "hook"))
    if where == "backward":
        net.a.register_forward_hook(lambda m, _, out: (out.requires_grad and out.register_hook(fail), out)[1])
    before, grads = picture(net), torch.is_grad_enabled()
    for at in (1, 2, 4):
        left[0] = at
        try:
            used(c, kind, check_deterministic=at == 4)
        except error:
            assert left[0] == 0
        assert picture(net) == before and torch.is_grad_enabled() == grads
        assert not torch.overrides._get_current_function_mode_stack()
    left[0] = 0
    c.check(kind)
