"""Columns together and forward mode: taken where measured faster and equal, left where they fail or lie."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvops import EFLinearOperator, GGNLinearOperator, HessianLinearOperator
from curvops.linearize import columns, pushforward
from curvops.linearize.reference import GradientLinearization, OutputLinearization, OutputProduct

KINDS = [HessianLinearOperator, GGNLinearOperator, EFLinearOperator]


def operator(kind: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    data = [(torch.randn(n, 6).double(), torch.randint(3, (n,))) for n in (5, 4)]
    return kind(model, nn.CrossEntropyLoss(), dict(model.named_parameters()), data, check_deterministic=False)


def one_by_one(op: Any, block: Tensor) -> Tensor:
    return torch.stack([op @ column for column in block.unbind(1)], 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("together", [True, False])
def test_both_ways_give_the_same_columns(kind: Any, together: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "CLEARLY", torch.inf if together else 0.0)
    op = operator(kind)
    block = torch.randn(op.shape[1], 19, dtype=torch.float64)
    torch.testing.assert_close(op @ block, one_by_one(op, block), rtol=1e-12, atol=1e-14)
    assert ("batched by vmap" if together else "one by one") in str(op.explain())


@pytest.mark.parametrize("kind", KINDS)
def test_unsupported_batching_falls_back(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Tensor:
        raise RuntimeError("no batching rule")

    for product in (GradientLinearization, OutputProduct):
        monkeypatch.setattr(product, "products", refuse)
    op = operator(kind)
    block = torch.randn(op.shape[1], 6, dtype=torch.float64)
    torch.testing.assert_close(op @ block, one_by_one(op, block), rtol=1e-12, atol=1e-14)
    assert "batching is unsupported here: RuntimeError: no batching rule" in str(op.explain())


@pytest.mark.parametrize("kind", KINDS)
def test_lying_batching_falls_back(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "CLEARLY", torch.inf)
    for product in (GradientLinearization, OutputProduct):
        monkeypatch.setattr(product, "products", lambda self, block: 1.001 * columns._loop(self, block))
    op = operator(kind)
    block = torch.randn(op.shape[1], 6, dtype=torch.float64)
    torch.testing.assert_close(op @ block, one_by_one(op, block), rtol=1e-12, atol=1e-14)
    assert "one by one" in str(op.explain()) and "differ by 1.0e-03" in str(op.explain())


@pytest.mark.parametrize("kind", [GGNLinearOperator, EFLinearOperator])
@pytest.mark.parametrize("forward", [True, False])
def test_both_pushforwards_agree(kind: Any, forward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pushforward, "CLEARLY", torch.inf if forward else 0.0)
    op = operator(kind)
    v = torch.randn(op.shape[1], dtype=torch.float64)
    first = op @ v
    for _ in range(3):
        torch.testing.assert_close(op @ v, first, rtol=1e-12, atol=1e-14)
    assert op.account.rows["J v"][0] == ("forward mode" if forward else "reverse over reverse")


@pytest.mark.parametrize("kind", [GGNLinearOperator, EFLinearOperator])
def test_unsupported_and_lying_forward_mode_fall_back(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pushforward, "CLEARLY", torch.inf)
    op = operator(kind)
    v = torch.randn(op.shape[1], dtype=torch.float64)
    first = op @ v
    exact = torch.func.jvp

    def lie(*args: Any) -> Any:
        primal, tangent = exact(*args)
        return primal, 1.001 * tangent

    def refuse(*_: Any) -> Any:
        raise NotImplementedError("no forward mode")

    for way, words in ((lie, "differs by 1.0e-03"), (refuse, "unsupported here: NotImplementedError: no forward mode")):
        monkeypatch.setattr(torch.func, "jvp", way)
        again = operator(kind)
        for _ in range(3):
            torch.testing.assert_close(again @ v, first, rtol=1e-12, atol=1e-14)
        assert words in str(again.explain())


def test_no_double_graph_is_built_where_forward_mode_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pushforward, "CLEARLY", torch.inf)
    op = operator(GGNLinearOperator)
    v = torch.randn(op.shape[1], dtype=torch.float64)
    for _ in range(2):
        op @ v
    calls: list[int] = []
    reference = OutputLinearization.jvp
    monkeypatch.setattr(OutputLinearization, "jvp", lambda self, *a: calls.append(1) or reference(self, *a))
    op @ v
    assert not calls
