"""Columns together and forward mode: taken where measured faster and equal, left where they fail or lie."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvops import EFLinearOperator, GGNLinearOperator, HessianLinearOperator
from curvops.operators import ggn, hessian
from curvops.products import choose, held
from curvops.products.certify import Account
from curvops.products.choose import Choice
from curvops.products.reference import GradientLinearization, OutputLinearization

KINDS = [HessianLinearOperator, GGNLinearOperator, EFLinearOperator]


def operator(kind: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    data = [(torch.randn(n, 6).double(), torch.randint(3, (n,))) for n in (5, 4)]
    return kind(model, nn.CrossEntropyLoss(), dict(model.named_parameters()), data, check_deterministic=False)


def expected(kind: Any) -> Tensor:
    """The matrix, column by column, each by an operator of its own that keeps nothing."""
    eye = torch.eye(83, dtype=torch.float64)
    found = []
    for column in eye:
        op = operator(kind)
        op.memory_budget = 0
        found.append(op @ column)
    return torch.stack(found, 1)


def test_a_choice_is_the_fastest_equal_way() -> None:
    account, x = Account(), torch.arange(6.0)
    calls: list[str] = []

    def way(name: str, factor: float, work: int = 1) -> Any:
        def run(v: Tensor) -> Tensor:
            calls.append(name)
            for _ in range(work):
                torch.rand(300, 300) @ torch.rand(300, 300)
            return factor * v

        return run

    def refuse(v: Tensor) -> Tensor:
        raise NotImplementedError("no such rule\nat all")

    ways = {"slow": way("slow", 2.0, 200), "lying": way("lying", 2.01), "refusing": refuse, "fast": way("fast", 2.0)}
    choice = Choice("doubling", account)
    assert torch.equal(choice(x, ways), 2 * x) and choice.chosen == "fast"
    chosen, why = account.rows["doubling"]
    assert chosen == "fast"
    assert "lying differs by 5.0e-03" in why
    assert "refusing is unsupported here: NotImplementedError: no such rule;" in why
    calls.clear()
    assert torch.equal(choice(x, ways), 2 * x) and calls == ["fast"]


def test_a_way_that_fails_later_gives_way_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "CLEARLY", torch.inf)

    def small(v: Tensor) -> Tensor:
        if len(v) > 3:
            raise ValueError("too long")
        return 2 * v

    account = Account()
    choice, ways = Choice("doubling", account), {"plain": lambda v: 2 * v, "small": small}
    assert torch.equal(choice(torch.ones(3), ways), 2 * torch.ones(3)) and choice.chosen == "small"
    for _ in range(2):
        assert torch.equal(choice(torch.ones(4), ways), 2 * torch.ones(4)) and choice.chosen == "plain"
    assert account.rows["doubling"] == ("plain", "small failed on a later batch: ValueError: too long")


def test_a_vector_of_zeros_certifies_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "CLEARLY", torch.inf)
    choice, ways = Choice("doubling", Account()), {"plain": lambda v: 2 * v, "lying": lambda v: 3 * v}
    assert not choice(torch.zeros(3), ways).any() and choice.chosen == "plain"
    assert torch.equal(choice(torch.ones(3), ways), 2 * torch.ones(3))


@pytest.mark.parametrize("kind", [GGNLinearOperator, EFLinearOperator])
@pytest.mark.parametrize("outputs", [slice(None), slice(0, 1), slice(2, 4)])
def test_forward_mode_that_loses_tangents_is_refuted(
    kind: Any, outputs: slice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where J v is zero by mistake, so is the product's own cotangent, which then certifies nothing."""
    v = torch.randn(83, dtype=torch.float64)
    right = expected(kind) @ v
    exact = torch.func.jvp

    def lose(*args: Any) -> Any:
        primal, tangent = exact(*args)
        tangent = tangent.clone()
        tangent[outputs] = 0
        return primal, tangent

    monkeypatch.setattr(ggn, "jvp", lose)
    op = operator(kind)
    torch.testing.assert_close(op @ v, right, rtol=1e-11, atol=1e-13)
    assert "not forward mode's adjoint" in op.account.rows["J v"][1]


@pytest.mark.parametrize("budget", [None, 0])
@pytest.mark.parametrize("kind", [GGNLinearOperator, EFLinearOperator])
@pytest.mark.parametrize("first", [torch.zeros(83), torch.eye(83)[0]])
def test_no_vector_certifies_forward_mode_for_another(
    kind: Any, first: Tensor, budget: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here it loses the tangents of the head, which the first vector does not have."""
    v = torch.zeros(83, dtype=torch.float64)
    v[56:] = torch.randn(27, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    right = expected(kind) @ v
    assert right.norm() > 1e-3
    exact = torch.func.jvp

    def lose(output: Any, primals: Any, directions: Any) -> Any:
        (given,) = directions
        lost = {name: torch.zeros_like(d) if name.startswith("2.") else d for name, d in given.items()}
        return exact(output, primals, (lost,))

    monkeypatch.setattr(ggn, "jvp", lose)
    op = operator(kind)
    op.memory_budget = budget
    op @ first.double()
    torch.testing.assert_close(op @ v, right, rtol=1e-11, atol=1e-13)
    again = kind(op.risk.model.module, nn.CrossEntropyLoss(), op.risk.model.params, op.risk.data.batches)
    again.memory_budget = budget
    torch.testing.assert_close(again @ v, right, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("clearly", [torch.inf, 0.0])
@pytest.mark.parametrize("size", [2, 3, 7])
def test_a_few_entries_measure_the_reference(clearly: float, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "CLEARLY", clearly)
    x, seen = torch.arange(float(size)), []
    ways = {"one": lambda v: seen.append(len(v)) or 2 * v, "all": lambda v: 2 * v}
    choice = Choice("doubling", Account())
    assert torch.equal(choice(x, ways, few=3), 2 * x)
    assert seen[0] == min(3, size)
    assert choice.chosen == ("all" if clearly else "one")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("together", [True, False])
def test_both_ways_give_the_same_columns(kind: Any, together: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "CLEARLY", torch.inf if together else 0.0)
    for upgrade in (held.HeldMatrix, held.HeldRows):
        monkeypatch.setattr(upgrade, "due", lambda *_: None)
    op = operator(kind)
    block = torch.randn(op.shape[1], 19, dtype=torch.float64)
    torch.testing.assert_close(op @ block, expected(kind) @ block, rtol=1e-12, atol=1e-14)
    work = "columns" if kind is HessianLinearOperator else "columns, Jᵀu"
    assert op.account.rows[work][0].endswith("by vmap" if together else "one by one")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("factor", "words"), [(None, "unsupported here: RuntimeError: no"), (1.001, "differs by 1")])
def test_failing_and_lying_batching_falls_back(
    kind: Any, factor: float | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "CLEARLY", torch.inf)
    block = torch.randn(83, 6, dtype=torch.float64)
    right = expected(kind) @ block

    def spoil(honest: Any, default: bool = False) -> Any:
        def way(self: Any, several: Tensor, batched: bool = default, last: bool = False) -> Tensor:
            if not batched:
                return honest(self, several, batched)
            if factor is None:
                raise RuntimeError("no batching rule")
            return factor * honest(self, several, batched)

        return way

    products = GradientLinearization.products
    monkeypatch.setattr(
        GradientLinearization, "products", spoil(lambda self, several, _: products(self, several), True)
    )
    for name in ("jvp", "vjp"):
        monkeypatch.setattr(OutputLinearization, name, spoil(getattr(OutputLinearization, name)))
    monkeypatch.setattr(hessian if kind is HessianLinearOperator else ggn, "jvp", spoil_forward(factor))
    op = operator(kind)
    torch.testing.assert_close(op @ block, right, rtol=1e-12, atol=1e-14)
    assert words in str(op.explain())
    columns = [choice for work, (choice, _) in op.account.rows.items() if work.startswith("columns")]
    assert columns and set(columns) <= {"one by one", "by vmap"}  # the latter: the output matrix was not spoilt


def spoil_forward(factor: float | None) -> Any:
    exact = torch.func.jvp

    def spoilt(*args: Any) -> Any:
        if factor is None:
            raise RuntimeError("no forward mode")
        primal, tangent = exact(*args)
        return primal, torch.utils._pytree.tree_map(lambda t: factor * t, tangent)

    return spoilt


@pytest.mark.parametrize("kind", [GGNLinearOperator, EFLinearOperator])
@pytest.mark.parametrize("forward", [True, False])
def test_both_pushforwards_agree(kind: Any, forward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "CLEARLY", torch.inf if forward else 0.0)
    op = operator(kind)
    v = torch.randn(op.shape[1], dtype=torch.float64)
    right = expected(kind) @ v
    for k in range(3):
        torch.testing.assert_close(op @ v, right, rtol=1e-12, atol=1e-14)
        way, why = op.account.rows["J v"]
        assert way == ("forward mode" if forward or k == 0 else "reverse over reverse")
        assert ("adjoint" in why) == (k == 0)


@pytest.mark.parametrize("kind", [GGNLinearOperator, EFLinearOperator])
@pytest.mark.parametrize(
    ("factor", "first", "later"),
    [
        (None, "forward mode is unsupported here: RuntimeError: no", "unsupported here: RuntimeError: no forward mode"),
        (1.001, "not forward mode's adjoint", "differs by 1.0e-03"),
        (1 + 1e-12, "not forward mode's adjoint", "forward mode"),
    ],
)
def test_unsupported_and_lying_forward_mode_fall_back(
    kind: Any, factor: float | None, first: str, later: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "CLEARLY", torch.inf)
    v = torch.randn(83, dtype=torch.float64)
    right = expected(kind) @ v
    monkeypatch.setattr(ggn, "jvp", spoil_forward(factor))
    op = operator(kind)
    for k in range(3):
        torch.testing.assert_close(op @ v, right, rtol=1e-9, atol=1e-12)
        assert (first if k == 0 else later) in " ".join(op.account.rows["J v"])


def test_a_double_graph_is_built_only_where_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "CLEARLY", torch.inf)
    op = operator(GGNLinearOperator)
    v = torch.randn(op.shape[1], dtype=torch.float64)
    calls: list[int] = []
    reference = OutputLinearization.jvp
    monkeypatch.setattr(OutputLinearization, "jvp", lambda self, *a: calls.append(1) or reference(self, *a))
    op @ v
    assert not calls
    op @ v
    assert calls
    calls.clear()
    op @ v
    assert not calls


def test_what_was_found_serves_later_choices_until_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "CLEARLY", torch.inf)
    found: dict[object, Any] = {}
    calls: list[str] = []

    def slow(v: Tensor) -> Tensor:
        calls.append("slow")
        return 2 * v

    def small(v: Tensor) -> Tensor:
        if calls.count("fails"):
            raise ValueError("no more")
        return 2 * v

    def make() -> tuple[Choice, Account]:
        account = Account()
        return Choice("doubling", account, lambda: found), account

    ways = {"slow": slow, "small": small}
    x = torch.ones(3)
    assert torch.equal(make()[0](x, ways), 2 * x) and calls
    calls.clear()
    later, account = make()
    assert torch.equal(later(x, ways), 2 * x) and not calls
    assert account.rows["doubling"] == ("small", "as found by an earlier operator of this model")
    other, _ = make()
    assert torch.equal(other(torch.ones(4), ways), 2 * torch.ones(4)) and calls  # another shape
    calls[:] = ["fails"]
    assert torch.equal(make()[0](x, ways), 2 * x) and make()[0].settled(x) is False


def test_operators_of_one_model_share_what_was_found() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    data = [(torch.randn(5, 6).double(), torch.randint(3, (5,)))]
    args = model, nn.CrossEntropyLoss(), dict(model.named_parameters()), data
    v, shared = torch.randn(83, dtype=torch.float64), "as found by an earlier operator of this model"
    ggn_operator = GGNLinearOperator(*args, check_deterministic=False)
    expected_product = [ggn_operator @ v for _ in range(3)][-1]
    later = GGNLinearOperator(*args, check_deterministic=False)
    fisher = EFLinearOperator(*args, check_deterministic=False)
    for _ in range(2):
        torch.testing.assert_close(later @ v, expected_product, rtol=1e-12, atol=1e-14)
        fisher @ v
    for op in (later, fisher):
        assert op.account.rows["J v"] == (ggn_operator.account.rows["J v"][0], shared)
    model[1].register_forward_hook(lambda module, inputs, output: 2 * output)
    changed = GGNLinearOperator(*args, check_deterministic=False)
    torch.testing.assert_close(changed @ (changed @ v), changed.to_dense() @ (changed @ v), rtol=1e-11, atol=1e-13)
    assert changed.account.rows["J v"][1] != shared
