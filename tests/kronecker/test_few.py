"""One backward pass on data that come twice certifies what two passes on distinct data do."""

import pytest
import torch
from torch import nn

from curvops import KFACLinearOperator
from curvops.kronecker import few
from kronecker.cases import PROBLEMS, Net, build, close, integers, params, real, seeded


def summed(net, X):
    return net.head(torch.tanh(net.hidden(X)) + net.hidden(X).sum(0))


def swapped(net, X):
    """Each row belongs to another datum than the one at its place."""
    return net.head(torch.tanh(net.hidden(X.roll(1, 0)))).roll(-1, 0)


def flipped(net, X):
    return net.head(torch.tanh(net.hidden(X.flip(0)))).flip(0)


def crossed(net, X):
    """Data exchange a little of their rows, pair by pair."""
    h = torch.tanh(net.hidden(X))
    return net.head(h + 0.1 * h.unflatten(0, (-1, 2)).flip(1).flatten(0, 1))


def sequence(net, X):
    """Positions first, as many as the data looked at."""
    return net.head(torch.tanh(net.hidden(X.unsqueeze(0) + real(few.FEW, 1, 3)))).sum(0)


def dead(net, X):
    return net.head(torch.tanh(net.hidden(X)) * 0)


def dropped(net, X):
    return net.head(net.dropout(torch.tanh(net.hidden(X))))


FORWARDS = [summed, swapped, flipped, crossed, sequence, dead]


def model_of(forward):
    return seeded(lambda: Net(forward, hidden=nn.Linear(3, 4), dropout=nn.Dropout(0.5), head=nn.Linear(4, 3)))


def make(forward):
    model = model_of(forward)
    data = [(real(6, 3), integers(3, 6))]
    return KFACLinearOperator(model, nn.CrossEntropyLoss(), params(model), data, fisher_type="type-2")


@pytest.mark.parametrize("forward", FORWARDS)
def test_twins_say_what_two_passes_say(forward, monkeypatch):
    op = make(forward)
    dense = op.to_dense()
    monkeypatch.setattr(few, "certify_twins", lambda *_: False)
    other = make(forward)
    close(other.to_dense(), dense, 1e-12)
    assert other._sweep.routes == op._sweep.routes
    assert all(route.units == "batch" for route in op._sweep.routes.values()) == (forward in (sequence, dead))


@pytest.mark.parametrize("name", PROBLEMS)
def test_either_certificate_gives_the_same(name, monkeypatch):
    answers = []
    certify_twins = few.certify_twins
    monkeypatch.setattr(few, "certify_twins", lambda *a: answers.append(certify_twins(*a)) or answers[-1])
    dense = build("kfac", PROBLEMS[name]()).to_dense()
    assert answers == [True]
    monkeypatch.setattr(few, "certify_twins", lambda *_: False)
    close(build("kfac", PROBLEMS[name]()).to_dense(), dense, 1e-12)


def test_noise_that_tells_twins_apart_is_certified_on_distinct_data():
    model = model_of(dropped).train()
    data = [(real(6, 3), integers(3, 6))]
    op = KFACLinearOperator(model, nn.CrossEntropyLoss(), params(model), data, check_deterministic=False)
    assert op.trace() > 0
    assert all(route.units == "batch" for route in op._sweep.routes.values())
