"""A proof holds for what it saw: other operators, later batches, and indices with repeats are another matter."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from oracles import IMPLICIT, KRONECKER, Case, real
from torch import nn

from curvops import EKFACLinearOperator, EmpiricalRisk, GGNDiagonalLinearOperator, HessianLinearOperator
from trust.support import CE, Model, data, labels, rotate, times


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
    "largest of the batch, as a number": lambda n, X: n.b(n.a(X).tanh() * (1 / X.abs().max().item())),
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
    case.data = data() if "standard" in way else [*data(), *data(4, 1)]  # the spread of one datum is none
    risk = EmpiricalRisk(case.model, case.loss, case.params, case.data)
    EKFACLinearOperator.of(risk, fisher_type="mc").to_dense()
    case.check("EKFAC", op=EKFACLinearOperator.of(risk, fisher_type="type-2"))
    case.check("GGNDiagonal", op=GGNDiagonalLinearOperator.of(risk, fisher_type="type-2"))
    case.check("Hessian", op=HessianLinearOperator.of(risk))


PLACES = {
    "first does not learn": lambda place, n, h: torch.where(place > 0, h, h.detach()),
    "last does not learn": lambda place, n, h: torch.where(place < n - 1, h, h.detach()),
    "first learns twice": lambda place, n, h: torch.where(place > 0, h, 2 * h - h.detach()),
    "even places": lambda place, n, h: torch.where(place % 2 > 0, h, h.detach()),
    "first is another": lambda place, n, h: torch.where(place > 0, h, h.sin()),
    "last is another": lambda place, n, h: torch.where(place < n - 1, h, h.sin()),
    "the largest is another": lambda place, n, h: torch.where(h < h.detach().amax(0, keepdim=True), h, h.sin()),
    "every third is another": lambda place, n, h: torch.where(place % 3 > 0, h, h.sin()),
}


@pytest.mark.parametrize("way", [*MIXING, *PLACES])
@pytest.mark.parametrize("sizes", [(4, 4, 4, 4), (3, 5, 5, 4), (5, 1, 1, 6, 6), (2, 2, 2)])
def test_many_small_batches(way, sizes):
    def placed(net, X):
        return net.b(PLACES[way](torch.arange(len(X))[:, None], len(X), net.a(X).tanh()))

    if ("standard" in way or way in ("first two learn", "all but the last learn")) and 1 in sizes:
        sizes = (5, 3, 3, 6, 6)  # the spread of one datum is none, and one is not cut
    case = Case(Model(MIXING.get(way, placed)), CE, [(real(n, 3, seed=k), labels(n)) for k, n in enumerate(sizes)])
    case.check("GGNDiagonal", "EKFAC")


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


def convolved(net, X, kernel, convolve=F.conv1d):
    return net.b(convolve(X[:, None], kernel).flatten(1)[:, :4].tanh())


def over_positions(net, X, weight, bias=None):
    return first(net, torch.stack([X, X.sin()], 1), weight, bias).sum(1)


def by_relative_positions(net, X, use):
    """Two features at three places; a table of five rows by the differences of places."""
    return use(torch.stack([X, X.sin()], -1), net.w[TOEPLITZ[:3]]).sum(1)


INDEXED = {
    "circulant": ((4,), lambda n, X: first(n, X, n.w[CIRCULANT])),
    "circulant, over positions": ((4,), lambda n, X: over_positions(n, X, n.w[CIRCULANT])),
    "Toeplitz": ((6,), lambda n, X: first(n, X, n.w[TOEPLITZ])),
    "strided Hankel": ((6,), lambda n, X: first(n, X, n.w.as_strided((4, 3), (1, 1)))),
    "windows": ((6,), lambda n, X: first(n, X, n.w.unfold(0, 3, 1))),
    "windows, flipped": ((6,), lambda n, X: first(n, X, n.w.unfold(0, 3, 1).flip(0))),
    "symmetric": ((6,), lambda n, X: n.b(n.a(F.linear(X, n.w[TRIANGLE])).tanh())),
    "take": ((4,), lambda n, X: first(n, X, n.w.take(CIRCULANT))),
    "gather": ((4, 3), lambda n, X: first(n, X, n.w.gather(0, CIRCULANT))),
    "gather along a row": ((4, 3), lambda n, X: first(n, X, n.w.gather(1, CIRCULANT % 2))),
    "index_select": ((2, 3), lambda n, X: first(n, X, n.w.index_select(0, ROWS))),
    "index_select, by names": ((2, 3), lambda n, X: first(n, X, torch.index_select(dim=0, index=ROWS, input=n.w))),
    "list": ((2, 3), lambda n, X: first(n, X, n.w[[0, 0, 1, 0]])),
    "index of an index": ((3, 3), lambda n, X: first(n, X, n.w[TRIANGLE % 3, 0].T[[1, 2, 1, 0]])),
    "slice of an index": ((4,), lambda n, X: n.b(n.a(F.linear(X, n.w[TRIANGLE % 4][1:], n.w[:2])[:, [0, 1, 1]]))),
    "embedding": ((2, 3), lambda n, X: first(n, X, F.embedding(ROWS, n.w))),
    "rows for an embedding": ((2, 4), lambda n, X: n.b(F.embedding((X > 0.5).long().sum(1), n.w[ROWS]).tanh())),
    "one by one": ((2, 3), lambda n, X: first(n, X, torch.stack([n.w[int(k)] for k in ROWS]))),
    "written into zeros": ((4,), lambda n, X: first(n, X, torch.zeros(4, 3).index_put((ROWS,), n.w[:3]))),
    "repeat": ((2, 3), lambda n, X: first(n, X, n.w.repeat(2, 1))),
    "repeat_interleave": ((2, 3), lambda n, X: first(n, X, n.w.repeat_interleave(2, 0))),
    "expand": ((1, 3), lambda n, X: first(n, X, n.w.expand(4, 3))),
    "cat": ((2, 3), lambda n, X: first(n, X, torch.cat([n.w, n.w]))),
    "cat and flip": ((3,), lambda n, X: n.a(X @ torch.stack([n.w, torch.cat([n.w[1:], n.w[:1]]), n.w.flip(0)]))[:, :3]),
    "block_diag": ((2, 2), lambda n, X: n.b((X.repeat(1, 2)[:, :4] @ torch.block_diag(n.w, n.w)).tanh())),
    "kron": ((2, 3), lambda n, X: first(n, X, torch.kron(torch.ones(2, 1), n.w))),
    "padded": ((2, 3), lambda n, X: first(n, X, F.pad(n.w[None], (0, 0, 1, 1), mode="replicate")[0])),
    "plus its transpose": ((3, 3), lambda n, X: n.b(n.a(X @ (n.w + n.w.T)).tanh())),
    "from its triangle": ((3, 3), lambda n, X: n.b(n.a(X @ (n.w.triu() + n.w.triu(1).T)).tanh())),
    "twice in one product": ((3, 3), lambda n, X: n.b(n.a(X @ n.w @ n.w).tanh())),
    "overlapping slices": ((4, 4), lambda n, X: n.b((X @ n.w[:, :3].T + X @ n.w[:, 1:].T).tanh())),
    "bias": ((2,), lambda n, X: first(n, X, n.a.weight, n.w[ROWS])),
    "bias over positions": ((2,), lambda n, X: over_positions(n, X, n.a.weight, n.w[ROWS])),
    "bias by a mask": ((5,), lambda n, X: first(n, X, n.a.weight, n.w[torch.arange(5) != 1])),
    "tiled bias": ((3,), lambda n, X: first(n, X, n.a.weight, torch.tile(n.w, (2,))[:4])),
    "expanded bias": ((1,), lambda n, X: first(n, X, n.a.weight, n.w.expand(4))),
    "added bias": ((2,), lambda n, X: n.b((n.a(X) + n.w[ROWS]).tanh())),
    "interleaved bias": ((2,), lambda n, X: n.b((n.a(X) + n.w.repeat_interleave(2)).tanh())),
    "weight and bias": ((4,), lambda n, X: first(n, X, n.w[CIRCULANT], n.w[ROWS])),
    "scale": ((2,), lambda n, X: n.b((n.a(X) * n.w[ROWS]).tanh())),
    "repeated scale": ((2,), lambda n, X: n.b((n.a(X) * n.w.repeat(2)).tanh())),
    "expanded scale": ((1,), lambda n, X: n.b((n.a(X) * n.w.expand(4)).tanh())),
    "norm": ((2,), lambda n, X: n.b(F.layer_norm(n.a(X), (4,), n.w[ROWS], n.w[ROWS]))),
    "convolution": ((3,), lambda n, X: convolved(n, X, n.w[KERNEL])),
    "rows of a convolution": ((2, 1, 2), lambda n, X: convolved(n, X, n.w[[0, 1, 0]])),
    "circular convolution": ((1, 1, 1), lambda n, X: convolved(n, X.tile(2), F.pad(n.w, (1, 1), mode="circular"))),
    "transposed convolution": ((2,), lambda n, X: convolved(n, X, n.w[None, [0, 0], None], F.conv_transpose1d)),
    "bilinear": ((2,), lambda n, X: n.b(n.a(X) * F.bilinear(X, X, n.w[TRIANGLE % 2][None]))),
    "the output itself": ((1, 3), lambda n, X: n.w.expand(len(X), 3)),
    "row by datum": ((2, 4), lambda n, X: n.b((n.a(X) + n.w[(X[:, 0] > 0.5).long()]).tanh())),
    "relative positions, as SAM's": (
        (5, 2),
        lambda n, X: by_relative_positions(n, X, lambda x, table: torch.einsum("nqc,qkc->nqk", x, table)),
    ),
    "relative positions, as Swin's": (
        (5, 2),
        lambda n, X: by_relative_positions(n, X, lambda x, table: (x @ x.mT + table.movedim(2, 0)[0]).softmax(-1)),
    ),
}


@pytest.mark.parametrize("way, kind", rotate(INDEXED, *IMPLICIT))
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of `take` under vmap
def test_weights_with_repeats(way, kind):
    shape, forward = INDEXED[way]
    case = Case(Model(forward, w=real(*shape, seed=3)), CE, data())
    for op in case.check(*KRONECKER, kind)[: len(KRONECKER)]:
        places = torch.cat([placed.positions for placed in op.blocks])
        assert len(places.unique()) == len(places) == sum(row.size for row in op.explain().rows) <= op.shape[0]
    Case(case.model, nn.MSELoss(), [(X, real(len(X), 3)) for X, _ in [*data(), *data(1)]]).check(*KRONECKER)


def plus(X):
    return bool(X.mean() > 0)


def quietly(X):
    """By a number that no operation shows."""
    return X[0, 0].item() > 0


def masked(net, X):
    h, out = net.a(X).tanh(), net.b(net.a(X).tanh())
    chosen = (X[:, 0] < 0).nonzero()[:, 0]
    return out.index_put((chosen,), net.c(h[chosen])) if len(chosen) else out


LATER = {
    "another layer": lambda n, X: (n.b if plus(X) else n.c)(n.a(X).tanh()),
    "another of two results": lambda n, X: [n.b(n.a(X).tanh()), n.c(n.a(X).sin())][len(X) % 2],
    "one more layer": lambda n, X: n.b(n.a(X).tanh()) + (0 if plus(X) else n.c(n.a(X).sin())),
    "one layer less": lambda n, X: n.b(n.a(X).tanh()) + (n.c(n.a(X).sin()) if plus(X) else 0),
    "layer times zero": lambda n, X: n.b(n.a(X).tanh()) + (0.0 if plus(X) else 1.0) * n.c(n.a(X).sin()),
    "bias alone": lambda n, X: n.b(n.a(X).tanh()) + (0 if plus(X) else n.c.bias),
    "twice": lambda n, X: n.b(n.a(X).tanh()) + (0 if plus(X) else n.b(n.a(X).sin())),
    "other function": lambda n, X: n.b((torch.tanh if plus(X) else torch.exp)(n.a(X))),
    "by what no rule knows": lambda n, X: n.b(X.tile(2)[:, :4] if plus(X) else torch.kron(n.a(X), n.c.weight[:1, 0])),
    "no bias": lambda n, X: F.linear(n.a(X).tanh(), n.b.weight, n.b.bias if plus(X) else None),
    "transposed": lambda n, X: X @ n.a.weight.T @ n.a.weight if plus(X) else X @ n.w.T @ n.w,
    "row of a table": lambda n, X: n.b(n.a(X).tanh() * n.w[int(plus(X)), :1]),
    "mean over the batch": lambda n, X: n.b(n.a(X).tanh() - (0 if plus(X) else n.a(X).mean(0))),
    "mixing by size": lambda n, X: n.b(n.a(X if len(X) > 4 else X - X.mean(0)).tanh()),
    "attention by size": lambda n, X: n.b(n.a(X).tanh() if len(X) > 4 else (X @ X.T) @ n.a(X)),
    "gate of each datum": lambda n, X: n.b(n.a(X).tanh() - (X[:, :1] < 0) * n.a(X).mean(0)),
    "scaled by the largest": lambda n, X: n.b(n.a(X) / n.a(X).abs().max().clamp(max=0.1 if plus(X) else 9.0)),
    "rolled along another axis": lambda n, X: n.b(n.a(X).roll(1, int(plus(X))).tanh()),
    "flipped along another axis": lambda n, X: n.b(n.a(X).tanh() + n.a(X).flip(int(plus(X)))),
    "rolled": lambda n, X: n.b(n.a(X).roll(0 if plus(X) else 1, 0).tanh()),
    "permuted": lambda n, X: n.b(n.a(X)[(torch.arange(len(X)) * (1 if plus(X) else -1)) % len(X)].tanh()),
    "gate that opens": lambda n, X: n.b(n.a(X).tanh() - (X.mean() < 0).double() * n.a(X).mean(0)),
    "some data elsewhere": masked,
    "detached": lambda n, X: n.b(n.a(X).tanh() if plus(X) else n.a(X).tanh().detach()),
    "constant": lambda n, X: n.b(n.a(X).tanh()) if plus(X) else X,
    "unused by the first": lambda n, X: n.b(X.repeat(1, 2)[:, :4] if plus(X) else n.a(X).tanh()),
    "where": lambda n, X: torch.where(X.mean() > 0, n.b(n.a(X).tanh()), n.c(n.a(X).sin())),
    "traced layers": lambda n, X: n.traced[quietly(X)](n.a(X).tanh()),
    "view made before": lambda n, X: n.b(n.a(X) + (-X[:, :1]).relu() * (X @ n.view)),
    "other view made before": lambda n, X: n.b(n.a(X) + X @ n.views[quietly(X)]),
    "other weight of a function": lambda n, X: n.b(times(X, n.w if quietly(X) else n.a.weight)),
    "function with a gate": lambda n, X: n.b(torch.where(X[:, :1] < 0, times(X, n.w), n.a(X))),
}


@pytest.mark.parametrize("way, kind", rotate(LATER, *IMPLICIT))
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_later_batches_do_something_else(way, kind):
    """And nothing is called unused that a later batch uses."""
    net = Model(LATER[way], w=real(4, 3))
    net.view, net.views = net.w.T, [net.w.T, net.a.weight.T]
    if way == "traced layers":
        net.traced = nn.ModuleList(torch.jit.trace(layer, real(5, 4)) for layer in (net.b, net.c))
        net.b = net.c = None
    Case(net, CE, [*data(), *data(3, 6), *data(4, 1)]).check(*KRONECKER, kind)
    case = Case(net, CE, data())
    found, truth = (case.traces(m.diagonal()) for m in (case.make("KFAC").to_dense(), case.truth("GGN")))
    assert (found > 1e-12).tolist() == (truth > 1e-12).tolist()


IN_THE_MIDDLE = torch.tensor([0, 1, 2, 2, 2, 3, 3, 7, 8, 9])
GRAPHS = [torch.eye(10)[IN_THE_MIDDLE].double(), torch.eye(10).double()]


def sorted_but_the_middle(net, X):
    order = X[:, 0].argsort()
    h = net.a(X)[order].tanh()[order.argsort()]
    return net.b(h if quietly(X) else torch.cat([h[:2], h[2:-2].flip(0), h[-2:]]))


SOME_MIX = {
    "sorted": sorted_but_the_middle,
    "equal entries": lambda n, X: n.b(((X[:, 2:] == X[:, 2:].T).double().softmax(1) @ n.a(X)).tanh()),
    "graph": lambda n, X: n.b((GRAPHS[quietly(X)] @ n.a(X)).tanh()),
    "list of neighbours": lambda n, X: n.b((n.a(X) + n.a(X)[X[:, 2].int().numpy()]).tanh()),
}


@pytest.mark.parametrize("way", SOME_MIX)
def test_some_data_of_a_later_batch_mix(way):
    """Neither the first nor the last ones."""
    batches = data(10, 10)
    for (X, _), column in zip(batches, (torch.arange(10), IN_THE_MIDDLE), strict=True):
        X[:, 2] = column
    Case(Model(SOME_MIX[way]), CE, batches).check(*KRONECKER)


LENGTHS = {
    "slice": lambda n, X: n.b((n.a(X) + n.w[: X.shape[1]]).tanh()),
    "index with repeats": lambda n, X: n.b((n.a(X) + n.w[torch.arange(X.shape[1]) % 2 + (X.shape[1] > 2)]).tanh()),
}


@pytest.mark.parametrize("lengths", [(2, 6, 4), (3, 3), (4, 2), (3, 4, 3)], ids=str)
@pytest.mark.parametrize("way", LENGTHS)
def test_lengths_that_change_between_batches(way, lengths):
    batches = [(real(3, T, 3, seed=T), real(3, T, 3, seed=9)) for T in lengths]
    loss = nn.MSELoss(reduction="sum")
    case = Case(Model(LENGTHS[way], w=real(6, 4)), loss, batches, total=lambda zs, ys: sum(map(loss, zs, ys)))
    for op in case.check(*KRONECKER, "Hessian", "GGN")[: len(KRONECKER)]:
        places = torch.cat([placed.positions for placed in op.blocks])
        assert len(places.unique()) == len(places)


GATED = {
    "running sum": lambda h, gate: h + gate * h.cumsum(0),
    "rolled": lambda h, gate: h + gate * h.roll(1, 0),
    "standardised": lambda h, gate: h + gate * F.batch_norm(h, None, None, training=True),
    "logarithm of a running sum": lambda h, gate: h + gate * h.logcumsumexp(0),
    "where": lambda h, gate: torch.where(gate > 0, h.flip(0), h),
    "filled": lambda h, gate: h + h.roll(1, 0).masked_fill_(gate == 0, 0.0),
    "rectified": lambda h, gate: h + F.relu(h.roll(1, 0) + 9 * gate - 5, inplace=True),
    "larger one": lambda h, gate: torch.maximum(h, h.roll(1, 0) + 9 * gate - 5),
    "gradients only": lambda h, gate: h + gate * (h.roll(1, 0) - h.roll(1, 0).detach()),
}


@pytest.mark.parametrize("way", GATED)
@pytest.mark.parametrize("sizes, marked", [((10, 10), 1), ((6, 6, 6, 6), 2)])
def test_a_gate_that_opens_in_the_middle_of_a_later_batch(way, sizes, marked):
    """Where it is closed, the same operations keep the data apart."""
    batches = [(real(n, 3, seed=k) / 2, labels(n)) for k, n in enumerate(sizes)]
    batches[marked][0][sizes[marked] // 2, 2] = 6.0
    forward = lambda n, X: n.b(GATED[way](n.a(X).tanh(), (X[:, 2:] > 5).double()))  # noqa: E731
    Case(Model(forward), CE, batches).check("EKFAC", "GGNDiagonal")


PLAIN = {
    "layers": lambda n, X: n.b(F.relu(n.a(X), inplace=True).clamp(max=2.0)),
    "masks": lambda n, X: n.b(
        torch.where(X[:, :1] > 0, n.a(X), 0.0).masked_fill(X[:, 1:2].abs() < 0.3, 1.0).softmax(1)
    ),
}


@pytest.mark.parametrize("way", PLAIN)
def test_a_proof_serves_other_batches_of_plain_models(way):
    op = Case(Model(PLAIN[way]), CE, data(6, 6)).make("KFAC")
    assert [proof.apart for proof in op._proofs] == [True]
