"""Matrices come back as they were written; broken files are refused; a failed write leaves the old file."""

import re

import pytest
import torch
from safetensors.torch import save_file

from curvops.tour.files import load_matrices, save_matrices


def write(path, **matrices):
    parameters = {"weight": (1, 2), "bias": (1,)}
    return save_matrices(path, matrices, parameters=parameters, groups={"1": 3}, settings={"seed": 7})


def test_round_trip_keeps_order_values_and_description(tmp_path):
    z, a = torch.randn(3, 3), torch.randn(3, 3, dtype=torch.float64).T
    found = load_matrices(write(tmp_path / "m.safetensors", z=z, a=a, again=z))
    assert list(found.matrices) == ["z", "a", "again"]
    assert torch.equal(found.matrices["z"], z) and torch.equal(found.matrices["a"], a)
    assert found.matrices["a"].dtype == torch.float64
    assert found.parameters == {"weight": (1, 2), "bias": (1,)}
    assert list(found.parameters) == ["weight", "bias"]
    assert found.groups == {"1": 3} and found.settings == {"seed": 7}
    assert found.versions["torch"].startswith(torch.__version__.split("+")[0])


def test_truncated_and_other_files_are_refused_in_one_line(tmp_path):
    path = write(tmp_path / "m.safetensors", a=torch.randn(50, 50))
    content = path.read_bytes()
    for keep in (0, 4, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:keep])
        with pytest.raises(ValueError, match="is truncated or not a safetensors file") as caught:
            load_matrices(path)
        assert "\n" not in str(caught.value)
    save_file({"a": torch.eye(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="but not one of curvature matrices"):
        load_matrices(tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError, match=re.escape("missing.safetensors' is not a file")):
        load_matrices(tmp_path / "missing.safetensors")
