"""Random tensors for the tests of the losses, from a generator of their own."""

import pytest
import torch


@pytest.fixture
def randn():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return draw


@pytest.fixture
def rand():
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    return draw


@pytest.fixture
def randint():
    generator = torch.Generator().manual_seed(2)

    def draw(high, *shape):
        return torch.randint(high, shape, generator=generator)

    return draw
