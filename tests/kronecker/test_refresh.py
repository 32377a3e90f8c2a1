"""A refreshed operator is the one that would be made anew; only what was certified is not certified again."""

import copy

import pytest
import torch
from torch import nn

import curvops.kronecker.sweep as sweep
from kronecker.cases import PROBLEMS, build, close, mlp, real
from kronecker.test_state import routed


def moved(model):
    with torch.no_grad():
        for k, p in enumerate(model.parameters()):
            p.add_(0.1 * real(*p.shape, seed=k))


@pytest.fixture
def certified(monkeypatch):
    """Counts certificates."""
    calls, original = [], sweep.certify
    monkeypatch.setattr(sweep, "certify", lambda *a: calls.append(1) or original(*a))
    return calls


@pytest.mark.parametrize("fisher_type", ["type-2", "mc", "empirical"])
@pytest.mark.parametrize("kind", ["kfac", "ekfac", "diagonal"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_it_is_the_operator_made_anew(kind, name, fisher_type, certified):
    problem = PROBLEMS[name]()
    old = build(kind, problem, fisher_type=fisher_type)
    moved(problem[0])
    before, made = len(certified), old.refresh(seed=5)
    assert len(certified) == before  # one of the first made each of them
    close(made.to_dense(), build(kind, problem, fisher_type=fisher_type, seed=5).to_dense())
    assert type(made) is type(old)
    model, _, X, y = problem
    other = old.refresh([(X[:2], y[:2])], seed=5)
    close(other.to_dense(), build(kind, (model, problem[1], X[:2], y[:2]), fisher_type=fisher_type, seed=5).to_dense())


def test_samples_are_new_unless_a_seed_is_given():
    old = build("kfac", mlp(), fisher_type="mc")
    assert not torch.equal(old.refresh().to_dense(), old.to_dense())
    close(old.refresh(seed=old.options.seed).to_dense(), old.to_dense())
    close(old.refresh().refresh().to_dense(), old.refresh(seed=old.options.seed + 2).to_dense())


def test_moving_average_of_the_factors():
    problem = mlp()
    old = build("kfac", problem)
    moved(problem[0])
    close(old.refresh(decay=0.7).to_dense(), old.moving_average(build("kfac", problem), 0.7).to_dense())
    again = old.refresh(decay=0.7).refresh(decay=0.7)
    close(again.to_dense(), old.refresh(decay=0.7).moving_average(build("kfac", problem), 0.7).to_dense())
    with pytest.raises(ValueError, match="do not add"):
        build("ekfac", problem).refresh(decay=0.5)
    with pytest.raises(ValueError, match="decay: expected a number from 0 to 1, got 2"):
        old.refresh(decay=2)


def test_data_that_take_other_operations_are_certified_anew(certified):
    model, loss, X, y = routed()
    old = build("kfac", (model, loss, X[:3], y[:3]))
    before = len(certified)
    made = old.refresh([(X, y)])
    assert len(certified) > before
    close(made.to_dense(), build("kfac", (model, loss, X, y)).to_dense())


def test_a_mixing_that_begins_later_is_seen():
    """The same operations, but the gate that mixes the data is closed when the first operator is made."""

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.gate = nn.Linear(3, 2), 0.0

        def forward(self, X):
            h = self.linear(X)
            return h + self.gate * h.mean(0, keepdim=True)

    torch.manual_seed(0)
    problem = Gated().double(), nn.MSELoss(), real(6, 3), real(6, 2)
    old = build("kfac", problem)
    problem[0].gate = 0.7
    close(old.refresh().to_dense(), build("kfac", problem).to_dense())


@pytest.mark.filterwarnings("ignore:model. batch norm in train mode")
@pytest.mark.parametrize("size,train", [(1, True), (6, False)])
def test_an_average_over_a_batch_of_one_datum_or_in_another_mode_says_why_not(size, train):
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 2)).double()
    X, y = real(6, 1, 3, 3), torch.tensor([0, 1, 1, 0, 1, 0])
    kfac = build("kfac", (model, nn.CrossEntropyLoss(), X, y))
    model.train(train)
    with pytest.raises(
        ValueError, match=r"here whole .* there linear .* one datum\? Keep the mode, .*drop_last=True.* average"
    ):
        kfac.refresh([(X[:size], y[:size])], decay=0.9)
    with pytest.raises(ValueError, match="drop_last=True"):
        kfac.refresh([(X[:size], y[:size])]).moving_average(kfac, 0.9)


def test_what_cannot_be_averaged_is_refused_before_anything_is_computed(monkeypatch):
    old, calls = build("ekfac", mlp()), []
    monkeypatch.setattr(sweep, "record", lambda *a: calls.append(1))
    for decay, message in ((0.5, "do not add"), (float("nan"), "decay"), ("a", "decay"), (-1, "decay")):
        with pytest.raises(ValueError, match=message):
            old.refresh(decay=decay)
    assert not calls


def test_certificates_do_not_pile_up():
    model, loss, X, y = routed()
    op = build("kfac", (model, loss, X, y))
    for step in range(6):  # each time other data reach the experts, by other operations
        some = slice(0, 2 + step % 3)
        op = op.refresh([(X[some], y[some])])
        assert len(op._proofs) <= len(build("kfac", (model, loss, X[some], y[some]))._proofs)


def test_copies_cannot_be_refreshed():
    with pytest.raises(RuntimeError, match="a copy holds neither model nor data"):
        copy.deepcopy(build("kfac", mlp())).refresh()
