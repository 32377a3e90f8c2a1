"""Small batches are joined for dense matrices, and a model that mixes the data of a batch refutes that."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvops import HessianLinearOperator
from curvops.operators import hessian
from curvops.risk.data import Batch, joined_batches


def batch(size: int, start: int, width: int = 3) -> Batch:
    torch.manual_seed(start)
    return Batch(torch.rand(size, width), torch.arange(size), size, start)


def test_consecutive_batches_are_joined_up_to_a_size() -> None:
    several = [batch(4, 0), batch(4, 4), batch(4, 8), batch(2, 12)]
    joined = list(joined_batches(several, 8))
    assert [(b.size, b.start) for b in joined] == [(8, 0), (6, 8)]
    assert torch.equal(joined[0].X, torch.cat([several[0].X, several[1].X]))
    assert torch.equal(joined[1].y, torch.cat([several[2].y, several[3].y]))
    assert [b.size for b in joined_batches(several, 0)] == [4, 4, 4, 2]


def test_batches_of_other_shapes_or_structures_stay_alone() -> None:
    odd = Batch({"x": torch.rand(2, 3)}, torch.arange(2), 2, 4)
    flat = Batch(torch.rand(2, 3), torch.arange(6), 2, 6)  # targets that are not one for each datum
    assert [b.size for b in joined_batches([batch(4, 0), odd, flat, batch(3, 8, 5), batch(3, 11, 5)], 99)] == [
        4,
        2,
        2,
        6,
    ]


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    exact = hessian.layered_hessian
    monkeypatch.setattr(hessian, "layered_hessian", lambda *a: calls.append(1) or exact(*a))
    return calls


@pytest.mark.parametrize(("mixing", "expected"), [(False, 1), (True, 1 + 2)])
def test_the_way_that_is_certified_serves(mixing: bool, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    middle: list[nn.Module] = [nn.BatchNorm1d(5)] if mixing else []
    model = nn.Sequential(nn.Linear(4, 5), *middle, nn.Tanh(), nn.Linear(5, 3)).double()
    data = [(torch.randn(n, 4).double(), torch.randint(3, (n,))) for n in (6, 5)]
    params: dict[str, Tensor] = dict(model.named_parameters())
    calls = counted(monkeypatch)
    operator: Any = HessianLinearOperator(model, nn.CrossEntropyLoss(), params, data, check_deterministic=False)
    dense = operator.to_dense()
    assert len(calls) == expected
    assert operator.account.rows["dense matrix"][0] == "forward over reverse by layer"
    torch.testing.assert_close(dense, operator @ torch.eye(len(dense)).double(), rtol=1e-11, atol=1e-13)
