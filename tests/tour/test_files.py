"""Matrices come back as they were written; what is refused is in `kronecker/test_files`."""

import torch

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
