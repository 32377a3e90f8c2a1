"""Modules of every make, threads, copies, transforms; what cannot be right is a clear error."""

import copy
import pickle
import re
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from oracles import IMPLICIT, KINDS, Case, close, real
from torch import nn
from torch.func import grad, jvp, vmap
from torch.overrides import TorchFunctionMode

from trust.support import CE, CLEAR, Model, Net, data, labels, right_or_refused, rotate, used


def exported(net):
    sizes = ({0: torch.export.Dim("n", min=2, max=64)},)
    return torch.export.export(net, (real(5, 3),), dynamic_shapes=sizes).module()


def compiled(net):
    """As AOT autograd compiles: with buffers that its backward pass gives away, so that it never runs with a graph."""
    net = torch.compile(net, backend="aot_eager", dynamic=True)
    net(real(5, 3)).sum().backward()
    return net


MADE = {
    "fx": torch.fx.symbolic_trace,
    "export": exported,
    "averaged": torch.optim.swa_utils.AveragedModel,
    "data parallel": nn.DataParallel,
    "deep copy": copy.deepcopy,
    "unpickled": lambda net: pickle.loads(pickle.dumps(net)),
    "lazy": lambda net: nn.Sequential(nn.LazyLinear(4), nn.Tanh(), net.b),
    "scripted": torch.jit.script,
    "traced": lambda net: torch.jit.trace(net, real(5, 3)),
    "compiled": compiled,
}


@pytest.mark.parametrize("way, kinds", rotate(MADE, ("Hessian", "EKFAC"), ("GGN", "KFAC")))
def test_modules_of_every_make(way, kinds):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = MADE[way](Net())
        net(real(2, 3))
    case = Case(net, CE, data(), params={n: p for n, p in net.named_parameters() if p.requires_grad})
    plain = Case(getattr(net, "_orig_mod", net), CE, case.data, params=case.params)
    case.check(kinds[0], truth=plain.truth(kinds[0]))
    if kinds[1] == "KFAC":
        assert case.make("KFAC").to_dense().trace() > 0
    else:
        case.check(kinds[1], truth=plain.truth("GGN"))


@pytest.mark.parametrize("kind", ["Hessian", "GGN", "EKFAC"])
@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_cond(closed, kind):
    def cond(n, X):
        h = n.a(X)
        if closed:
            return torch.cond(X.sum() > 0, lambda t: n.b(t.tanh()), lambda t: n.b(t.sin()), (h,))
        return n.b(torch.cond(X.sum() > 0, lambda t: t.tanh(), lambda t: t.sin(), (h,)))

    case = Case(Model(cond), CE, data())
    plain = Model(lambda n, X: n.b((torch.tanh if X.sum() > 0 else torch.sin)(n.a(X))))
    plain.load_state_dict(case.model.state_dict())
    right_or_refused(case, kind, "cond", Case(plain, CE, case.data).truth(kind))


FORMS = {
    "x first": (lambda x, m: (x, m), lambda X: len(X[0]), lambda X: X),
    "mask first": (lambda x, m: (m, x), lambda X: len(X[1]), lambda X: X[::-1]),
    "mapping": (lambda x, m: {"x": x, "m": m}, lambda X: len(X["x"]), lambda X: (X["x"], X["m"])),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes, kind", rotate([(4, 4), (4, 3), (2, 4)], "Hessian", "GGN", "EKFAC"))
def test_a_mask_as_long_as_the_batch(sizes, kind, form):
    pack, size, unpack = FORMS[form]
    mask = real(4, 4, seed=8).softmax(1)
    net = Model(lambda n, X: n.b((unpack(X)[1] @ n.a(unpack(X)[0]).tanh()).mean(1)))
    batches = [(pack(real(n, 4, 3, seed=n), mask), labels(n)) for n in sizes]
    Case(net, CE, batches, {"batch_size_fn": size}).check(kind)
    right_or_refused(Case(net, CE, batches), kind, "batch_size_fn")


OBJECTIVES = {
    "own mean": (lambda z, y: F.cross_entropy(z, y), {"reduction": "mean"}, labels),
    "cross-entropy": (CE, {}, labels),
    "huber": (nn.HuberLoss(), {}, lambda n: real(n, 3, seed=4)),
}


@pytest.mark.parametrize("sizes", [(4, 2), (5, 5), (5, 2), (1, 4)], ids=str)
@pytest.mark.parametrize("objective, kind", rotate(OBJECTIVES, "EKFAC", "GGN", "Hessian"))
@pytest.mark.filterwarnings("ignore:Using a target size")  # of joining along the wrong axis, which is tried
def test_sequence_first_without_batch_size_fn(objective, sizes, kind):
    loss, options, y = OBJECTIVES[objective]
    net = Model(lambda n, X: n.b(n.a(X).tanh().mean(0)))
    batches = [(real(5, n, 3, seed=n), y(n)) for n in sizes]
    Case(net, loss, batches, {**options, "batch_size_fn": lambda X: X.shape[1]}).check(kind)
    right_or_refused(Case(net, loss, batches, options), kind, "batch_size_fn|reduction")


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


def test_training_in_another_thread_feels_nothing():
    """Checkpoints, substitutions and modes are those of our own thread."""
    case, other, stop, wrong = Case(Net(), CE, data()), Net(), threading.Event(), []
    calls, plain = [], other.b.forward
    other.b.forward = lambda h: (calls.append(torch.is_grad_enabled()), plain(h))[1]

    def gradient():
        calls.clear()
        out = torch.utils.checkpoint.checkpoint(other, real(5, 3), use_reentrant=False).square().sum()
        return torch.autograd.grad(out, other.a.weight)[0].tolist(), list(calls)

    def train():
        while not stop.is_set():
            wrong.extend([1] * (gradient() != expected))

    expected = gradient()
    thread = threading.Thread(target=train)
    thread.start()
    for kind in ("Hessian", "GGN", "EKFAC") * 3:
        case.make(kind) @ torch.ones(31)
    stop.set()
    thread.join()
    assert not wrong


@pytest.mark.parametrize("how", [lambda op: pickle.loads(pickle.dumps(op)), copy.copy, copy.deepcopy])
@pytest.mark.parametrize("kind", ["Hessian", "GGN", "EKFAC"])
def test_copies(how, kind):
    case = Case(Net(), CE, data())
    op = used(case, kind)
    try:
        twin = how(op)
    except CLEAR as error:
        assert op.name in str(error)
    else:
        case.check(kind, op=twin)
        case.check(kind, op=op)


def backward(f, v, w):
    """Half the gradient of wᵀ f(v): where v = w, half of it is v's."""
    v = v.clone().requires_grad_()
    (slope,) = torch.autograd.grad(((v if w is None else w) * f(v)).sum(), v)
    return slope / 2 if w is None else slope


TRANSFORMS = {
    "vmap": lambda f, v: vmap(f)(torch.stack([v, 2 * v]))[1] / 2,
    "jvp": lambda f, v: jvp(f, (v,), (v,))[1],
    "grad": lambda f, v: grad(lambda t: t @ f(t))(v) / 2,
    "jacrev": lambda f, v: torch.func.jacrev(f)(v) @ v,
    "backward": lambda f, v: backward(f, v, None),
    "backward of a constant": lambda f, v: backward(f, v, v.clone()),
}


@pytest.mark.parametrize("kind", [*IMPLICIT, "EKFAC"])
@pytest.mark.parametrize("way", TRANSFORMS)
def test_inside_a_transform(way, kind):
    op, v = Case(Net(), CE, data()).make(kind), real(31, seed=2)
    expected = op @ v
    with torch.no_grad():
        close(op @ v.clone().requires_grad_(), expected)
    try:
        found = TRANSFORMS[way](lambda t: op @ t, v)
    except CLEAR as error:
        assert re.search(r"detach|no_grad|torch\.func|vmap|transform|differentia", str(error)) and op.name in str(error)
    else:
        close(found, expected)


class Own(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


AROUND = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default device": lambda: torch.device("cpu"),
    "function mode": Own,
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


class Empty(nn.Module):
    """As in MobileBERT: a tensor without entries."""

    def __init__(self):
        super().__init__()
        self.a, self.none, self.b = nn.Linear(3, 4), nn.Parameter(torch.ones(0, 4)), nn.Linear(4, 3)

    def forward(self, X):
        h = self.a(X)
        return self.b(torch.cat([h, F.linear(h, self.none)], 1).tanh()) + F.linear(h[:, :0], self.b.weight[:, :0])


def test_tensors_without_entries():
    Case(Empty(), CE, data()).check(*KINDS)
