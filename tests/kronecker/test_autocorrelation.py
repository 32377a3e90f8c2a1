"""Second moments of windows from the autocorrelation, beside those of the windows themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from curvops import KFACLinearOperator
from curvops.kronecker import autocorrelation
from curvops.kronecker.autocorrelation import Padding, window_moment, window_sum
from curvops.kronecker.uses import Windows, patches


@pytest.mark.parametrize("shape", [(3, 2, 9, 8), (1, 1, 6, 7), (2, 5, 12, 10)])
@pytest.mark.parametrize("kernel", [(3, 3), (2, 4), (1, 3), (3, 1), (3, 2)])
@pytest.mark.parametrize("padding", [((0, 0), (0, 0)), ((1, 2), (0, 3))])
def test_moment_and_sum_are_those_of_the_windows(
    shape: tuple[int, ...], kernel: tuple[int, int], padding: Padding, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    rows = patches(x, kernel, (1, 1), padding, (1, 1), 1).flatten(0, 2)
    for strips in (autocorrelation.STRIPS, 0):
        monkeypatch.setattr(autocorrelation, "STRIPS", strips)
        torch.testing.assert_close(window_moment(x, kernel, padding), rows.T @ rows, rtol=1e-12, atol=1e-12)
    total, count = window_sum(x, kernel, padding)
    torch.testing.assert_close(total, rows.sum(0), rtol=1e-12, atol=1e-12)
    assert count == len(rows)


def kfac(separate: bool) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 4, (3, 5), padding="same", padding_mode="circular"),
        nn.Conv2d(4, 2, 3, stride=2),
        nn.Flatten(),
        nn.Linear(50, 5),
    ).double()
    data = [(torch.rand(n, 3, 11, 12).double(), torch.randint(5, (n,))) for n in (4, 2)]
    params = dict(model.named_parameters())
    return KFACLinearOperator(model, nn.CrossEntropyLoss(), params, data, separate_weight_and_bias=separate)


@pytest.mark.parametrize("separate", [True, False])
def test_kfac_is_the_same_either_way(separate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autocorrelation, "WORTH", torch.inf)
    direct = kfac(separate).to_dense()
    monkeypatch.setattr(autocorrelation, "WORTH", 0.0)
    calls: list[int] = []
    moment = Windows.moment
    monkeypatch.setattr(Windows, "moment", lambda self, *a: calls.append(1) or moment(self, *a))
    torch.testing.assert_close(kfac(separate).to_dense(), direct, rtol=1e-11, atol=1e-13)
    assert calls
