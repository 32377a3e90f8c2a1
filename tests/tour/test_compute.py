"""What a tour computes and keeps of a problem: what is finite, whose cost is whose, and which files are not replaced."""

from pathlib import Path

import pytest
import torch
from torch import nn

from curvops import EmpiricalRisk
from curvops.tour import OPERATORS
from curvops.tour.compute import MATRICES, Problem, compute
from curvops.tour.meter import measured


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Three matrices only."""
    titles = ["Hessian", "Generalized Gauss-Newton", "KFAC"]
    monkeypatch.setattr("curvops.tour.compute.OPERATORS", {title: OPERATORS[title] for title in titles})
    return titles


def problem(folder, dtype=torch.float32, size=1.0):
    """Of a linear model, whose data have this size."""
    model, data = nn.Linear(3, 1).to(dtype), [(torch.full((2, 3), size, dtype=dtype), torch.zeros(2, 1, dtype=dtype))]
    risk = EmpiricalRisk(model, nn.MSELoss(), dict(model.named_parameters()), data)
    return Problem("linear", risk, {"all": risk.space.dim}, folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_huge_loss_is_finite(dtype, few, tmp_path):
    """Beyond what single precision holds, or the square of what it holds."""
    found = compute(problem(tmp_path, dtype, 1e60 if dtype == torch.float64 else 1e15))
    assert list(found.matrices) == few and found.file.settings["gradient_norm"] > 1e20
    with pytest.raises(ValueError, match="over the data it is nan"):
        compute(problem(tmp_path, dtype, torch.nan), check=False)


def test_what_torch_takes_at_first_use_counts_for_no_matrix(tmp_path, monkeypatch):
    used = []
    monkeypatch.setattr("curvops.tour.compute.warm_up", lambda *given: used.append(given))
    monkeypatch.setattr("curvops.tour.compute.measured", lambda device: used.append("measured") or measured(device))
    compute(problem(tmp_path, torch.float64))
    assert used == [(torch.device("cpu"), torch.float64), "measured"]


def test_a_file_that_may_not_be_read_is_not_replaced(tmp_path, monkeypatch):
    path = tmp_path / MATRICES
    path.write_bytes(b"somebody's")

    def closed(self, mode="r", *given, **named):
        if self == path and "r" in mode:
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, mode, *given, **named)

    opened = Path.open
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", closed)
        with pytest.raises(PermissionError, match=r"matrices\.safetensors"):
            compute(problem(tmp_path), resume=True)
    assert path.read_bytes() == b"somebody's"
