"""What is doubtful is said: altered gradients, curvature that vanishes, numbers that are not finite, batch norm in training."""

import re
import warnings

import pytest
import torch
from oracles import IMPLICIT, KINDS, Case
from problems import custom
from torch import nn

from trust.support import CE, Model, Net, data, used

backwards = custom("Reversed", torch.clone, lambda g, x: -g)


def half(h):
    if h.requires_grad:
        h.register_hook(lambda g: g / 2)
    return h


def half_at_node(h):
    if h.grad_fn is not None:
        h.grad_fn.register_hook(lambda inputs, outputs: tuple(g if g is None else g / 2 for g in inputs))
    return h


def hooked(way):
    net = Net()
    if way == "parameter":
        net.a.weight.register_hook(lambda g: g / 2)
    else:
        net.b.register_full_backward_hook(lambda m, inputs, outputs: (2 * inputs[0],))
    return net


ALTERED = {
    "hook on a tensor": lambda: Model(lambda n, X: n.b(half(n.a(X)).tanh())),
    "hook on the output": lambda: Model(lambda n, X: half(n.b(n.a(X).tanh()))),
    "hook on a node": lambda: Model(lambda n, X: n.b(half_at_node(n.a(X).tanh()))),
    "hook on a parameter": lambda: hooked("parameter"),
    "full backward hook": lambda: hooked("module"),
    "own backward": lambda: Model(lambda n, X: n.b(backwards(n.a(X)).tanh())),
}


@pytest.mark.parametrize("kind", IMPLICIT)
@pytest.mark.parametrize("way", ALTERED)
def test_altered_gradients(way, kind):
    with pytest.warns(RuntimeWarning, match="central differences|gradient hooks"):
        used(Case(ALTERED[way](), CE, data()), kind, check_deterministic=True)


ZERO = {
    "log-softmax": (lambda n, X: n.b(n.a(X).tanh()).log_softmax(1), nn.NLLLoss(), {}),
    "own loss": (lambda n, X: n.b(n.a(X)).logsumexp(1).square(), lambda z, y: z.mean(), {"reduction": "mean"}),
    "linear loss": (lambda n, X: n.b(n.a(X).tanh()), lambda z, y: z.sum(), {"reduction": "sum"}),
}


@pytest.mark.parametrize("how", ZERO)
def test_curvature_that_is_zero(how):
    forward, loss, options = ZERO[how]
    case = Case(Model(forward), loss, data(), options)
    for kind in ("GGN", "GGNDiagonal", "EKFAC"):
        with pytest.warns(Warning, match="zero|linear"):
            used(case, kind, check_deterministic=True)
    case.check("Hessian")


@pytest.mark.parametrize("kind", ["Hessian", "GGN", "KFAC", "EF"])
def test_parameters_that_no_gradient_reaches(kind):
    net, other = Net(), Net()
    with pytest.warns(RuntimeWarning, match="no graph to the parameters.* of another copy of the model"):
        used(
            Case(lambda params, X: net(X), CE, data(), params=dict(other.named_parameters())),
            kind,
            check_deterministic=True,
        )
    with torch.no_grad():
        net.b.weight.zero_()  # there is a gradient, of zero
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        used(Case(net, CE, data(), params={"a.weight": net.a.weight}), kind, check_deterministic=True)


@pytest.mark.parametrize("kind", ["Hessian", "GGN", "KFAC"])
@pytest.mark.parametrize("what", ["X", "y", "later X", "infinite X", "parameter", "overflow"])
def test_what_is_not_finite(what, kind):
    batches, net, loss = data(), Net(), CE
    if what == "y":
        loss, batches = nn.MSELoss(), [(X, X.clone()) for X, _ in batches]
        batches[1][1][0, 0] = torch.nan
    elif what == "parameter":
        net.a.weight.data[0, 0] = torch.nan
    elif what == "overflow":
        net.forward = lambda X: net.b(net.a(X).exp().exp().exp().exp())
    else:
        batches[what == "later X"][0][0, 0] = torch.inf if what == "infinite X" else torch.nan
    try:
        with pytest.warns(Warning, match="(?i)finite|nan|inf"):
            used(Case(net, loss, batches), kind, check_deterministic=True)
    except (ValueError, RuntimeError, ArithmeticError) as error:
        assert re.search("(?i)finite|nan|inf", str(error))


def normed(norm):
    net = Model(lambda n, X: n.b(n.norm(n.a(X)).tanh()))
    net.norm = norm
    return Case(net, CE, data())


@pytest.mark.parametrize("kind", [*KINDS, "KFAC"])
def test_batch_norm(kind):
    for stats in (True, False):
        case = normed(nn.BatchNorm1d(4, track_running_stats=stats))
        with pytest.warns(Warning, match="(?i)batch.?norm"):
            op = case.make(kind, check_deterministic=True)
    case.check(*{kind} & {*KINDS}, op=op)
    for case in (Case(Net(), CE, data()), normed(nn.LayerNorm(4)), normed(nn.BatchNorm1d(4).eval())):
        used(case, kind, check_deterministic=True).to_dense()
