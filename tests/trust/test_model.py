"""A weight is a weight by whatever path the model or the loss reaches it, in modules of every make and in any context."""

import copy
import functools
import pickle
import threading
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from oracles import IMPLICIT, KINDS, Case, close, real
from torch import nn
from torch.func import functional_call, vmap
from torch.nn.utils import parametrizations, parametrize
from torch.overrides import BaseTorchFunctionMode
from torch.utils.checkpoint import checkpoint

from trust.support import CE, CLEAR, Model, Net, data, labels, right_or_refused, rotate, times, used

GLOBAL = {}


def net_with(reach):
    net = Net()
    second = reach(net)
    net.forward = lambda X: second(net.a(X).tanh())
    return net


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
    def force(h):
        with torch.enable_grad():
            x = h if h.requires_grad else h.detach().requires_grad_()
            return torch.autograd.grad(net.b(x).tanh().square().sum(), x, create_graph=True)[0][:, :3]

    return force


def without_entries(net):
    """As in MobileBERT: a tensor that holds nothing; and slices that do."""
    net.none, net.p = nn.Parameter(torch.ones(0, 4)), nn.Parameter(torch.tensor([0.3, -0.7, 1.1]))

    def use(h):
        z = net.b(torch.cat([h, F.linear(h, net.none)], 1)) + F.linear(h[:, :0], net.b.weight[:, :0])
        return torch.cat([z, h @ net.b.weight[:0].T], 1) * net.p.split([3, 0])[0] + net.p[2:2].sum()

    return use


def bind(tensor, use):
    return lambda h: use(h, tensor)


REACH = {
    "plain list": lambda n: bind([n.b.weight], lambda h, w: F.linear(h, w[0])),
    "closure": lambda n: bind(n.b.weight, F.linear),
    "partial": lambda n: functools.partial(F.linear, weight=n.b.weight, bias=n.b.bias),
    "bound method": lambda n: n.b.forward,
    "weak reference": lambda n: bind(weakref.ref(n.b.weight), lambda h, w: F.linear(h, w())),
    "global": lambda n: GLOBAL.update(w=n.b.weight) or (lambda h: F.linear(h, GLOBAL["w"])),
    "__dict__": lambda n: n.__dict__.update(w=n.b.weight) or (lambda h: F.linear(h, n.w, n.b.bias)),
    "view made before": lambda n: bind(n.b.weight.view(-1), lambda h, w: h @ w.view(3, 4).T),
    "rows made before": lambda n: bind(list(n.b.weight), lambda h, rows: torch.stack([h @ row for row in rows], 1)),
    "transpose made before": lambda n: bind(n.b.weight.T, torch.matmul),
    "forward hook": lambda n: n.b.register_forward_hook(lambda m, _, h: h + F.linear(h, n.a.weight)[:, :3]) and n.b,
    "pre-hook": lambda n: n.b.register_forward_pre_hook(lambda m, args: (args[0] * n.a.bias,)) and n.b,
    "attribute set by a hook": by_setting_hook,
    "in place": lambda n: lambda h: n.b(h).mul_(2).add_(n.b.bias).tanh_(),
    "by Fourier transform": lambda n: lambda h: (torch.fft.rfft(h) @ torch.fft.rfft(n.b.weight).mH).real,
    "autograd.Function": lambda n: lambda h: times(h, n.b.weight) + n.b.bias,
    "autograd.Function and list": lambda n: bind([n.b.weight], lambda h, w: times(h, w[0])),
    "shallow copy of a module": by_shallow_copy,
    "checkpoint": lambda n: lambda h: checkpoint(n.b, h, use_reentrant=False),
    "checkpoint of a closure": lambda n: lambda h: checkpoint(lambda t: n.b(t.sin()), h, use_reentrant=False),
    "vmap inside": lambda n: lambda h: vmap(lambda w, b: h @ w + b, out_dims=1)(n.b.weight, n.b.bias),
    "functional_call inside": lambda n: lambda h: functional_call(n.b, {"weight": n.b.weight * n.a.bias}, (h,)),
    "gradient inside": by_force,
    "penalty on all": lambda n: lambda h: n.b(h) * sum(p.square().sum() for p in n.parameters()),
    "detached scale": lambda n: lambda h: n.b(h) / n.b.weight.detach().norm(),
    "straight-through": lambda n: lambda h: F.linear(h, n.b.weight + (n.b.weight.sign() - n.b.weight).detach()),
    "straight-through activation": lambda n: lambda h: n.b(h + (h.sign() - h).detach() * 0.5),
    "tied to its transpose": lambda n: lambda h: (torch.sigmoid(n.b(h)) @ n.b.weight).sin()[:, :3] + n.a.bias[:3],
    "two heads and a mask": lambda n: lambda h: n.b(h) + torch.tensor([1.0, 0.0, 1.0]) * F.linear(h, n.a.weight.T),
    "siamese": lambda n: lambda h: (n.b(h) - n.b(h.flip(1))).abs() * n.b(h.roll(1, 1)),
    "bilinear": lambda n: lambda h: n.b(h) * F.bilinear(h, n.b(h), torch.stack([n.a.weight] * 3)),
    "parametrized": lambda n: parametrize.register_parametrization(n.b, "weight", Exp()),
    "orthogonal": lambda n: parametrizations.orthogonal(n.b),
    "spectral norm": lambda n: parametrizations.spectral_norm(n.b).eval(),
    "without entries": without_entries,
}


@pytest.mark.parametrize("way, kinds", rotate(REACH))
def test_in_the_model(way, kinds):
    Case(net_with(REACH[way]), CE, data()).check(*kinds)


@pytest.mark.parametrize("kind", KINDS)
def test_cached_parametrizations(kind):
    case = Case(net_with(REACH["parametrized"]), CE, data())
    truth = case.truth(kind)
    with parametrize.cached():
        case.check(kind, truth=truth)


def test_gradients_that_a_table_scales_are_no_derivatives():
    net = net_with(
        lambda n: lambda h: n.b(h + F.embedding((h[:, 0] > 0).long(), n.a.weight.T, scale_grad_by_freq=scaled))
    )
    scaled = False
    case = Case(net, CE, data())
    truths = {kind: case.truth(kind) for kind in ("Hessian", "GGN")}
    scaled = True
    for kind, truth in truths.items():
        case.check(kind, truth=truth)
    case.check("GGNDiagonal", truth=truths["GGN"])


def test_other_parameters():
    net, hidden = net_with(REACH["plain list"]), nn.Linear(4, 3)
    net.b.requires_grad_(False)
    Case(net, CE, data(), params={"b.weight": net.b.weight, "a.bias": net.a.bias}).check(*KINDS)
    assert not net.b.weight.requires_grad and net.a.weight.grad is None
    params = {"a.weight": net.a.weight, "b.weight": net.b.weight, "b.bias": net.b.bias}
    past = Case(lambda p, X: F.linear((X @ p["a.weight"].T).tanh(), net.b.weight, p["b.bias"]), CE, data(), {}, params)
    past.check(*KINDS)
    net = net_with(lambda n: hidden.forward)
    right_or_refused(Case(net, CE, data(), params={"hidden.w": hidden.weight, "a.bias": net.a.bias}), KINDS, "hidden.w")


COPIES = {
    "detached": lambda net: {n: p.detach() for n, p in net.named_parameters()},
    "state_dict": lambda net: dict(net.state_dict()),
    "clones": lambda net: {n: p.clone() for n, p in net.named_parameters()},
    "other values": lambda net: {n: (p + 0.3).detach() for n, p in net.named_parameters()},
    "rows": lambda net: {"a.weight": net.a.weight[:2]},
}


@pytest.mark.parametrize("how, kinds", rotate(COPIES))
def test_copies_of_the_parameters(how, kinds):
    """They stand in for the parameters of their name, or are refused; never constants."""
    net = Net()
    case, twin = Case(net, CE, data(), params=COPIES[how](net)), copy.deepcopy(net)
    if how != "rows":
        twin.load_state_dict(case.params)
    for kind in kinds:
        right_or_refused(case, [kind], "weight", Case(twin, CE, data()).truth(kind))


class Tempered(nn.Module):
    def __init__(self, _):
        super().__init__()
        self.log_t = nn.Parameter(torch.tensor(0.3))

    def forward(self, z, y):
        return F.cross_entropy(z * self.log_t.exp(), y)


class Regularised(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.of = [net]

    def forward(self, z, y):
        return F.cross_entropy(z, y) + 0.1 * sum(p.square().sum() + p.sum().sin() for p in self.of[0].parameters())


LOSSES = {
    "module with a regulariser": Regularised,
    "parameter of its own": Tempered,
    "closure with a regulariser": lambda n: lambda z, y: F.cross_entropy(z, y) + n.a.weight.pow(4).sum(),
    "temperature": lambda n: lambda z, y: F.cross_entropy(z * n.a.bias.exp().sum(), y),
    "partial": lambda n: functools.partial(lambda z, y, w: F.cross_entropy(z + w, y), w=n.b.bias),
    "margin by a weight": lambda n: lambda z, y: (z.gather(1, y[:, None]) - n.b.weight.norm()).cosh().mean(),
}


@pytest.mark.parametrize("way", LOSSES)
def test_in_the_loss(way):
    net = Net()
    case = Case(net, LOSSES[way](net), data(), {"reduction": "mean"})
    case.check("Hessian", "GGN", "GGNDiagonal")
    if way == "parameter of its own":
        case.params["log_t"] = case.loss.log_t
        right_or_refused(case, ["Hessian"], "log_t")


def compiled(net):
    """As AOT autograd compiles: with buffers that its backward pass gives away, so that it never runs with a graph."""
    net = torch.compile(net, backend="aot_eager", dynamic=True)
    net(real(5, 3)).sum().backward()
    return net


SIZES = ({0: torch.export.Dim("n", min=2, max=64)},)
MADE = {
    "fx": torch.fx.symbolic_trace,
    "export": lambda net: torch.export.export(net, (real(5, 3),), dynamic_shapes=SIZES).module(),
    "averaged": torch.optim.swa_utils.AveragedModel,
    "lazy": lambda net: nn.Sequential(nn.LazyLinear(4), nn.Tanh(), net.b),
    "scripted": torch.jit.script,
    "traced": lambda net: torch.jit.trace(net, real(5, 3)),
    "compiled": compiled,
    "compiled inside": lambda net: nn.Sequential(torch.compile(net.a, backend="aot_eager"), nn.Tanh(), net.b),
    "compiled in place": lambda net: net.compile(backend="aot_eager") or net,
    "data parallel": nn.DataParallel,
}


@pytest.mark.parametrize("way, kinds", rotate(MADE, ("Hessian", "EKFAC"), ("GGN", "EKFAC")))
def test_modules_of_every_make(way, kinds):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = MADE[way](Net())
        net(real(2, 3))
    case = Case(net, CE, data(), params={n: p for n, p in net.named_parameters() if p.requires_grad})
    for kind in kinds:
        with torch.compiler.set_stance("force_eager"):  # compiled code has no second derivatives
            truth = case.truth(kind)
        case.check(kind, truth=truth)
    assert case.make("KFAC").to_dense().trace() > 0
    if way == "compiled":  # names without the prefix `_orig_mod.`
        plain = Case(net._orig_mod, CE, data())
        Case(net, CE, data(), params=plain.params).check("GGN", "EKFAC", truth=plain.truth("GGN"))


@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_cond(closed):
    def cond(n, X):
        if closed:
            return torch.cond(X.sum() > 0, lambda t: n.b(t.tanh()), lambda t: n.b(t.sin()), (n.a(X),))
        return n.b(torch.cond(X.sum() > 0, lambda t: t.tanh(), lambda t: t.sin(), (n.a(X),)))

    case = Case(Model(cond), CE, data())
    plain = Model(lambda n, X: n.b((torch.tanh if X.sum() > 0 else torch.sin)(n.a(X))))
    plain.load_state_dict(case.model.state_dict())
    for kind in ("Hessian", "GGN", "EKFAC"):
        right_or_refused(case, [kind], "cond", Case(plain, CE, case.data).truth(kind))


@pytest.mark.parametrize("kind", ["Hessian", "GGN", "EKFAC"])
@pytest.mark.parametrize("first, sizes", rotate(["x", "mask"], (4, 4), (2, 4)))
def test_a_mask_as_long_as_the_batch(first, sizes, kind):
    def run(n, X):
        mask, x = X if first == "mask" else X[::-1]
        return n.b((mask @ n.a(x).tanh()).mean(1))

    mask, at = real(4, 4, seed=8).softmax(1), int(first == "mask")
    batches = [((mask, real(n, 4, 3, seed=n))[:: 1 if at else -1], labels(n)) for n in sizes]
    case = Case(Model(run), CE, batches, {"batch_size_fn": lambda X: len(X[at])})
    case.check(kind)
    assert "whole" not in str(case.make("KFAC").explain())
    right_or_refused(Case(Model(run), CE, batches), [kind], "batch_size_fn")


OBJECTIVES = {
    "own mean": (lambda z, y: F.cross_entropy(z, y), {"reduction": "mean"}, labels),
    "cross-entropy": (CE, {}, labels),
    "huber": (nn.HuberLoss(), {}, lambda n: real(n, 3, seed=4)),
}


@pytest.mark.parametrize("sizes, kind", rotate([(4, 2), (5, 5), (5, 2), (1, 4)], "EKFAC", "GGN", "Hessian"))
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.filterwarnings("ignore:Using a target size")  # of joining along the wrong axis, which is tried
def test_sequence_first_without_batch_size_fn(objective, sizes, kind):
    loss, options, y = OBJECTIVES[objective]
    net = Model(lambda n, X: n.b(n.a(X).tanh().mean(0)))
    batches = [(real(5, n, 3, seed=n), y(n)) for n in sizes]
    Case(net, loss, batches, {**options, "batch_size_fn": lambda X: X.shape[1]}).check(kind)
    right_or_refused(Case(net, loss, batches, options), [kind], "batch_size_fn|reduction")


@pytest.mark.parametrize("kind, frozen", rotate(IMPLICIT, False, True))
def test_eight_threads(frozen, kind):
    case = Case(Net().requires_grad_(not frozen), CE, data())
    op, truth, together = case.make(kind), case.truth(kind), threading.Barrier(8)

    def work(seed):
        v = real(op.shape[1], seed=seed)
        together.wait(60)
        for _ in range(4):
            close(op @ v, truth @ v)
        close(op.to_dense(), truth)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert all(p.requires_grad != frozen for p in case.params.values())


@pytest.mark.parametrize("budget", [None, 0], ids=["kept", "computed anew"])
@pytest.mark.parametrize("kind", ["Hessian", "GGN"])
def test_threads_that_share_what_is_kept(kind, budget):
    """Each opens and closes the context for itself, at times that overlap, and `eigenpairs` one of its own."""
    case = Case(Net(), CE, data())
    op, truth, together = case.make(kind, memory_budget=budget), case.truth(kind), threading.Barrier(4)
    largest = torch.linalg.eigvalsh(truth)[-1:]

    def work(seed):
        v = real(op.shape[1], seed=seed)
        together.wait(60)
        for _ in range(4):
            with op.linearized():
                close(op @ v, truth @ v)
                close((op @ op) @ v, truth @ (truth @ v))
        close(op.eigenpairs(1).values, largest)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert op._kept is None and not op._open


def test_training_in_another_thread_feels_nothing():
    case, other, stop = Case(Net(), CE, data()), Net(), threading.Event()
    calls, plain = [], other.b.forward
    other.b.forward = lambda h: (calls.append(torch.is_grad_enabled()), plain(h))[1]

    def gradient():
        calls.clear()
        out = checkpoint(other, real(5, 3), use_reentrant=False).square().sum()
        return torch.autograd.grad(out, other.a.weight)[0].tolist(), list(calls)

    def train():
        found = []
        while not stop.is_set():
            found.append(gradient())
        return found

    expected = gradient()
    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(train)
        for kind in ("Hessian", "GGN", "EKFAC") * 3:
            used(case, kind)
        stop.set()
    assert all(found == expected for found in training.result())


@pytest.mark.parametrize("kind", ["Hessian", "GGN", "EKFAC"])
def test_copies(kind):
    case = Case(Net(), CE, data())
    op = used(case, kind)
    for copied in (lambda op: pickle.loads(pickle.dumps(op)), copy.copy, copy.deepcopy):
        try:
            twin = copied(op)
        except CLEAR as error:
            assert op.name in str(error)
        else:
            case.check(kind, op=twin)
    case.check(kind, op=op)


AROUND = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default device": lambda: torch.device("cpu"),
    "function mode": BaseTorchFunctionMode,
    "saved tensors elsewhere": torch.autograd.graph.save_on_cpu,
    "one thread": lambda: torch.autograd.set_multithreading_enabled(False),
    "attention's backend": lambda: torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
}


@pytest.mark.parametrize("around, kinds", rotate(AROUND))
def test_inside_a_context(around, kinds):
    case = Case(Net(), CE, data())
    for kind in kinds:
        op, truth = case.make(kind), case.truth(kind)
        with AROUND[around]():
            if around != "autocast":  # whose precision is then the model's
                case.check(kind, truth=truth)
                case.check(kind, op=op, truth=truth)
            op @ torch.ones(31)
        case.check(kind, op=op, truth=truth)
