"""Norms of all blocks: within the stated errors over fixed seeds, exact where theory says so, zeros as zeros."""

import pytest
import torch
from problems import PROBLEMS

from curvops import KFACLinearOperator
from curvops.estimators import block_norms
from estimators.matrices import GROUPS, SPECTRA, D, hessian, with_spectrum

SEEDS = 200
ROWS = {name: torch.arange(D)[rows] for name, rows in GROUPS.items()}


def truth(matrix, rows=ROWS):
    parts = [[matrix[i][:, j] for j in rows.values()] for i in rows.values()]
    norms = torch.stack([torch.stack([block.norm() for block in row]) for row in parts])
    return norms, torch.stack([parts[i][i].trace() for i in range(len(rows))])


def plain(estimate):
    return estimate.as_subclass(torch.Tensor)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_errors_are_those_over_seeds(spectrum, symmetric):
    matrix = with_spectrum(SPECTRA[spectrum])
    if not symmetric:
        matrix = matrix.tril()
    found = [block_norms(matrix, GROUPS, num_products=9, symmetric=symmetric, seed=seed) for seed in range(SEEDS)]
    norms, traces = truth(matrix)
    for field, expected in (("squared", norms.square()), ("norms", norms), ("traces", traces)):
        values = torch.stack([plain(getattr(one, field)) for one in found])
        errors = torch.stack([getattr(one, field).standard_error for one in found])
        sampled = errors.sum(0) > 0
        assert (values - expected)[:, ~sampled].abs().sum() < 1e-12
        values, errors, expected = (t[..., sampled] for t in (values, errors, expected))
        if field != "norms":  # of which the root of an unbiased estimate is no unbiased one
            assert ((values.mean(0) - expected).abs() / values.std(0) * SEEDS**0.5).max() < 4
        z = (values - expected) / errors
        # a t-distribution of 9 samples has a mean square of 8 / 6, and skewed samples more; roots are less skewed
        assert z.square().mean(0).max() < (4 if field == "squared" else 2.5)
        assert (z.abs() > 2).double().mean() < 0.15
        # where signs vary less than their bound, the stated errors are too large
        assert spectrum == "flat" or z.square().mean() > 0.6
        assert (errors.square().mean(0) / values.var(0)).min() > 0.6


def test_as_many_products_as_columns():
    matrix = with_spectrum(SPECTRA["indefinite"])
    norms, traces = truth(matrix)
    found = block_norms(matrix, GROUPS, num_products=25, symmetric=True)
    assert found.norms.exact and found.norms.products == D and not found.norms.standard_error.any()
    torch.testing.assert_close(plain(found.norms), norms)
    torch.testing.assert_close(plain(found.traces), traces)
    # the first group is exact, so that its row is, and no other
    some = block_norms(matrix, GROUPS, num_products=10, symmetric=True)
    torch.testing.assert_close(plain(some.norms)[0], norms[0])
    assert not some.norms.exact and (some.norms.standard_error == 0).sum() == 5


def test_zero_blocks_are_exact():
    matrix = with_spectrum(SPECTRA["flat"])
    matrix[:10, 10:] = matrix[10:, :10] = 0
    found = block_norms(matrix, GROUPS, num_products=3, symmetric=True)
    assert not plain(found.norms)[0, 1:].any() and not found.norms.standard_error[0, 1:].any()
    assert plain(found.norms)[1, 2] > 0 and found.norms.standard_error[1, 2] > 0


@pytest.mark.parametrize("groups", ["tensors", "modules"])
def test_operators(groups):
    operator, dense = hessian()
    found = operator.block_norms(groups, num_products=operator.shape[0])
    rows = {name: torch.arange(len(dense))[operator.domain.slice(name)] for name in operator.domain.names}
    if groups == "modules":
        rows = {n: torch.cat([r for name, r in rows.items() if name.rpartition(".")[0] == n]) for n in found.names}
    norms, traces = truth(dense, rows)
    torch.testing.assert_close(plain(found.norms), norms)
    torch.testing.assert_close(plain(found.traces), traces)


@pytest.mark.parametrize("joint", [True, False])
def test_structure_takes_no_products_unless_a_block_is_cut(joint):
    kfac = KFACLinearOperator(*PROBLEMS["mlp"]().args(), fisher_type="type-2", separate_weight_and_bias=not joint)
    dense = kfac.to_dense()
    for groups in ("tensors", "modules"):
        found = kfac.block_norms(groups, num_products=len(dense))
        cut = joint and groups == "tensors"
        assert found.norms.exact and found.norms.method == ("signs by group" if cut else "structure")
        assert (found.norms.products == 0) != cut
    norms, traces = truth(dense, {"a": torch.arange(len(dense) - 1), "b": torch.tensor([0])})
    cut = kfac.block_norms({"a": slice(0, len(dense) - 1), "b": torch.tensor([0])}, num_products=len(dense))
    torch.testing.assert_close(plain(cut.norms), norms)
    torch.testing.assert_close(plain(cut.traces), traces)


def test_refusals():
    matrix = torch.eye(4)
    with pytest.raises(ValueError, match="num_products: expected at least 2, for a standard error, got 1"):
        block_norms(matrix, {"all": slice(None)}, num_products=1)
    with pytest.raises(ValueError, match="expected a square matrix"):
        block_norms(torch.ones(3, 4), {"all": slice(None)})
    with pytest.raises(ValueError, match=r"groups\['a'\]: expected a slice within 0 and 4"):
        block_norms(matrix, {"a": slice(0, 9)})
    with pytest.raises(FloatingPointError, match="products with Tensor are not finite"):
        block_norms(matrix / 0, {"all": slice(None)}, num_products=3)
