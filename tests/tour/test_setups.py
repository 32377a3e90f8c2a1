"""The tutorial's task is the tutorial's, the digits are learned, randomness is left alone; matrices come back as written."""

import pytest
import torch
from torch import nn

from curvops.tour.files import load_matrices, save_matrices
from curvops.tour.setups import SIZES, digits, tutorial


def test_tutorial_draws_images_labels_and_weights_in_this_order_from_its_seed():
    setup = tutorial(dtype=torch.float64)
    assert str(setup).endswith("\nTotal parameters: 683\nLayer parameters: [112, 0, 404, 0, 37, 0, 130]")
    assert [len(labels) for _, labels in setup.data] == [20, 20, 10]
    assert setup.groups == {"1": 112, "2": 404, "3": 37, "4": 130}
    torch.manual_seed(0)
    images, labels = torch.rand(50, 3, 10, 10), torch.randint(5, (50,))
    first = nn.Conv2d(3, 4, 3, padding=1)
    assert torch.equal(torch.cat([x for x, _ in setup.data]), images.double())
    assert torch.equal(torch.cat([y for _, y in setup.data]), labels)
    assert torch.equal(setup.params["0.weight"], first.weight.double())
    assert not torch.allclose(setup.params["0.weight"], tutorial(seed=1, dtype=torch.float64).params["0.weight"])


def test_random_state_and_default_precision_do_not_matter_and_do_not_change():
    expected = [p.clone() for p in tutorial().params.values()]
    torch.manual_seed(123)
    torch.set_default_dtype(torch.float64)
    before = torch.get_rng_state()
    again = list(tutorial().params.values())
    digits(epochs=1)
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_digits_are_learned_and_both_setups_look_at_the_same_images():
    before, after = digits()
    pairs = list(zip(before.data, after.data, strict=True))
    assert sum(len(labels) for (_, labels), _ in pairs) == 500
    assert all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in pairs)
    right = [
        sum((setup.model(images).argmax(1) == labels).sum().item() for images, labels in setup.data) / 500
        for setup in (before, after)
    ]
    assert right[0] < 0.3 and right[1] > 0.9
    assert all(p.grad is None for p in after.params.values())


@pytest.mark.parametrize(("name", "made"), [("tutorial", lambda: [tutorial()]), ("digits", lambda: digits(epochs=0))])
def test_sizes_are_announced(name, made):
    assert SIZES[name] == tuple(setup.num_params for setup in made())
    assert all(sum(setup.layers) == setup.num_params <= 1000 for setup in made())


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
