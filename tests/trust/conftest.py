"""Everything here is computed in double precision."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _double_precision(_as_it_was):
    torch.set_default_dtype(torch.float64)
