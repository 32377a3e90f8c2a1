"""A proof holds for what it saw: other operators, later batches, and indices with repeats are another matter."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from oracles import IMPLICIT, KRONECKER, Case, real
from torch import nn

from curvops import EKFACLinearOperator, EmpiricalRisk, GGNDiagonalLinearOperator, HessianLinearOperator
from trust.support import CE, Model, data, rotate


def quantised(net, X):
    h = net.a(X).tanh()
    scale = h.abs().max().detach() / 3
    return net.b(h + ((h / scale).round() * scale - h).detach()) * scale


def standardised(net, X):
    h = net.a(X)
    return net.b(((h - h.mean(0).detach()) / h.std(0, correction=0).detach()).tanh())


def detached(net, X, rows):
    """Some data, by their place in the batch, have no part in the first layer's gradient."""
    return net.b(torch.cat([net.a(X[:rows]).tanh(), net.a(X[rows:]).tanh().detach()]))


MIXING = {
    "dynamic quantisation": quantised,
    "detached standardisation": standardised,
    "standardisation": lambda n, X: n.b(F.batch_norm(n.a(X), None, None, training=True).tanh()),
    "one over the number": lambda n, X: n.b(n.a(X).tanh()) / len(X),
    "times the number": lambda n, X: n.b((n.a(X) * X.shape[0] / 4).tanh()),
    "largest of the batch": lambda n, X: n.b(n.a(X).tanh()) / X.abs().amax(),
    "softmax over the batch": lambda n, X: n.b(n.a(X).softmax(0)),
    "attention over the batch": lambda n, X: n.b((X @ X.T).softmax(1) @ n.a(X).tanh()),
    "neighbour": lambda n, X: n.b(n.a(X).tanh() + n.a(X.roll(1, 0)).sin()),
    "sorted": lambda n, X: n.b(n.a(X).sort(0)[0].tanh()),
    "reversed": lambda n, X: n.b(n.a(X).flip(0).tanh()),
    "first two learn": lambda n, X: detached(n, X, 2),
    "all but the last learn": lambda n, X: detached(n, X, -1),
    "place in the batch": lambda n, X: n.b((n.a(X) + n.c.weight[torch.arange(len(X)) % 3]).tanh()),
    "times the place in the batch": lambda n, X: n.b(n.a(X).tanh() * torch.arange(len(X))[:, None]),
    "in parts": lambda n, X: torch.cat([n.b(n.a(x).tanh()) for x in X.split(2)]),
    "running sum": lambda n, X: n.b(n.a(X).cumsum(0).tanh()),
}


@pytest.mark.parametrize("way", MIXING)
def test_the_second_operator_of_a_model_and_of_a_risk(way):
    case = Case(Model(MIXING[way]), CE, data(6))
    case.make("KFAC").to_dense()
    case.check("EKFAC", "GGNDiagonal", "EKFAC", "GGN")
    case.data = data()
    risk = EmpiricalRisk(case.model, case.loss, case.params, case.data)
    EKFACLinearOperator.of(risk, fisher_type="mc").to_dense()
    case.check("EKFAC", op=EKFACLinearOperator.of(risk, fisher_type="type-2"))
    case.check("GGNDiagonal", op=GGNDiagonalLinearOperator.of(risk, fisher_type="type-2"))
    case.check("Hessian", op=HessianLinearOperator.of(risk))


@pytest.mark.parametrize("i, j", list(itertools.combinations(range(6), 2)))
def test_one_datum_in_the_output_of_another(i, j):
    for pair in ((i, j), (j, i)):
        mix = torch.eye(6)
        mix[pair] = 0.5
        Case(Model(lambda n, X, mix=mix: n.b(mix @ n.a(X).tanh())), CE, data(6, 6)).check("EKFAC")


CIRCULANT = (torch.arange(4)[:, None] - torch.arange(3)) % 4
TOEPLITZ = torch.arange(4)[:, None] - torch.arange(3) + 2
TRIANGLE = torch.tensor([[0, 1, 2], [1, 3, 4], [2, 4, 5]])
ROWS, KERNEL = torch.tensor([0, 1, 1, 0]), torch.tensor([[[0, 1]], [[1, 0]]])


def first(net, X, weight, bias=None):
    return net.b(F.linear(X, weight, bias).tanh())


INDEXED = {
    "circulant": ((4,), lambda n, X: first(n, X, n.w[CIRCULANT])),
    "Toeplitz": ((6,), lambda n, X: first(n, X, n.w[TOEPLITZ])),
    "strided Hankel": ((6,), lambda n, X: first(n, X, n.w.as_strided((4, 3), (1, 1)))),
    "windows": ((6,), lambda n, X: first(n, X, n.w.unfold(0, 3, 1))),
    "symmetric": ((6,), lambda n, X: n.b(n.a(F.linear(X, n.w[TRIANGLE])).tanh())),
    "take": ((4,), lambda n, X: first(n, X, n.w.take(CIRCULANT))),
    "gather": ((4, 3), lambda n, X: first(n, X, n.w.gather(0, CIRCULANT))),
    "index_select": ((2, 3), lambda n, X: first(n, X, n.w.index_select(0, ROWS))),
    "embedding": ((2, 3), lambda n, X: first(n, X, F.embedding(ROWS, n.w))),
    "one by one": ((2, 3), lambda n, X: first(n, X, torch.stack([n.w[int(k)] for k in ROWS]))),
    "repeat": ((2, 3), lambda n, X: first(n, X, n.w.repeat(2, 1))),
    "repeat_interleave": ((2, 3), lambda n, X: first(n, X, n.w.repeat_interleave(2, 0))),
    "expand": ((1, 3), lambda n, X: first(n, X, n.w.expand(4, 3))),
    "cat": ((2, 3), lambda n, X: first(n, X, torch.cat([n.w, n.w]))),
    "block_diag": ((2, 2), lambda n, X: n.b((X.repeat(1, 2)[:, :4] @ torch.block_diag(n.w, n.w)).tanh())),
    "kron": ((2, 3), lambda n, X: first(n, X, torch.kron(torch.ones(2, 1), n.w))),
    "padded": ((2, 3), lambda n, X: first(n, X, F.pad(n.w[None], (0, 0, 1, 1), mode="replicate")[0])),
    "plus its transpose": ((3, 3), lambda n, X: n.b(n.a(X @ (n.w + n.w.T)).tanh())),
    "from its triangle": ((3, 3), lambda n, X: n.b(n.a(X @ (n.w.triu() + n.w.triu(1).T)).tanh())),
    "twice in one product": ((3, 3), lambda n, X: n.b(n.a(X @ n.w @ n.w).tanh())),
    "overlapping slices": ((4, 4), lambda n, X: n.b((X @ n.w[:, :3].T + X @ n.w[:, 1:].T).tanh())),
    "bias": ((2,), lambda n, X: first(n, X, n.a.weight, n.w[ROWS])),
    "expanded bias": ((1,), lambda n, X: first(n, X, n.a.weight, n.w.expand(4))),
    "added bias": ((2,), lambda n, X: n.b((n.a(X) + n.w[ROWS]).tanh())),
    "scale": ((2,), lambda n, X: n.b((n.a(X) * n.w[ROWS]).tanh())),
    "norm": ((2,), lambda n, X: n.b(F.layer_norm(n.a(X), (4,), n.w[ROWS], n.w[ROWS]))),
    "convolution": ((3,), lambda n, X: n.b(F.conv1d(X[:, None], n.w[KERNEL]).flatten(1).tanh())),
    "the output itself": ((1, 3), lambda n, X: n.w.expand(len(X), 3)),
    "row by datum": ((2, 4), lambda n, X: n.b((n.a(X) + n.w[(X[:, 0] > 0.5).long()]).tanh())),
}


@pytest.mark.parametrize("way, kind", rotate(INDEXED, *IMPLICIT))
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of `take` under vmap
def test_weights_with_repeats(way, kind):
    shape, forward = INDEXED[way]
    Case(Model(forward, w=real(*shape, seed=3)), CE, data()).check(*KRONECKER, kind)


def plus(X):
    return bool(X.mean() > 0)


def masked(net, X):
    h, out = net.a(X).tanh(), net.b(net.a(X).tanh())
    chosen = (X[:, 0] < 0).nonzero()[:, 0]
    return out.index_put((chosen,), net.c(h[chosen])) if len(chosen) else out


LATER = {
    "another layer": lambda n, X: (n.b if plus(X) else n.c)(n.a(X).tanh()),
    "one more layer": lambda n, X: n.b(n.a(X).tanh()) + (0 if plus(X) else n.c(n.a(X).sin())),
    "one layer less": lambda n, X: n.b(n.a(X).tanh()) + (n.c(n.a(X).sin()) if plus(X) else 0),
    "twice": lambda n, X: n.b(n.a(X).tanh()) + (0 if plus(X) else n.b(n.a(X).sin())),
    "other function": lambda n, X: n.b((torch.tanh if plus(X) else torch.exp)(n.a(X))),
    "no bias": lambda n, X: F.linear(n.a(X).tanh(), n.b.weight, n.b.bias if plus(X) else None),
    "transposed": lambda n, X: X @ n.a.weight.T @ n.a.weight if plus(X) else X @ n.w.T @ n.w,
    "row of a table": lambda n, X: n.b(n.a(X).tanh() * n.w[int(plus(X)), :1]),
    "mean over the batch": lambda n, X: n.b(n.a(X).tanh() - (0 if plus(X) else n.a(X).mean(0))),
    "mixing by size": lambda n, X: n.b(n.a(X if len(X) > 4 else X - X.mean(0)).tanh()),
    "attention by size": lambda n, X: n.b(n.a(X).tanh() if len(X) > 4 else (X @ X.T) @ n.a(X)),
    "rolled": lambda n, X: n.b(n.a(X).roll(0 if plus(X) else 1, 0).tanh()),
    "permuted": lambda n, X: n.b(n.a(X)[(torch.arange(len(X)) * (1 if plus(X) else -1)) % len(X)].tanh()),
    "gate that opens": lambda n, X: n.b(n.a(X).tanh() - (X.mean() < 0).double() * n.a(X).mean(0)),
    "some data elsewhere": masked,
    "detached": lambda n, X: n.b(n.a(X).tanh() if plus(X) else n.a(X).tanh().detach()),
    "constant": lambda n, X: n.b(n.a(X).tanh()) if plus(X) else X,
    "unused by the first": lambda n, X: n.b(X.repeat(1, 2)[:, :4] if plus(X) else n.a(X).tanh()),
    "where": lambda n, X: torch.where(X.mean() > 0, n.b(n.a(X).tanh()), n.c(n.a(X).sin())),
}


@pytest.mark.parametrize("way, kind", rotate(LATER, *IMPLICIT))
def test_later_batches_do_something_else(way, kind):
    """And nothing is called unused that a later batch uses."""
    net = Model(LATER[way], w=real(4, 3))
    Case(net, CE, [*data(), *data(3, 6)]).check(*KRONECKER, kind)
    case = Case(net, CE, data())
    found, truth = (case.traces(m.diagonal()) for m in (case.make("KFAC").to_dense(), case.truth("GGN")))
    assert (found > 1e-12).tolist() == (truth > 1e-12).tolist()


def test_lengths_that_change_between_batches():
    net = Model(lambda n, X: n.b((n.a(X) + n.w[: X.shape[1]]).tanh()), w=real(6, 4))
    batches = [(real(3, T, 3, seed=T), real(3, T, 3, seed=9)) for T in (2, 6, 4)]
    loss = nn.MSELoss(reduction="sum")
    Case(net, loss, batches, total=lambda zs, ys: sum(map(loss, zs, ys))).check("Hessian", "GGN", *KRONECKER)
