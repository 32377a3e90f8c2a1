"""Small batches are processed together where that cannot be told from the result."""

import pytest
import torch
from torch import nn

from curvops import EKFACLinearOperator, KFACLinearOperator
from curvops.kronecker import sweep
from kronecker.cases import PROBLEMS, Net, build, close, integers, params, real, seeded


def joined(op):
    """Number of batches, and of those that were processed."""
    notes = [note for note in op.explain().notes if "were processed as" in note]
    return tuple(int(word) for word in notes[0].replace(":", "").split() if word.isdigit()) if notes else None


def both(monkeypatch, make):
    """An operator as it is, and with each batch alone."""
    op = make()
    op.trace()
    monkeypatch.setattr(sweep, "JOINED", 0)
    alone = make()
    assert joined(alone) is None
    return op, alone


@pytest.mark.parametrize("fisher_type", ["type-2", "mc", "empirical"])
@pytest.mark.parametrize("sizes", [(2, 3, 1), (1, 1, 1, 1, 1, 1), (5, 1)])
@pytest.mark.parametrize("name", PROBLEMS)
def test_joined_batches_give_the_same(name, sizes, fisher_type, monkeypatch):
    op, alone = both(monkeypatch, lambda: build("kfac", PROBLEMS[name](), *sizes, fisher_type=fisher_type))
    assert joined(op) == (len(sizes), 1)
    close(op.to_dense(), alone.to_dense(), 1e-10)


def centred(net, X):
    """The mean over the data without its gradient: the rows' gradients do not tell that data are mixed."""
    return net.head(torch.tanh(net.hidden(X - X.mean(0).detach())))


def counted(net, X):
    return net.head(torch.tanh(net.hidden(X))) * (1 + 1 / len(X))


def normed(net, X):
    return net.head(net.norm(net.hidden(X)))


@pytest.mark.parametrize("forward", [centred, counted, normed])
def test_batches_of_a_model_that_mixes_data_stay_apart(forward, monkeypatch):
    def make():
        model = seeded(lambda: Net(forward, hidden=nn.Linear(3, 4), norm=nn.BatchNorm1d(4), head=nn.Linear(4, 3)))
        own = {name: p for name, p in params(model).items() if forward is normed or "norm" not in name}
        data = list(zip(real(20, 3).split(6), integers(3, 20).split(6), strict=True))
        return KFACLinearOperator(model, nn.CrossEntropyLoss(), own, data, fisher_type="type-2")

    op, alone = both(monkeypatch, make)
    assert joined(op) is None
    close(op.to_dense(), alone.to_dense(), 1e-12)


def test_a_loss_without_a_closed_form_is_seen_batch_by_batch(monkeypatch):
    model = seeded(lambda: nn.Linear(3, 2))

    def make():
        data = list(zip(real(18, 3).split(6), real(18, 2, seed=1).split(6), strict=True))
        return KFACLinearOperator(model, nn.HuberLoss(), params(model), data, fisher_type="type-2")

    op, alone = both(monkeypatch, make)
    assert joined(op) is None
    close(op.to_dense(), alone.to_dense(), 1e-12)


def test_batches_of_other_shapes_stay_apart(monkeypatch):
    model = seeded(lambda: Net(lambda net, X: net.head(X).mean(1), head=nn.Linear(3, 2)))

    def make():
        lengths = (4, 4, 5, 5, 4)
        data = [(real(6, n, 3, seed=k), integers(2, 6, seed=k)) for k, n in enumerate(lengths)]
        return KFACLinearOperator(model, nn.CrossEntropyLoss(), params(model), data, fisher_type="mc")

    op, alone = both(monkeypatch, make)
    assert joined(op) == (5, 4)
    close(op.to_dense(), alone.to_dense(), 1e-12)


def test_joining_is_bounded(monkeypatch):
    model = seeded(lambda: nn.Linear(3, 2))
    data = list(zip(real(60, 3).split(6), real(60, 2, seed=1).split(6), strict=True))
    monkeypatch.setattr(sweep, "JOINED", 24 * 2 * 8)
    op = EKFACLinearOperator(model, nn.MSELoss(), params(model), data)
    op.trace()
    assert joined(op) == (10, 3)  # 24 data, each with an output of two doubles
    other = EKFACLinearOperator(model, nn.MSELoss(), params(model), data, memory_budget=0)
    close(other.to_dense(), op.to_dense(), 1e-10)
    assert joined(other) is None


def test_layers_are_told_batch_by_batch():
    op = build("kfac", PROBLEMS["mlp"](), 3, 2, 1)
    op.trace()
    assert joined(op) == (3, 1)
    assert sorted({(row.batch, len(row.inputs)) for row in op.layers()}) == [(0, 3), (1, 2), (2, 1)]
