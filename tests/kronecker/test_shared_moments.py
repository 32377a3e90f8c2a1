"""A separate bias holds its weight's Σ g gᵀ as long as both enter together, and one of its own from then on."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvops import EKFACLinearOperator, KFACLinearOperator, load
from curvops.kronecker.collect import MomentCollector
from kronecker.cases import APPROXIMATIONS, PROBLEMS, Net, build, close, integers, params, real, seeded


def together(net, X):
    return net.head(torch.tanh(net.hidden(X)))


def apart_later(net, X):
    h = torch.tanh(net.hidden(X))
    return net.head(h + F.linear(h, net.square, net.hidden.bias)) if len(X) == 5 else net.head(h)


def apart_at_first(net, X):
    h = torch.tanh(net.hidden(X))
    return net.head(h + F.linear(h, net.square, net.hidden.bias)) if len(X) == 6 else net.head(h)


def bias_alone_later(net, X):
    return net.head(torch.tanh(net.hidden(X) if len(X) == 6 else F.linear(X, net.other, net.hidden.bias)))


def make(forward, kind, **options):
    model = seeded(
        lambda: Net(
            forward,
            hidden=nn.Linear(3, 4),
            head=nn.Linear(4, 3),
            square=nn.Parameter(real(4, 4)),
            other=nn.Parameter(real(4, 3)),
        )
    )
    data = [(real(n, 3), integers(3, n)) for n in (6, 5, 6)]
    return kind(model, nn.CrossEntropyLoss(), params(model), data, fisher_type="type-2", **options)


def factors_of(op):
    return {group.names: entry.factors.sides["right"].outputs for group, entry in op.state.groups}


def test_a_bias_holds_its_weights_moment(tmp_path):
    op = make(together, KFACLinearOperator)
    outputs = factors_of(op)
    for layer in ("hidden", "head"):
        assert outputs[f"{layer}.bias",] is outputs[f"{layer}.weight",]
    op.save(tmp_path / "factors.safetensors")
    assert torch.equal(load(tmp_path / "factors.safetensors").to_dense(), op.to_dense())


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
@pytest.mark.parametrize("kind", [KFACLinearOperator, EKFACLinearOperator])
@pytest.mark.parametrize("forward", [together, apart_later, apart_at_first, bias_alone_later])
def test_it_is_what_adding_apart_gives(forward, kind, approximation, monkeypatch):
    shared = make(forward, kind, kfac_approx=approximation).to_dense()
    monkeypatch.setattr(MomentCollector, "_weights_of", lambda *_: {})
    close(make(forward, kind, kfac_approx=approximation).to_dense(), shared, 1e-10)


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_problem_is_what_adding_apart_gives(name, monkeypatch):
    shared = build("kfac", PROBLEMS[name]()).to_dense()
    monkeypatch.setattr(MomentCollector, "_weights_of", lambda *_: {})
    close(build("kfac", PROBLEMS[name]()).to_dense(), shared, 1e-12)
