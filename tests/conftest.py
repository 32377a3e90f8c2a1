"""What every test relies on: figures without a window, a fixed seed, and global settings as they were."""

import gc
import os
from collections.abc import Iterator

os.environ["MPLBACKEND"] = "agg"
# the nets of the tests are tiny: a second thread gains nothing, and waits long for a core that others use
os.environ.setdefault("OMP_NUM_THREADS", "1")

import matplotlib.pyplot as plt
import pytest
import torch
import torch._dynamo  # as the first product with forward mode does


@pytest.fixture(autouse=True, scope="module")
def _frozen() -> None:
    # what libraries hold stays; to look through it at each collection takes longer than many a test
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.default_generator.manual_seed(0)
    yield
    plt.close("all")
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
