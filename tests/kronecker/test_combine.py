"""The nearest Kronecker product to a sum of two, against the decomposition of the whole matrix."""

import pytest
import torch

from curvops.kronecker.state import nearest_product
from kronecker.cases import close, nearest_kronecker, real


def psd(groups, size, seed):
    root = real(groups, size, size, seed=seed)
    return root @ root.mT


@pytest.mark.parametrize("seed", range(5))
def test_two_dense_terms(seed):
    terms = [(psd(2, 3, 4 * seed), psd(2, 4, 4 * seed + 1)), (psd(2, 3, 4 * seed + 2), psd(2, 4, 4 * seed + 3))]
    left, right = nearest_product(terms)
    for g in range(2):
        whole = sum(torch.kron(a[g], b[g]) for a, b in terms)
        close(torch.kron(left[g], right[g]), nearest_kronecker(whole, 3, 4))


def test_a_factor_that_is_diagonal_in_one_term_is_diagonal_in_both():
    diagonal, other = real(1, 3).square(), psd(1, 2, 1)
    dense, second = psd(1, 3, 2), psd(1, 2, 3)
    left, right = nearest_product([(diagonal, other), (dense, second)])
    assert left.shape == (1, 3) and right.shape == (1, 2, 2)
    kept = [(torch.diag(diagonal[0]), other[0]), (torch.diag(dense[0].diagonal()), second[0])]
    close(torch.kron(torch.diag(left[0]), right[0]), nearest_kronecker(sum(torch.kron(a, b) for a, b in kept), 3, 2))


def test_a_term_of_zeros_changes_nothing():
    a, b = psd(1, 3, 0), psd(1, 2, 1)
    left, right = nearest_product([(a, b), (torch.zeros_like(a), psd(1, 2, 2))])
    close(torch.kron(left[0], right[0]), torch.kron(a[0], b[0]))
    left, right = nearest_product([(torch.zeros_like(a), b), (torch.zeros_like(a), b)])
    assert not torch.kron(left[0], right[0]).any() and torch.isfinite(right).all()
