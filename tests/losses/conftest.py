"""Random tensors for the tests of the losses, from generators of their own."""

import pytest
import torch


def drawing(draw, seed, **options):
    @pytest.fixture
    def fixture():
        generator = torch.Generator().manual_seed(seed)
        return lambda *args: draw(args, generator, options)

    return fixture


randn = drawing(lambda shape, g, o: torch.randn(shape, generator=g, **o), 0, dtype=torch.float64)
rand = drawing(lambda shape, g, o: torch.rand(shape, generator=g, **o), 1, dtype=torch.float64)
randint = drawing(lambda args, g, o: torch.randint(args[0], args[1:], generator=g), 2)
