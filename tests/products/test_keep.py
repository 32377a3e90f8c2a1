"""Kept linearizations: reused while nothing has changed, made anew as soon as anything has."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvops import EFLinearOperator, GGNLinearOperator, HessianLinearOperator
from curvops.products import choose
from curvops.products.batches import LinearizedForward

KINDS = [HessianLinearOperator, GGNLinearOperator, EFLinearOperator]


def problem() -> tuple[nn.Sequential, nn.Module, dict[str, Tensor], list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double().eval()
    data = [(torch.randn(n, 6).double(), torch.randint(3, (n,))) for n in (5, 4)]
    return model, nn.CrossEntropyLoss(), dict(model.named_parameters()), data


def forward_calls(model: nn.Module) -> list[int]:
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    return calls


CHANGES: dict[str, Callable[[Any, Any, Any], Any]] = {
    "parameter in place": lambda model, params, data: params["0.weight"].detach().add_(0.1),
    "parameter by .data": lambda model, params, data: params["0.weight"].data.mul_(-1),
    "buffer": lambda model, params, data: model[1].running_mean.add_(0.3),
    "plain attribute": lambda model, params, data: setattr(model[1], "eps", 1e-2),
    "hook": lambda model, params, data: model[0].register_forward_hook(lambda module, inputs, output: 2 * output),
    "function": lambda model, params, data: setattr(model[2], "forward", torch.sin),
    "data in place": lambda model, params, data: data[0][0].mul_(1.1),
    "data by .data": lambda model, params, data: data[1][0].data.mul_(-1),
    "data by NumPy": lambda model, params, data: data[0][0].numpy().__setitem__((0, 0), 3.0),
    "targets": lambda model, params, data: data[0][1].copy_((data[0][1] + 1) % 3),
}


@pytest.mark.parametrize("kind", KINDS)
def test_repeated_products_run_no_forward_pass(kind: Any) -> None:
    model, loss, params, data = problem()
    calls = forward_calls(model)
    operator = kind(model, loss, params, data, check_deterministic=False)
    v = torch.randn(operator.shape[1], dtype=torch.float64)
    first = operator @ v
    torch.testing.assert_close(operator @ v, first, rtol=1e-12, atol=1e-14)  # may measure
    calls.clear()
    third = operator @ v
    torch.testing.assert_close(third, first, rtol=1e-12, atol=1e-14)
    choice = operator.account.rows.get("J v", ("reverse over reverse", ""))[0]
    assert bool(calls) == (choice == "forward mode")
    assert "2 of 2 batches kept" in str(operator.explain())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(kind: Any, change: str) -> None:
    model, loss, params, data = problem()
    operator = kind(model, loss, params, data, check_deterministic=False)
    v = torch.randn(operator.shape[1], dtype=torch.float64)
    before = operator @ v
    CHANGES[change](model, params, data)
    after = operator @ v
    anew = kind(model, loss, params, data, check_deterministic=False, memory_budget=0) @ v
    torch.testing.assert_close(after, anew, rtol=1e-12, atol=1e-14)
    sees = not (kind is GGNLinearOperator and change == "targets")  # the GGN of cross-entropy knows no labels
    assert ((after - before).norm() > 1e-6 * before.norm()) == sees


def test_a_mode_is_seen() -> None:
    model, loss, params, data = problem()
    operator = HessianLinearOperator(model, loss, params, data, check_deterministic=False)
    v = torch.randn(operator.shape[1], dtype=torch.float64)
    operator @ v
    model.train()
    anew = HessianLinearOperator(model, loss, params, data, check_deterministic=False, memory_budget=0)
    torch.testing.assert_close(operator @ v, anew @ v, rtol=1e-12, atol=1e-14)


def test_a_function_is_watched_through_the_module_that_it_refers_to() -> None:
    model, loss, params, data = problem()

    def function(p: dict[str, Tensor], X: Tensor) -> Tensor:
        return torch.func.functional_call(model, p, (X,))

    operator = GGNLinearOperator(function, loss, params, data, check_deterministic=False)
    v = torch.randn(operator.shape[1], dtype=torch.float64)
    operator @ v
    model[1].running_mean.add_(0.3)
    anew = GGNLinearOperator(function, loss, params, data, check_deterministic=False, memory_budget=0)
    torch.testing.assert_close(operator @ v, anew @ v, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_kept_without_a_budget(kind: Any) -> None:
    model, loss, params, data = problem()
    operator = kind(model, loss, params, data, check_deterministic=False, memory_budget=0)
    operator @ torch.ones(operator.shape[1], dtype=torch.float64)
    assert "no batch is kept" in str(operator.explain())


def test_what_fits_is_kept() -> None:
    model, loss, params, data = problem()
    whole = HessianLinearOperator(model, loss, params, data, check_deterministic=False)
    v = torch.ones(whole.shape[1], dtype=torch.float64)
    expected = whole @ v
    size = whole._kept.size
    part = HessianLinearOperator(model, loss, params, data, check_deterministic=False, memory_budget=int(0.7 * size))
    for _ in range(2):
        torch.testing.assert_close(part @ v, expected, rtol=1e-12, atol=1e-14)
    assert "1 of 2 batches kept" in str(part.explain())
    assert 0 < part._kept.size <= 0.7 * size


def test_what_outgrows_the_budget_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "CLEARLY", 0.0)  # the second product makes the graph of u ↦ Jᵀu
    model, loss, params, data = problem()
    whole = GGNLinearOperator(model, loss, params, data, check_deterministic=False)
    v = torch.ones(whole.shape[1], dtype=torch.float64)
    expected = whole @ v
    first = whole._kept.size
    whole @ v
    room = max(first, int(0.7 * whole._kept.size))
    assert whole._kept.size > room
    part = GGNLinearOperator(*problem(), check_deterministic=False, memory_budget=room)
    torch.testing.assert_close(part @ v, expected, rtol=1e-12, atol=1e-14)
    assert "2 of 2 batches kept" in str(part.explain())
    for _ in range(3):
        torch.testing.assert_close(part @ v, expected, rtol=1e-12, atol=1e-14)
        assert 0 < part._kept.size <= room and "1 of 2 batches kept" in str(part.explain())


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_flat_and_goes_with_the_operator(kind: Any) -> None:
    model, loss, params, data = problem()
    operator = kind(model, loss, params, data, check_deterministic=False)
    v = torch.ones(operator.shape[1], dtype=torch.float64)

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    operator @ v
    while any(not isinstance(left, LinearizedForward) for left in operator._sum._left):
        operator @ v  # until no form that is kept gives way to another one
    settled = tensors()
    for _ in range(30):
        operator @ v
    assert tensors() == settled
    kept = weakref.ref(next(iter(operator._kept._kept.values())).product)
    del operator
    gc.collect()
    assert kept() is None
