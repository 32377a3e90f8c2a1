"""Fast ways serve only where they are equal to the reference; else the reference does, and says so."""

import pytest
import torch
from conformance import close, draws
from problems import PROBLEMS
from torch import nn

from curvops import EFLinearOperator, GGNLinearOperator, HessianLinearOperator
from curvops.operators import hessian
from curvops.products import per_datum
from curvops.products.certify import Account, certified, relative_difference, tolerance

FAST = {
    HessianLinearOperator: (hessian, "layered_hessian"),
    GGNLinearOperator: (per_datum, "pulled_rows"),
    EFLinearOperator: (per_datum, "pulled_rows"),
}


@pytest.mark.parametrize("cls", FAST)
@pytest.mark.parametrize("problem", ["mlp", "cnn", "transformer", "norms"])
def test_fast_ways_are_taken(cls, problem):
    op = cls(*PROBLEMS[problem]().args(2, 4))
    assert "nothing has been computed yet" in op.explain()
    dense = op.to_dense()
    assert f"dense matrix: {op.dense_way} (equal to the reference within" in op.explain()
    close(dense, op @ torch.eye(op.shape[0]).double(), 1e-9)
    assert "products: " in op.explain()


@pytest.mark.parametrize("cls", FAST)
def test_a_lying_fast_way_is_caught(cls, monkeypatch):
    module, name = FAST[cls]
    honest = getattr(module, name)
    if name == "pulled_rows":
        monkeypatch.setattr(module, name, lambda *a: (1.001 * rows for rows in honest(*a)))
    else:
        monkeypatch.setattr(module, name, lambda *a: 1.001 * honest(*a))
    op = cls(*PROBLEMS["mlp"]().args(2, 4))
    close(op.to_dense(), op @ torch.eye(op.shape[0]).double())
    assert f"dense matrix: reference ({op.dense_way} differs from the reference by" in op.explain()


@pytest.mark.parametrize("cls", FAST)
def test_an_unsupported_fast_way_is_replaced(cls, monkeypatch):
    def unsupported(*_):
        raise NotImplementedError("no batching rule\nand more")

    monkeypatch.setattr(*FAST[cls], unsupported)
    op = cls(*PROBLEMS["mlp"]().args(2, 4))
    close(op.to_dense(), op @ torch.eye(op.shape[0]).double())
    assert (
        f"dense matrix: reference ({op.dense_way} is unsupported here: NotImplementedError: no batching rule)"
        in op.explain()
    )


@pytest.mark.parametrize("cls", [GGNLinearOperator, EFLinearOperator])
def test_models_that_mix_data_fall_back(cls):
    class Centred(nn.Module):
        def forward(self, x):
            return x - x.mean(0)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), Centred(), nn.Tanh(), nn.Linear(3, 2)).double()
    op = cls(model, nn.MSELoss(), dict(model.named_parameters()), [(draws(6, 3), draws(6, 2, seed=1))])
    close(op.to_dense(), op @ torch.eye(op.shape[0]).double())
    assert "differs from the reference by" in op.explain()


def test_models_that_branch_on_values_fall_back():
    class Branching(nn.Module):
        def forward(self, x):
            return x.sin() if x.sum().item() > 1e9 else x.cos()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), Branching()).double()
    op = GGNLinearOperator(model, nn.MSELoss(), dict(model.named_parameters()), [(draws(6, 3), draws(6, 2, seed=1))])
    close(op.to_dense(), op @ torch.eye(8).double())
    assert "is unsupported here: " in op.explain()


def test_many_outputs_are_done_by_columns():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Flatten()).double()
    X = draws(14).reshape(2, 7, 1)
    op = GGNLinearOperator(model, nn.MSELoss(), dict(model.named_parameters()), [(X, draws(2, 7))])
    close(op.to_dense(), (2 * X.square().mean()).reshape(1, 1))
    assert "so many loss terms and outputs that columns are cheaper" in op.explain()


def test_a_small_memory_budget_changes_nothing():
    p = PROBLEMS["cnn"]()
    for cls in FAST:
        close(cls(*p.args(), memory_budget=1).to_dense(), cls(*p.args()).to_dense())
        close(cls(*p.args(), memory_budget=1) @ draws(p.dim, 6), cls(*p.args()) @ draws(p.dim, 6))


def test_interrupts_are_not_swallowed():
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        certified("work", "way", interrupted, torch.float64, Account())


@pytest.mark.parametrize("difference,taken", [(0.0, True), (1e-9, True), (1e-7, False), (float("nan"), False)])
def test_the_threshold(difference, taken):
    account = Account()
    found = certified("work", "way", lambda: (torch.ones(1), difference), torch.float64, account)
    assert (found is not None) == taken
    assert account.rows["work"][0] == ("way" if taken else "reference")


def test_relative_difference():
    a = torch.tensor([3.0, 4.0])
    assert relative_difference(a, a) == 0 and relative_difference(2 * a, a) == 1
    assert relative_difference(0 * a, 0 * a) == 0 and relative_difference(a, 0 * a) == 5
    assert not relative_difference(a * torch.nan, a) <= tolerance(torch.float32)
