"""A proof holds for what it saw: other operators, later batches, and indices with repeats are another matter."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvops import EKFACLinearOperator, EmpiricalRisk, GGNDiagonalLinearOperator, HessianLinearOperator
from trust.oracle import KINDS, KRONECKER, Case, close, labels, real


class Model(nn.Module):
    """Two layers with something of its own between or instead of them."""

    def __init__(self, forward, **tensors):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(4, 3)
        self.used = forward
        for name, value in tensors.items():
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, X):
        return self.used(self, X)


def quantised(net, X):
    h = net.a(X).tanh()
    scale = h.abs().max().detach() / 3
    return net.b(h + ((h / scale).round() * scale - h).detach()) * scale


def standardised(net, X):
    h = net.a(X)
    return net.b(((h - h.mean(0).detach()) / h.std(0).detach()).tanh())


MIXING = {
    "dynamic quantisation": quantised,
    "detached standardisation": standardised,
    "standardisation": lambda net, X: net.b(F.batch_norm(net.a(X), None, None, training=True).tanh()),
    "one over the number": lambda net, X: net.b(net.a(X).tanh()) / len(X),
    "times the number": lambda net, X: net.b((net.a(X) * X.shape[0] / 4).tanh()),
    "largest of the batch": lambda net, X: net.b(net.a(X).tanh()) / X.abs().amax(),
    "softmax over the batch": lambda net, X: net.b(net.a(X).softmax(0)),
    "attention over the batch": lambda net, X: net.b((X @ X.T).softmax(1) @ net.a(X).tanh()),
    "neighbour": lambda net, X: net.b(net.a(X).tanh() + net.a(X.roll(1, 0)).sin()),
    "sorted": lambda net, X: net.b(net.a(X).sort(0)[0].tanh()),
    "reversed": lambda net, X: net.b(net.a(X).flip(0).tanh()),
    "running sum": lambda net, X: net.b(net.a(X).cumsum(0).tanh()),
}


def data(first=5, second=4):
    return [(real(first, 3).abs() + 0.1, labels(first)), (-real(second, 3, seed=1).abs() - 0.1, (labels(second) + 1) % 3)]


@pytest.mark.parametrize("way", MIXING)
def test_the_second_operator_of_a_model(way):
    case = Case(Model(MIXING[way]), nn.CrossEntropyLoss(), data())
    truth = case.truth("GGN")
    case.make("KFAC").to_dense()
    for kind in ("EKFAC", "GGNDiagonal", "EKFAC", "GGN"):
        case.check(kind, truth=truth)


@pytest.mark.parametrize("way", MIXING)
def test_operators_of_one_risk(way):
    case = Case(Model(MIXING[way]), nn.CrossEntropyLoss(), data())
    risk = EmpiricalRisk(case.model, case.loss, case.params, case.data)
    EKFACLinearOperator.of(risk, fisher_type="mc").to_dense()
    case.check("EKFAC", EKFACLinearOperator.of(risk, fisher_type="type-2"))
    case.check("GGNDiagonal", GGNDiagonalLinearOperator.of(risk, fisher_type="type-2"))
    case.check("Hessian", HessianLinearOperator.of(risk))


CIRCULANT = (torch.arange(4)[:, None] - torch.arange(3)) % 4
TOEPLITZ = torch.arange(4)[:, None] - torch.arange(3) + 2
TRIANGLE = torch.zeros(3, 3, dtype=torch.long)
TRIANGLE[*torch.triu_indices(3, 3)] = TRIANGLE.T[*torch.triu_indices(3, 3)] = torch.arange(6)
ROWS = torch.tensor([0, 1, 1, 0])


def first(net, X, weight, bias=None):
    return net.b(F.linear(X, weight, bias).tanh())


def overlapping(net, X):
    h = X @ net.w[:, :3].T + X @ net.w[:, 1:].T
    return net.b(h.tanh())


INDEXED = {
    "circulant": (4, lambda n, X: first(n, X, n.w[CIRCULANT])),
    "Toeplitz": (6, lambda n, X: first(n, X, n.w[TOEPLITZ])),
    "strided Hankel": (6, lambda n, X: first(n, X, n.w.as_strided((4, 3), (1, 1)))),
    "windows": (6, lambda n, X: first(n, X, n.w.unfold(0, 3, 1))),
    "symmetric": (6, lambda n, X: n.b(n.a(F.linear(X, n.w[TRIANGLE])).tanh())),
    "take": (4, lambda n, X: first(n, X, n.w.take(CIRCULANT))),
    "gather": ((4, 3), lambda n, X: first(n, X, n.w.gather(0, CIRCULANT))),
    "index_select": ((2, 3), lambda n, X: first(n, X, n.w.index_select(0, ROWS))),
    "embedding": ((2, 3), lambda n, X: first(n, X, F.embedding(ROWS, n.w))),
    "one by one": ((2, 3), lambda n, X: first(n, X, torch.stack([n.w[int(k)] for k in ROWS]))),
    "repeat": ((2, 3), lambda n, X: first(n, X, n.w.repeat(2, 1))),
    "repeat_interleave": ((2, 3), lambda n, X: first(n, X, n.w.repeat_interleave(2, 0))),
    "expand": ((1, 3), lambda n, X: first(n, X, n.w.expand(4, 3))),
    "cat": ((2, 3), lambda n, X: first(n, X, torch.cat([n.w, n.w]))),
    "block_diag": ((2, 2), lambda n, X: n.b((torch.cat([X, X[:, :1]], 1) @ torch.block_diag(n.w, n.w)).tanh())),
    "kron": ((2, 3), lambda n, X: first(n, X, torch.kron(torch.ones(2, 1), n.w))),
    "padded": ((2, 3), lambda n, X: first(n, X, F.pad(n.w[None], (0, 0, 1, 1), mode="replicate")[0])),
    "plus its transpose": ((3, 3), lambda n, X: n.b(n.a(X @ (n.w + n.w.T)).tanh())),
    "twice in one product": ((3, 3), lambda n, X: n.b(n.a(X @ n.w @ n.w).tanh())),
    "overlapping slices": ((4, 4), overlapping),
    "bias": (2, lambda n, X: first(n, X, n.a.weight, n.w[ROWS])),
    "expanded bias": (1, lambda n, X: first(n, X, n.a.weight, n.w.expand(4))),
    "added bias": (2, lambda n, X: n.b((n.a(X) + n.w[ROWS]).tanh())),
    "scale": (2, lambda n, X: n.b((n.a(X) * n.w[ROWS]).tanh())),
    "norm": (2, lambda n, X: n.b(F.layer_norm(n.a(X), (4,), n.w[ROWS], n.w[ROWS]))),
    "convolution": (
        3,
        lambda n, X: n.b(F.conv1d(X[:, None], n.w[torch.tensor([[[0, 1]], [[1, 0]]])]).flatten(1).tanh()),
    ),
    "row by datum": ((2, 4), lambda n, X: n.b((n.a(X) + n.w[(X[:, 0] > 0.5).long()]).tanh())),
    "parametrized": ((3, 3), lambda n, X: n.b(n.a(X @ (n.w.triu() + n.w.triu(1).T)).tanh())),
}


@pytest.mark.parametrize("kind", [*KRONECKER, "GGN", "Hessian"])
@pytest.mark.parametrize("way", INDEXED)
def test_weights_with_repeats(way, kind):
    shape, forward = INDEXED[way]
    w = real(*(shape if isinstance(shape, tuple) else (shape,)), seed=3)
    Case(Model(forward, w=w), nn.CrossEntropyLoss(), data()).check(kind)


def positive(X):
    return bool(X.mean() > 0)


def ordered(net, X):
    order = torch.arange(len(X)) if positive(X) else torch.arange(len(X)).flip(0)
    return net.b(net.a(X)[order].tanh())


def gated(net, X):
    h = net.a(X).tanh()
    return net.b(h - (X.mean() < 0).double() * h.mean(0))


def masked(net, X):
    h, chosen = net.a(X).tanh(), X[:, 0] < 0
    out = net.b(h)
    if chosen.any():
        out = out.index_put((chosen.nonzero()[:, 0],), net.c(h[chosen]))
    return out


LATER = {
    "another layer": lambda net, X: (net.b if positive(X) else net.c)(net.a(X).tanh()),
    "one more layer": lambda net, X: net.b(net.a(X).tanh()) + (0 if positive(X) else net.c(net.a(X).sin())),
    "one layer less": lambda net, X: net.b(net.a(X).tanh()) + (net.c(net.a(X).sin()) if positive(X) else 0),
    "twice": lambda net, X: net.b(net.a(X).tanh()) + (0 if positive(X) else net.b(net.a(X).sin())),
    "other function": lambda net, X: net.b((torch.tanh if positive(X) else torch.exp)(net.a(X))),
    "no bias": lambda net, X: F.linear(net.a(X).tanh(), net.b.weight, net.b.bias if positive(X) else None),
    "transposed": lambda net, X: X @ net.a.weight.T @ net.a.weight if positive(X) else X @ net.w @ net.w.T,
    "row of a table": lambda net, X: net.b(net.a(X).tanh() * net.w[int(positive(X))]),
    "mean over the batch": lambda net, X: net.b(net.a(X).tanh() - (0 if positive(X) else net.a(X).mean(0))),
    "mixing by size": lambda net, X: net.b(net.a(X if len(X) > 4 else X - X.mean(0)).tanh()),
    "attention by size": lambda net, X: net.b((net.a(X).tanh() if len(X) > 4 else (X @ X.T) @ net.a(X))),
    "rolled": lambda net, X: net.b(net.a(X).roll(0 if positive(X) else 1, 0).tanh()),
    "permuted": ordered,
    "gate that opens": gated,
    "some data elsewhere": masked,
    "detached": lambda net, X: net.b(net.a(X).tanh() if positive(X) else net.a(X).tanh().detach()),
    "constant": lambda net, X: net.b(net.a(X).tanh()) if positive(X) else X,
    "unused by the first": lambda net, X: net.b(X.repeat(1, 2)[:, :4] if positive(X) else net.a(X).tanh()),
    "where": lambda net, X: torch.where(X.mean() > 0, net.b(net.a(X).tanh()), net.c(net.a(X).sin())),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", LATER)
def test_later_batches_do_something_else(way, kind):
    case = Case(Model(LATER[way], w=real(3, 4)), nn.CrossEntropyLoss(), [*data(), *data(3, 6)])
    if way in ("row of a table",):
        case.model.w = nn.Parameter(real(2, 4))
        case.params = dict(case.model.named_parameters())
    case.check(kind)


@pytest.mark.parametrize("kind", ["KFAC", "EKFAC"])
@pytest.mark.parametrize("way", ["another layer", "unused by the first", "where"])
def test_nothing_is_called_unused_that_a_later_batch_uses(way, kind):
    case = Case(Model(LATER[way]), nn.CrossEntropyLoss(), data())
    found, truth = case.traces(case.make(kind).to_dense()), case.traces(case.truth("GGN"))
    assert (found > 1e-12).tolist() == (truth > 1e-12).tolist()


def test_lengths_that_change_between_batches():
    """A position table of which later batches see more rows."""
    net = Model(lambda n, X: n.b((n.a(X) + n.w[: X.shape[1]]).tanh()), w=real(6, 4))
    batches = [(real(3, T, 3, seed=T), real(3, T, 3, seed=9)) for T in (2, 6, 4)]
    case = Case(net, nn.MSELoss(reduction="sum"), batches, total=lambda zs, ys: sum((z - y).square().sum() for z, y in zip(zs, ys)))
    for kind in ("Hessian", "GGN", "GGNDiagonal", "EKFAC"):
        case.check(kind)
    close(case.make("GGN").to_dense(), case.truth("GGN"))
