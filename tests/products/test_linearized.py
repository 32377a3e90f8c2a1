"""`linearized` keeps what was computed, within the budget, until it ends; without it nothing outlives a call."""

import pytest
import torch
from conformance import close, draws
from problems import PROBLEMS, Interrupting

from curvops import EFLinearOperator, GGNLinearOperator, HessianLinearOperator
from curvops.products import rules
from curvops.products.batch import HeldRows

KINDS = [HessianLinearOperator, GGNLinearOperator, EFLinearOperator]


class Counted(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, x):
        self.calls += 1
        return self.inner(x)


@pytest.fixture(params=KINDS)
def cls(request):
    return request.param


def make(cls, budget=None, sizes=(2, 4)):
    p = PROBLEMS["mlp"]()
    model = Counted(p.model)
    params = dict(model.named_parameters())
    return model, cls(model, p.loss, params, p.data(*sizes), check_deterministic=False, memory_budget=budget), p


@pytest.mark.parametrize("rows", [True, False])
def test_the_model_runs_once_for_each_batch(cls, rows, monkeypatch):
    monkeypatch.setattr(rules, "kept_rows_pay", lambda *_: rows)
    model, op, p = make(cls)
    v, V = draws(p.dim), draws(p.dim, 3)
    expected, columns = op @ v, op @ V
    with op.linearized() as same, op.linearized():
        assert same is op
        close(op @ v, expected)
        model.calls = 0
        for _ in range(3):
            close(op @ v, expected)
            close(op @ V, columns)
        close(op.to_dense() @ v, expected)
        assert model.calls == 0 and "2 of 2 batches kept" in op.explain()
        held = rows and cls is not HessianLinearOperator
        assert all(isinstance(product, HeldRows) == held for product in op._kept._products.values())
    op @ v
    assert model.calls >= 2


def test_what_exceeds_the_budget_is_computed_anew(cls, monkeypatch):
    monkeypatch.setattr(rules, "kept_rows_pay", lambda *_: False)
    model, op, p = make(cls, sizes=(2, 2, 2))
    v = draws(p.dim)
    expected = op @ v
    with op.linearized():
        op @ v
        each = op._kept._size // 3 * 11 // 10
    for budget, runs in ((0, 3), (each, 2), (2 * each, 1), (3 * each, 0)):
        model, op, p = make(cls, budget, sizes=(2, 2, 2))
        with op.linearized():
            close(op @ v, expected)
            model.calls = 0
            for k in range(1, 4):
                close(op @ v, expected)
                assert model.calls == k * runs
            assert op._kept._size <= budget and f"{3 - runs} of 3 batches kept" in op.explain()


def test_a_failure_inside_leaves_a_context_that_works(cls):
    p = PROBLEMS["mlp"]()
    loader = Interrupting(p.data(2, 4))
    op = cls(p.model, p.loss, p.params, loader)
    v = draws(p.dim)
    expected = op @ v
    with op.linearized():
        loader.error = RuntimeError("disk")
        with pytest.raises(RuntimeError, match="disk"):
            op @ v
        loader.error = None
        for _ in range(2):
            close(op @ v, expected)
