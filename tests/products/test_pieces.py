"""Batches in pieces: never more than fits, never where the model mixes the data, and the same numbers."""

import pytest
import torch
import torch.nn.functional as F
from conformance import KRONECKER, RISK, close, draws
from problems import Problem, real
from torch import Tensor, nn

from curvops import EKFACLinearOperator, GGNDiagonalLinearOperator, HessianLinearOperator, KFACLinearOperator


class Counting(nn.Module):
    """Notes how many data it is given where a graph is made."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.sizes = net, []

    def forward(self, X: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.sizes.append(len(X))
        return self.net(X)


def problem(*more: nn.Module) -> Problem:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 50), nn.Tanh(), *more, nn.Linear(50, 3)).double()
    return Problem(Counting(net), nn.CrossEntropyLoss(), real(37, 3), torch.randint(3, (37,)))


@pytest.mark.parametrize("name", RISK)
def test_pieces_give_the_same_matrix(name):
    p = problem()
    kind = RISK[name]
    whole = kind(*p.args(20, 17), check_deterministic=False)
    v, few = draws(p.dim, 2), draws(p.dim)
    expected, block = whole @ v, whole["net.0.*", "net.2.*"] @ draws(153)
    p.model.sizes.clear()
    cut = kind(*p.args(20, 17), check_deterministic=False, memory_budget=20_000)
    close(cut @ v, expected, 1e-12)
    close(cut @ few, whole @ few, 1e-12)
    close(cut["net.0.*", "net.2.*"] @ draws(153), block, 1e-12)
    assert "batches: in pieces of" in cut.explain() and "outputs and J v are those of the whole" in cut.explain()


def test_pieces_are_as_large_as_the_budget_allows():
    p = problem()
    largest = {}
    for budget in (30_000, 60_000, 120_000, 10**9):
        op = HessianLinearOperator(*p.args(37), check_deterministic=False, memory_budget=budget)
        p.model.sizes.clear()
        op @ draws(p.dim)
        largest[budget] = max(p.model.sizes)
    assert 4 < largest[30_000] < largest[60_000] < largest[120_000] < largest[10**9] == 37
    assert largest[120_000] == pytest.approx(4 * largest[30_000], abs=4)


def test_models_that_mix_the_data_stay_whole():
    p = problem(nn.BatchNorm1d(50))
    op = HessianLinearOperator(*p.args(37), check_deterministic=False, memory_budget=10_000)
    expected = HessianLinearOperator(*p.args(37), check_deterministic=False) @ draws(p.dim)
    close(op @ draws(p.dim), expected, 1e-12)
    assert (
        "batches: whole" in op.explain() and "not those of the whole: ValueError: Expected more than 1" in op.explain()
    )


def test_models_that_mix_the_data_unseen_by_errors_stay_whole():
    class Centred(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            return h - 0.1 * h.mean(0)

    p = problem(Centred())
    op = HessianLinearOperator(*p.args(37), check_deterministic=False, memory_budget=10_000)
    close(op @ draws(p.dim), HessianLinearOperator(*p.args(37), check_deterministic=False) @ draws(p.dim), 1e-12)
    assert "not those of the whole: the model mixes the data" in op.explain()


def hardest(h: Tensor) -> Tensor:
    """Gradients of the eight of a batch that are largest somewhere; of a few data, or of small pieces, those of all."""
    places = h.detach().amax(1).argsort(descending=True)[:8]
    kept = torch.zeros(len(h), 1, dtype=h.dtype).index_fill(0, places, 1.0)
    return h * kept + (h * (1 - kept)).detach()


GRADIENTS_ONLY = {
    "centred": lambda h: h - h.mean(0) + h.mean(0).detach(),
    "by place": lambda h: torch.cat([h[:2], h[2:].detach()]),
    "by size": lambda h: h + len(h) * (h - h.detach()),
    "second derivatives": lambda h: h * (1 + ((h - h.detach()) ** 2).sum(0)),
    "by what others are": hardest,
}


@pytest.mark.parametrize("way", GRADIENTS_ONLY)
def test_models_that_mix_the_gradients_of_the_data_stay_whole(way):
    class Mixing(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            return GRADIENTS_ONLY[way](h)

    p = problem(Mixing())
    op = HessianLinearOperator(*p.args(37), check_deterministic=False, memory_budget=20_000)
    close(op @ draws(p.dim), HessianLinearOperator(*p.args(37), check_deterministic=False) @ draws(p.dim), 1e-12)
    assert "the model mixes the gradients of a batch" in op.explain()


LOSSES = {
    "the hardest": lambda z, y: F.cross_entropy(z, y, reduction="none").topk(min(10, len(y))).values.sum(),
    "clipped": lambda z, y: F.cross_entropy(z, y, reduction="sum").clamp(max=9.0),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("budget", [None, 10_000, 20_000])
def test_losses_that_mix_the_data_are_refused_in_pieces_too(loss, budget):
    p = problem()
    options = {"reduction": "sum", "check_deterministic": False, "memory_budget": budget}
    op = HessianLinearOperator(p.model, LOSSES[loss], p.params, p.data(37), **options)
    with pytest.raises(ValueError, match="the loss of a batch is not the sum of the losses of its data"):
        op @ draws(p.dim)


def test_batches_that_cannot_be_cut_stay_whole():
    p = problem()
    X, y = real(12, 5, 3), torch.randint(3, (60,))
    loss = nn.CrossEntropyLoss()
    flat = nn.Sequential(p.model, nn.Flatten(0, 1))
    args = (flat, loss, dict(flat.named_parameters()), [(X, y)])
    op = HessianLinearOperator(*args, check_deterministic=False, memory_budget=10_000)
    close(op @ draws(p.dim), HessianLinearOperator(*args, check_deterministic=False) @ draws(p.dim), 1e-12)
    assert "pieces" not in op.explain()


@pytest.mark.parametrize("name", KRONECKER)
def test_pieces_give_the_same_kronecker_operator(name):
    """Walks of both kinds: the rows of pieces kept, and computed again."""
    p = problem()
    whole = KRONECKER[name](*p.args(20, 17), check_deterministic=False)
    p.model.sizes.clear()
    cut = KRONECKER[name](*p.args(20, 17), check_deterministic=False, memory_budget=20_000)
    assert max(p.model.sizes) < 10
    close(cut.to_dense(), whole.to_dense(), 1e-7 if "kfoc" in name else 1e-10)
    assert any(note.startswith("batches in pieces of 6 data: ") for note in cut.explain().notes)


@pytest.mark.parametrize("way", [*GRADIENTS_ONLY, "norm"])
def test_kronecker_operators_of_models_that_mix_the_data_stay_whole(way):
    """Second derivatives do not enter."""

    class Mixing(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            return GRADIENTS_ONLY[way](h)

    p = problem(nn.BatchNorm1d(50) if way == "norm" else Mixing())
    cut = EKFACLinearOperator(*p.args(37), check_deterministic=False, memory_budget=20_000, fisher_type="empirical")
    whole = EKFACLinearOperator(*p.args(37), check_deterministic=False, fisher_type="empirical")
    close(cut.to_dense(), whole.to_dense(), 1e-10)
    choice = "in pieces" if way == "second derivatives" else "whole: "
    assert any(note.startswith(f"batches {choice}") for note in cut.explain().notes)


@pytest.mark.parametrize("name", ["kfac type-2 reduce", "ekfac mc", "diagonal mc"])
def test_models_that_mix_small_groups_stay_whole_in_kronecker_operators(name):
    """Pairs of data: pieces of even sizes give the same outputs and J v, but each would be seen as one datum."""

    class Paired(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            return (
                torch.tanh(h).unflatten(0, (-1, 2)).mul(torch.tensor([[1.0], [0.5]]).double()).cumsum(1).flatten(0, 1)
            )

    p = problem(Paired())
    kind, fisher, *rest = name.split()
    make = {"kfac": KFACLinearOperator, "ekfac": EKFACLinearOperator, "diagonal": GGNDiagonalLinearOperator}[kind]
    options = {"fisher_type": fisher, "check_deterministic": False, **({"kfac_approx": "reduce"} if rest else {})}
    problem_of_pairs = p.model, p.loss, p.params, [(p.X[:20], p.y[:20])]
    whole, cut = (make(*problem_of_pairs, **options, **more) for more in ({}, {"memory_budget": 30_000}))
    close(cut.to_dense(), whole.to_dense(), 1e-10)
    assert "batches whole: the model mixes the data of a batch, by small groups" in cut.explain().notes
