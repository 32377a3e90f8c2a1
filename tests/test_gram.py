"""Second moments of which only the upper half is accumulated."""

import pytest
import torch

from curvops.gram import add_moment, mirrored


@pytest.mark.parametrize("size", [1, 5, 64, 127, 128, 200, 800])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("first", [False, True])
def test_moments_are_those_of_the_rows(size, groups, first):
    generator = torch.Generator().manual_seed(0)
    moment, diagonal = (torch.zeros(groups, *shape).double() for shape in ((size, size), (size,)))
    expected = torch.zeros_like(moment)
    for units, positions in ((3, 2), (2, 5), (2, 130)):
        shape = (units, groups, size, positions) if first else (units, positions, groups, size)
        rows = torch.randn(shape, generator=generator, dtype=torch.float64)
        rows = rows.permute(0, 3, 1, 2) if first else rows
        add_moment(moment, rows)
        add_moment(diagonal, rows)
        expected += torch.einsum("npgi,npgj->gij", rows, rows)
    torch.testing.assert_close(mirrored(moment), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mirrored(diagonal), expected.diagonal(dim1=1, dim2=2), rtol=1e-12, atol=1e-12)
