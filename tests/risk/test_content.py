"""What tells whether tensors have changed."""

import pytest
import torch

from curvops.tree import LARGE, content

KINDS = {
    "large": lambda: torch.rand(LARGE // 8, 8),
    "odd rows": lambda: torch.rand(LARGE // 2, 3),
    "half": lambda: torch.rand(LARGE // 8, 8).half(),
    "integers": lambda: torch.arange(LARGE).view(-1, 4),
    "strided": lambda: torch.rand(8, LARGE).mT,
    "not aligned": lambda: torch.rand(LARGE + 8)[1 : LARGE + 1],
    "small": lambda: torch.rand(3, 2),
    "parameter": lambda: torch.nn.Parameter(torch.rand(LARGE)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_one_entry_that_changes_behind_autograds_back_is_seen(kind):
    torch.manual_seed(0)
    tensor = KINDS[kind]()
    before = content([tensor])
    assert content([tensor]) == before and hash(before) is not None
    tensor.detach().numpy().flat[-1] += 1
    assert content([tensor]) != before


def test_one_bit_of_a_large_tensor_is_seen():
    tensor = torch.full((LARGE,), 1.0)
    before = content([tensor])
    tensor.numpy()[5] = 1.0 + torch.finfo(torch.float32).eps
    assert content([tensor])[2:] != before[2:]
