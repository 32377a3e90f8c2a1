"""Modules of every make, threads, copies, transforms; what cannot be right is a clear error, what is doubtful a warning."""

import copy
import pickle
import re
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad, jvp, vmap

import curvops
from trust.oracle import IMPLICIT, KINDS, Case, close, labels, real

CLEAR = (TypeError, ValueError, RuntimeError, NotImplementedError, pickle.PicklingError)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, X):
        return self.b(self.a(X).tanh())


def data():
    return [(real(5, 3), labels(5)), (real(4, 3, seed=1), labels(4))]


def exported(net):
    sizes = ({0: torch.export.Dim("n", min=2, max=64)},)
    return torch.export.export(net, (real(5, 3),), dynamic_shapes=sizes).module()


def wrapped(net):
    return torch.optim.swa_utils.AveragedModel(net)


MADE = {
    "fx": torch.fx.symbolic_trace,
    "export": exported,
    "averaged": wrapped,
    "data parallel": nn.DataParallel,
    "deep copy": copy.deepcopy,
    "unpickled": lambda net: pickle.loads(pickle.dumps(net)),
    "lazy": lambda net: nn.Sequential(nn.LazyLinear(4), nn.Tanh(), net.b),
    "scripted": lambda net: torch.jit.script(net),
    "traced": lambda net: torch.jit.trace(net, real(5, 3)),
    "compiled": lambda net: torch.compile(net, backend="eager"),
}


def make(way):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = MADE[way](Net())
        net(real(2, 3))
    return net


@pytest.mark.parametrize("kind", ["Hessian", "GGN", "EKFAC"])
@pytest.mark.parametrize("way", MADE)
def test_modules_of_every_make(way, kind):
    net = make(way)
    case = Case(net, nn.CrossEntropyLoss(), data(), params={n: p for n, p in net.named_parameters() if p.requires_grad})
    truth = Case(getattr(net, "_orig_mod", net), case.loss, case.data, params=case.params).truth(kind)
    case.check(kind, truth=truth)


@pytest.mark.parametrize("kind", ["Hessian", "GGN", "KFAC", "EKFAC"])
def test_compiled_with_donated_buffers(kind):
    """As AOT autograd compiles: its backward pass runs once, and never with a graph."""
    net, case = Net(), None
    case = Case(net, nn.CrossEntropyLoss(), data())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(net, backend="aot_eager", dynamic=True)
        compiled(data()[0][0]).sum().backward()
    twin = Case(compiled, case.loss, case.data, params=dict(compiled.named_parameters()))
    if kind == "KFAC":
        twin.make(kind).to_dense()
    else:
        twin.check(kind, truth=case.truth(kind))


class Cond(nn.Module):
    def __init__(self, closed):
        super().__init__()
        self.a, self.b, self.closed = nn.Linear(3, 4), nn.Linear(4, 3), closed

    def forward(self, X):
        h = self.a(X)
        if self.closed:
            return torch.cond(X.sum() > 0, lambda t: self.b(t.tanh()), lambda t: self.b(t.sin()), (h,))
        return self.b(torch.cond(X.sum() > 0, lambda t: t.tanh(), lambda t: t.sin(), (h,)))


@pytest.mark.parametrize("kind", ["Hessian", "GGN", "EKFAC"])
@pytest.mark.parametrize("closed", [True, False])
def test_cond(closed, kind):
    net, plain = Cond(closed), Net()
    plain.load_state_dict(net.state_dict())
    plain.forward = lambda X: plain.b((torch.tanh if X.sum() > 0 else torch.sin)(plain.a(X)))
    case = Case(net, nn.CrossEntropyLoss(), data())
    truth = Case(plain, case.loss, case.data).truth(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler
        try:
            op = case.make(kind)
            op @ torch.ones(op.shape[1])
        except CLEAR as error:
            assert "cond" in str(error)
        else:
            case.check(kind, op, truth)


class Masked(nn.Module):
    def __init__(self, first):
        super().__init__()
        self.a, self.b, self.first = nn.Linear(3, 4), nn.Linear(4, 3), first

    def forward(self, X):
        x, mask = (X if self.first == "x" else X[::-1]) if isinstance(X, tuple) else (X["x"], X["mask"])
        return self.b((mask.softmax(-1) @ self.a(x).tanh()).mean(1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["x", "mask", "dict"])
@pytest.mark.parametrize("sizes", [(4, 4), (4, 3), (2, 4)], ids=str)
def test_a_mask_as_long_as_the_batch(sizes, form, kind):
    mask = real(4, 4, seed=8)
    xs = [real(n, 4, 3, seed=n) for n in sizes]
    pack = {"x": lambda x: (x, mask), "mask": lambda x: (mask, x), "dict": lambda x: {"x": x, "mask": mask}}[form]
    size = lambda X: len(X["x"] if form == "dict" else X[form == "mask"])  # noqa: E731
    batches = [(pack(x), labels(n)) for x, n in zip(xs, sizes, strict=True)]
    Case(Masked(form), nn.CrossEntropyLoss(), batches, {"batch_size_fn": size}).check(kind)
    without = Case(Masked(form), nn.CrossEntropyLoss(), batches)
    try:
        op = without.make(kind)
        op @ torch.ones(op.shape[1])
    except ValueError as error:
        assert "batch_size_fn" in str(error)
    else:
        without.check(kind, op)


class SequenceFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, X):
        return self.b(self.a(X).tanh().mean(0))


MEAN = (lambda z, y: F.cross_entropy(z, y), {"reduction": "mean"})
OBJECTIVES = [MEAN, (nn.CrossEntropyLoss(), {}), (nn.MSELoss(), {}), (nn.HuberLoss(), {})]


@pytest.mark.parametrize("kind", ["Hessian", "GGN", "EKFAC", "GGNDiagonal"])
@pytest.mark.parametrize("sizes", [(4, 2), (5, 5), (5, 2), (1, 4)], ids=str)
@pytest.mark.parametrize("objective", range(len(OBJECTIVES)))
def test_sequence_first_without_batch_size_fn(objective, sizes, kind):
    loss, options = OBJECTIVES[objective]
    y = labels if objective < 2 else (lambda n: real(n, 3, seed=4))
    case = Case(SequenceFirst(), loss, [(real(5, n, 3, seed=n), y(n)) for n in sizes], options)
    Case(case.model, loss, case.data, {**options, "batch_size_fn": lambda X: X.shape[1]}).check(kind)
    try:
        op = case.make(kind)
        op @ torch.ones(op.shape[1])
    except ValueError as error:
        assert re.search("batch_size_fn|reduction", str(error))
    else:
        case.check(kind, op)


@pytest.mark.parametrize("kind", ["Hessian", "GGN", "EF"])
def test_eight_threads(kind):
    case = Case(Net(), nn.CrossEntropyLoss(), data())
    op, truth, errors = case.make(kind), case.truth(kind), []

    def work(seed):
        try:
            v = real(op.shape[1], seed=seed)
            for _ in range(4):
                close(op @ v, truth @ v)
            close(op.to_dense(), truth)
        except BaseException as error:  # reported below
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors


def test_training_in_another_thread_feels_nothing():
    """Checkpointing, modes and gradients of a model elsewhere are as without us."""
    case, other = Case(Net(), nn.CrossEntropyLoss(), data()), Net()
    X, saved, stop, wrong = real(5, 3), [], threading.Event(), []

    def gradient():
        calls = []
        other.b.forward = lambda h: (calls.append(1), F.linear(h, other.b.weight, other.b.bias))[1]
        out = torch.utils.checkpoint.checkpoint(other, X, use_reentrant=False).square().sum()
        return torch.autograd.grad(out, other.a.weight)[0], len(calls), torch.is_grad_enabled()

    expected = gradient()

    def train():
        while not stop.is_set():
            found = gradient()
            if not torch.equal(found[0], expected[0]) or found[1:] != expected[1:]:
                wrong.append(found)

    thread = threading.Thread(target=train)
    thread.start()
    for kind in ("Hessian", "GGN", "EKFAC"):
        for _ in range(3):
            case.make(kind) @ torch.ones(31)
    stop.set()
    thread.join()
    assert not wrong and not saved


@pytest.mark.parametrize("kind", [*IMPLICIT, "EKFAC"])
@pytest.mark.parametrize("how", ["pickle", "copy", "deepcopy"])
def test_copies(how, kind):
    case = Case(Net(), nn.CrossEntropyLoss(), data())
    op = case.make(kind)
    op @ torch.ones(op.shape[1])
    do = {"pickle": lambda o: pickle.loads(pickle.dumps(o)), "copy": copy.copy, "deepcopy": copy.deepcopy}[how]
    try:
        twin = do(op)
    except CLEAR as error:
        assert op.name in str(error)
    else:
        case.check(kind, twin)
        case.check(kind, op)


TRANSFORMS = {
    "vmap": lambda f, v: vmap(f)(torch.stack([v, 2 * v]))[1] / 2,
    "jvp": lambda f, v: jvp(f, (v,), (v,))[1],
    "grad": lambda f, v: grad(lambda t: t @ f(t))(v) / 2,
    "jacrev": lambda f, v: torch.func.jacrev(f)(v) @ v,
    "backward": lambda f, v: backward(f, v),
    "backward, dict": lambda f, v: backward(lambda t: f({"a": t[:10], "b": t[10:]})["a"], v),
    "one backward": lambda f, v: backward(f, v, w=v.clone()),
}


def backward(f, v, w=None):
    """Half the gradient of ½ wᵀ f(v) counts for w, half for v."""
    v = v.clone().requires_grad_()
    (slope,) = torch.autograd.grad(((v if w is None else w) * f(v)).sum(), v)
    return slope / 2 if w is None else slope


@pytest.mark.parametrize("kind", [*IMPLICIT, "EKFAC"])
@pytest.mark.parametrize("way", [w for w in TRANSFORMS if "dict" not in w])
def test_inside_a_transform(way, kind):
    case = Case(Net(), nn.CrossEntropyLoss(), data())
    op, v = case.make(kind), real(31, seed=2)
    expected = op @ v
    try:
        found = TRANSFORMS[way](lambda t: op @ t, v)
    except CLEAR as error:
        assert re.search(r"detach|no_grad|torch\.func|vmap|transform|differentia", str(error)) and op.name in str(error)
    else:
        close(found, expected)
    with torch.no_grad():
        close(op @ v.clone().requires_grad_(), expected)
        op @ list(case.params.values())


def half(h):
    if h.requires_grad:
        h.register_hook(lambda g: g / 2)
    return h


ALTERED = {
    "hook on a tensor": lambda net: lambda X: net.b(half(net.a(X)).tanh()),
    "full backward hook": lambda net: net,
    "own backward": lambda net: lambda X: net.b(Reversed.apply(net.a(X)).tanh()),
}


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return -g


def altered(way):
    net = Net()
    if way == "full backward hook":
        net.b.register_full_backward_hook(lambda m, gi, go: (2 * gi[0],))
    else:
        net.forward = ALTERED[way](net)
    return net


@pytest.mark.parametrize("kind", [*IMPLICIT, "EKFAC"])
@pytest.mark.parametrize("way", ALTERED)
def test_altered_gradients_are_warned_of(way, kind):
    with pytest.warns(RuntimeWarning, match="central differences"):
        op = Case(altered(way), nn.CrossEntropyLoss(), data()).make(kind, check_deterministic=True)
        op @ torch.ones(op.shape[1])


def ending(how):
    model, loss = Net(), nn.NLLLoss()
    if how == "log-softmax":
        model = nn.Sequential(model, nn.LogSoftmax(1))
    if how == "own loss":
        model, loss = nn.Sequential(model, nn.Flatten()), lambda z, y: z.mean()
        net, inner = model, model[0]
        model.forward = lambda X: inner(X).logsumexp(1).square()
        return Case(net, loss, data(), {"reduction": "mean"})
    if how == "linear loss":
        loss = lambda z, y: z.sum()  # noqa: E731
        return Case(model, loss, data(), {"reduction": "sum"})
    return Case(model, loss, data())


@pytest.mark.parametrize("kind", ["GGN", "GGNDiagonal", "EKFAC"])
@pytest.mark.parametrize("how", ["log-softmax", "own loss", "linear loss"])
def test_a_curvature_that_is_zero_is_warned_of(how, kind):
    case = ending(how)
    with pytest.warns(Warning, match="zero|linear"):
        op = case.make(kind, check_deterministic=True)
        op @ torch.ones(op.shape[1])
    case.check("Hessian")


@pytest.mark.parametrize("kind", [*IMPLICIT, "KFAC", "EKFAC"])
@pytest.mark.parametrize("what", ["X", "y", "later X", "infinite", "parameter", "diverges"])
def test_what_is_not_finite_is_warned_of(what, kind):
    batches, net = data(), Net()
    loss = nn.MSELoss() if what == "y" else nn.CrossEntropyLoss()
    if what == "y":
        batches = [(X, real(len(X), 3)) for X, _ in batches]
        batches[1][1][0, 0] = torch.nan
    if what in ("X", "later X", "infinite"):
        batches[what != "X"][0][0, 0] = torch.inf if what == "infinite" else torch.nan
    if what == "parameter":
        net.a.weight.data[0, 0] = torch.nan
    if what == "diverges":
        net.forward = lambda X: net.b(net.a(X).exp().exp().exp().exp())
    try:
        with pytest.warns(Warning, match="(?i)finite|nan|inf"):
            op = Case(net, loss, batches).make(kind, check_deterministic=True)
            op @ torch.ones(op.shape[1])
    except (ValueError, RuntimeError, ArithmeticError) as error:
        assert re.search("(?i)finite|nan|inf", str(error))  # noqa: PT017


class Normed(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(3, 4), norm, nn.Linear(4, 3)

    def forward(self, X):
        return self.b(self.norm(self.a(X)).tanh())


@pytest.mark.parametrize("kind", [*IMPLICIT, "KFAC", "EKFAC", "GGNDiagonal"])
@pytest.mark.parametrize("stats", [True, False])
def test_batch_norm_in_train_mode_is_warned_of(stats, kind):
    case = Case(Normed(nn.BatchNorm1d(4, track_running_stats=stats)), nn.CrossEntropyLoss(), data())
    with pytest.warns(Warning, match="(?i)batch.?norm"):
        op = case.make(kind, check_deterministic=True)
    if kind != "KFAC" and not stats:
        case.check(kind, op)


@pytest.mark.parametrize("kind", [*KINDS, "KFAC", "KFOC"])
def test_the_usual_is_not_warned_of(kind):
    for net in (Net(), Normed(nn.LayerNorm(4)), Normed(nn.BatchNorm1d(4)).eval()):
        case = Case(net, nn.CrossEntropyLoss(), data())
        op = case.make(kind, check_deterministic=True)
        op @ torch.ones(op.shape[1])
        op.to_dense()


class Empty(nn.Module):
    """As in MobileBERT: a tensor without entries."""

    def __init__(self):
        super().__init__()
        self.a, self.none, self.b = nn.Linear(3, 4), nn.Parameter(torch.ones(0, 4)), nn.Linear(4, 3)

    def forward(self, X):
        h = self.a(X)
        return self.b(torch.cat([h, F.linear(h, self.none)], 1)) + F.linear(h[:, :0], self.b.weight[:, :0])


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_without_entries(kind):
    Case(Empty(), nn.CrossEntropyLoss(), data()).check(kind)


def test_names_are_public():
    assert all(hasattr(curvops, f"{kind}LinearOperator") for kind in KINDS)
