"""What was certified of a model is shared by its operators, as long as nothing of it has changed."""

import gc

import pytest
import torch
from torch import nn

from curvops import EKFACLinearOperator, KFACLinearOperator
from curvops.kronecker import sweep
from curvops.risk import empirical_risk
from kronecker.cases import close, integers, params, real, seeded

SHARED = "certified by an earlier operator"
CHANGES = {
    "parameter": lambda model: model[0].weight.data.mul_(2),
    "mode": lambda model: model.eval(),
    "attribute": lambda model: setattr(model, "scale", 2),
    "function": lambda model: setattr(model[1], "forward", torch.sin),
    "hook": lambda model: model[0].register_forward_hook(lambda module, inputs, output: output + output.roll(1, 0)),
}


def model_and_data():
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)))
    return model, [(real(6, 3), integers(3, 6)), (real(5, 3), integers(3, 5))]


def make(model, data, kind=KFACLinearOperator):
    return kind(model, nn.CrossEntropyLoss(), params(model), data, fisher_type="type-2")


@pytest.fixture
def looks(monkeypatch):
    """Counts how often a few data were looked at."""
    calls, look = [], sweep.look
    monkeypatch.setattr(sweep, "look", lambda *a: calls.append(1) or look(*a))
    return calls


@pytest.mark.parametrize("kind", [KFACLinearOperator, EKFACLinearOperator])
def test_a_second_operator_shares_what_was_certified(kind, looks):
    model, data = model_and_data()
    first, second = make(model, data), make(model, data, kind)
    alone = make(*model_and_data(), kind)
    expected = alone.to_dense()
    first.to_dense()
    assert len(looks) == 2
    close(second.to_dense(), expected, 1e-12)
    assert len(looks) == 2
    assert SHARED in str(second.explain()) and SHARED not in str(first.explain())
    assert "2 batches were processed as 1" in str(second.explain())


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_asks_for_new_certificates(change, looks):
    model, data = model_and_data()
    make(model, data).to_dense()
    CHANGES[change](model)
    second = make(model, data)
    close(second.to_dense().trace(), second.trace(), 1e-9)
    assert len(looks) == 2 and SHARED not in str(second.explain())
    assert ("whole" in {route.units for route in second._sweep.routes.values()}) == (change == "hook")  # it mixes data


def test_other_data_shapes_losses_and_functions_are_looked_at_anew(looks):
    model, data = model_and_data()
    make(model, data).to_dense()
    targets = [(X, real(len(X), 3)) for X, _ in data]
    KFACLinearOperator(model, nn.MSELoss(), params(model), targets).to_dense()
    assert len(looks) == 2

    def function(p, X):
        return torch.func.functional_call(model, p, (X,))

    for _ in range(2):
        make_function = KFACLinearOperator(function, nn.CrossEntropyLoss(), params(model), data)
        make_function.to_dense()
    assert len(looks) == 4


def test_certificates_go_with_the_model_and_are_few():
    model, data = model_and_data()
    before = len(empirical_risk._CERTIFICATES)
    for _ in range(empirical_risk.STATES + 3):
        make(model, data).to_dense()
        model[0].weight.data.mul_(1.1)
    assert 0 < len(empirical_risk._CERTIFICATES[model]) <= empirical_risk.STATES
    del model
    gc.collect()
    assert len(empirical_risk._CERTIFICATES) <= before
