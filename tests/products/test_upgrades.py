"""What products are made of changes with use, to larger batches and to matrices; the products do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conformance import RISK, close, draws
from problems import PROBLEMS
from torch import Tensor, nn

from curvops import EFLinearOperator, GGNLinearOperator, HessianLinearOperator
from curvops.operators import ggn, hessian
from curvops.products import batches, choose, held, per_datum
from curvops.products.batches import JoinedBatches

KINDS = [HessianLinearOperator, GGNLinearOperator, EFLinearOperator]


def problem(mixing: bool = False, sizes: tuple[int, ...] = (6, 5, 4)) -> Any:
    torch.manual_seed(0)
    middle: list[nn.Module] = [nn.BatchNorm1d(5)] if mixing else []
    model = nn.Sequential(nn.Linear(4, 5), *middle, nn.Tanh(), nn.Linear(5, 3)).double()
    data = [(torch.randn(n, 4).double(), torch.randint(3, (n,))) for n in sizes]
    return model, nn.CrossEntropyLoss(), dict(model.named_parameters()), data


def anew(kind: Any, args: Any, v: Tensor) -> Tensor:
    return kind(*args, check_deterministic=False, memory_budget=0) @ v


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every upgrade that is right counts as faster."""
    monkeypatch.setattr(batches, "CLEARLY", torch.inf)
    monkeypatch.setattr(ggn.HeldRows, "_predict", lambda *_: 0.0)


@pytest.fixture
def only_joined(monkeypatch: pytest.MonkeyPatch, eager: None) -> None:
    for upgrade in (held.HeldMatrix, held.HeldRows):
        monkeypatch.setattr(upgrade, "due", lambda *_: None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [1, 3, 9])
def test_products_stay_the_same_while_batches_are_joined(kind: Any, columns: int, only_joined: None) -> None:
    args = problem()
    op = kind(*args, check_deterministic=False)
    for seed in range(8):
        v = draws(op.shape[1], columns, seed)
        close(op @ v, anew(kind, args, v), 1e-11)
    assert op.account.rows["batches"][0] == "3 batches joined to 1" in op.explain()
    assert len(op._kept.all) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_mixes_data_keeps_its_batches(kind: Any, only_joined: None) -> None:
    args = problem(mixing=True)
    op = kind(*args, check_deterministic=False)
    for seed in range(6):
        v = draws(op.shape[1], 2, seed)
        close(op @ v, anew(kind, args, v), 1e-11)
    choice, why = op.account.rows["batches"]
    assert choice == "as given" and "joined to 1: differ by" in why


@pytest.mark.parametrize("kind", KINDS)
def test_a_vector_of_zeros_joins_nothing(kind: Any, only_joined: None) -> None:
    args = problem(mixing=True)
    op = kind(*args, check_deterministic=False)
    for _ in range(6):
        assert not (op @ torch.zeros(op.shape[1]).double()).any()
    v = draws(op.shape[1])
    close(op @ v, anew(kind, args, v), 1e-11)
    assert "joined to 1: differ by" in op.account.rows["batches"][1]


def test_a_matrix_beyond_the_budget_is_not_held(eager: None) -> None:
    args = problem()
    op = HessianLinearOperator(*args, check_deterministic=False)
    op @ draws(op.shape[1])
    room = op._kept.size + 8 * op.shape[1] ** 2
    for budget, due in ((room, True), (room - 1, None)):
        upgrade = held.HeldMatrix(op.domain, lambda _: torch.empty(0), lambda budget=budget: budget)
        assert upgrade.due(op._kept.all, 99, 0.0) is due


@pytest.mark.parametrize("kind", [GGNLinearOperator, EFLinearOperator])
@pytest.mark.parametrize("lie", [False, True])
def test_forward_mode_becomes_a_program(
    kind: Any, lie: bool, only_joined: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "TRACING", 0.0)
    monkeypatch.setattr(choose, "CLEARLY", torch.inf)
    calls: list[int] = []
    honest = ggn.linearize

    def counted(*args: Any) -> Any:
        out, program = honest(*args)
        return out, lambda v: calls.append(1) or (1.001 if lie else 1.0) * program(v)

    monkeypatch.setattr(ggn, "linearize", counted)
    args = problem()
    op = kind(*args, check_deterministic=False)
    for seed in range(20):
        v = draws(op.shape[1], seed=seed)
        close(op @ v, anew(kind, args, v), 1e-11)
    assert calls and op.account.rows["batches"][0] == "forward mode linearized"
    assert op.account.rows["J v"][0] == ("reverse over reverse" if lie else "forward mode")
    assert len(op._kept.all) == 1 and op._kept.all[0].sources[0].start == 0
    block = draws(op.shape[1], 6)
    close(op @ block, anew(kind, args, block), 1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_long_products_are_not_joined(kind: Any, only_joined: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "LONG", 0.0)
    args = problem()
    op = kind(*args, check_deterministic=False)
    for seed in range(6):
        v = draws(op.shape[1], seed=seed)
        close(op @ v, anew(kind, args, v), 1e-11)
    assert "batches" not in op.account.rows and len(op._kept.all) > 1


def test_joining_is_bounded(monkeypatch: pytest.MonkeyPatch, only_joined: None) -> None:
    args = problem(sizes=(4,) * 6)
    op = HessianLinearOperator(*args, check_deterministic=False)
    v = draws(op.shape[1])
    op @ v
    monkeypatch.setattr(batches, "JOINED_BYTES", op._kept.size // 2)
    for _ in range(5):
        close(op @ v, anew(HessianLinearOperator, args, v), 1e-11)
    assert [[b.start for b in k.sources] for k in op._kept.all] == [[0, 4, 8], [12, 16, 20]]


def test_batches_are_not_joined_beyond_the_budget(only_joined: None) -> None:
    args = problem()
    whole = HessianLinearOperator(*args, check_deterministic=False)
    v = draws(whole.shape[1])
    whole @ v
    op = HessianLinearOperator(*args, check_deterministic=False, memory_budget=int(1.9 * whole._kept.size))
    for _ in range(8):
        op @ v
    assert "batches" not in op.account.rows and "3 of 3 batches kept" in op.explain()


@pytest.mark.parametrize("kind", KINDS)
def test_a_form_that_fails_is_left(kind: Any, monkeypatch: pytest.MonkeyPatch, eager: None) -> None:
    def refuse(*_: Any) -> Any:
        raise NotImplementedError("not on this model\nat all")

    monkeypatch.setattr(JoinedBatches, "build", refuse)
    monkeypatch.setattr(hessian, "layered_hessian", refuse)
    monkeypatch.setattr(per_datum, "pulled_rows", refuse)
    args = problem()
    op = kind(*args, check_deterministic=False)
    v = draws(op.shape[1])
    for _ in range(20):
        close(op @ v, anew(kind, args, v), 1e-11)
    assert "is unsupported here: NotImplementedError: not on this model" in op.account.rows["batches"][1]
    assert "3 of 3 batches kept" in op.explain()


@pytest.mark.parametrize("kind", KINDS)
def test_small_matrices_are_held(kind: Any, eager: None) -> None:
    args = problem()
    op = kind(*args, check_deterministic=False)
    for seed in range(20):
        v = draws(op.shape[1], seed=seed)
        close(op @ v, anew(kind, args, v), 1e-11)
    form = "the matrix itself is kept" if kind is HessianLinearOperator else "the rows of Sᵀ J are kept"
    assert form in op.explain()
    block = draws(op.shape[1], 5)
    close(op @ block, anew(kind, args, block), 1e-11)
    close(op.to_dense(), anew(kind, args, torch.eye(op.shape[1]).double()), 1e-11)
    args[0][0].weight.detach().mul_(1.1)  # a change is seen, whatever is kept
    close(op @ v, anew(kind, args, v), 1e-11)
    assert form not in str(op._kept)
    args[-1][1][0].mul_(0.9)
    close(op @ v, anew(kind, args, v), 1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_a_lying_matrix_is_refused(kind: Any, monkeypatch: pytest.MonkeyPatch, eager: None) -> None:
    honest = held.MatrixProduct.product
    monkeypatch.setattr(held.MatrixProduct, "product", lambda self, v: 1.001 * honest(self, v))
    args = problem()
    op = kind(*args, check_deterministic=False)
    v = draws(op.shape[1])
    for _ in range(20):
        close(op @ v, anew(kind, args, v), 1e-11)
    assert "differ by 1.0e-03" in op.account.rows["batches"][1]


def test_rows_that_do_not_fit_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    args = problem()
    op = GGNLinearOperator(*args, check_deterministic=False)
    op @ draws(op.shape[1])
    rows = held.HeldRows(op.domain, op._rows, lambda: op._kept.size + 15 * 3 * op.shape[1] * 8 - 1, op.account)
    assert rows.due(op._kept.all, 99, torch.inf) is None
    assert "so many loss terms" in op.account.rows["rows of Sᵀ J"][1]
    rows = held.HeldRows(op.domain, op._rows, lambda: op._kept.size + 15 * 3 * op.shape[1] * 8, op.account)
    assert rows.due(op._kept.all, 99, torch.inf) is True
    assert rows.due(op._kept.all, 99, 0.0) is False  # not before products have taken as long


def test_many_rows_become_a_matrix(eager: None) -> None:
    args = problem(sizes=(20, 9))
    op = GGNLinearOperator(*args, check_deterministic=False)
    for seed in range(12):
        v = draws(op.shape[1], seed=seed)
        close(op @ v, anew(GGNLinearOperator, args, v), 1e-11)
    (kept,) = op._kept.all
    assert kept.size == 8 * op.shape[1] ** 2


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("kind", RISK)
def test_no_upgrade_changes_any_model(name: str, kind: str, eager: None) -> None:
    """On each problem of the conformance suite, after as many products as all upgrades take."""
    args = PROBLEMS[name]().args(2, 4)
    op, fresh = RISK[kind](*args), RISK[kind](*args, memory_budget=0)
    blocks = [draws(op.shape[1], 9, seed) for seed in range(3)]
    for block in blocks:
        close(op @ block, fresh @ block, 1e-9)
