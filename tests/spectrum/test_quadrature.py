"""Gauss quadrature by Lanczos, against sums over dense eigendecompositions."""

import pytest
import torch

from curvops.matrix import Products
from curvops.spectrum.quadrature import quadrature, recurrence


def symmetric(values, seed=0):
    """A matrix of given eigenvalues, and its eigenvectors."""
    values = torch.as_tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64, generator=generator))[0]
    matrix = basis * values @ basis.T
    return (matrix + matrix.T) / 2, basis


def starts(size, count):
    columns = torch.randn(size, count, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return columns / columns.norm(dim=0)


def moments(matrix, columns, degree):
    return torch.stack([(columns * (matrix.matrix_power(p) @ columns)).sum(0) for p in range(degree)], 1)


@pytest.mark.parametrize("depth", [1, 2, 5, 9])
def test_polynomials_up_to_twice_the_depth_are_exact(depth):
    matrix, _ = symmetric(torch.linspace(-1, 1, 30))
    columns = starts(30, 4)
    nodes, weights, _ = quadrature(Products(matrix, "test"), columns, depth)
    assert nodes.shape == weights.shape == (4, depth)
    found = torch.stack([(weights * nodes**p).sum(1) for p in range(2 * depth)], 1)
    torch.testing.assert_close(found, moments(matrix, columns, 2 * depth), rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    "values",
    [
        torch.logspace(-3, 3, 25),
        [1.0] * 5 + [2.0] * 5 + [7.0] * 3,
        [3.0],
        [0.5] * 8,
        [1.0, 2.0],
        [1e-2] * 10 + [1e4],
    ],
    ids=["wide", "multiple", "one", "identity", "two", "outlier"],
)
def test_full_depth_is_exact_for_any_function(values):
    matrix, basis = symmetric(values)
    values = torch.as_tensor(values, dtype=torch.float64)
    columns = starts(len(values), 3)
    nodes, weights, _ = quadrature(Products(matrix, "test"), columns, len(values) + 2)
    expected = (basis.T @ columns).square().T @ values.log()
    torch.testing.assert_close((weights * nodes.log()).sum(1), expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(weights.sum(1), torch.ones(3, dtype=torch.float64))


def test_a_space_that_ends_takes_no_more_products():
    # a diagonal matrix: what leaves a space is rounding of its own numbers, and not of the larger ones beside it
    basis = torch.eye(5, dtype=torch.float64)
    columns = torch.stack([basis[:, 0], (basis[:, 1] + basis[:, 2]) / 2**0.5, starts(5, 1)[:, 0]], 1)
    products = Products(torch.diag(torch.arange(1.0, 6.0, dtype=torch.float64)), "test")
    nodes, weights, _ = quadrature(products, columns, 5)
    assert products.count == 1 + 2 + 5
    assert (weights[0] > 1e-12).sum() == 1 and (weights[1] > 1e-12).sum() == 2
    torch.testing.assert_close((weights * nodes).sum(1)[:2], torch.tensor([1.0, 2.5], dtype=torch.float64))
    nodes, weights, _ = quadrature(Products(torch.zeros(4, 4), "zero"), torch.eye(4), 3)
    assert not nodes.any() and torch.equal(weights.sum(1), torch.ones(4, dtype=torch.float64))


def test_many_steps_stay_orthogonal():
    """Without reorthogonalisation an eigenvalue far outside would be found again and again."""
    values = torch.cat([torch.linspace(0, 1, 79), torch.tensor([1e3])]).double()
    matrix, basis = symmetric(values)
    columns = starts(80, 2)
    nodes, weights, _ = quadrature(Products(matrix, "test"), columns, 80)
    assert (nodes > 999).sum() == 2
    torch.testing.assert_close(nodes[0], values, rtol=0, atol=1e-10)
    torch.testing.assert_close(weights, (basis.T @ columns).square().T, rtol=0, atol=1e-10)


def test_a_basis_in_lower_precision_serves_nearly_as_well():
    matrix, basis = symmetric(torch.linspace(1, 2, 60))
    columns = starts(60, 2)
    nodes, weights, _ = quadrature(Products(matrix, "test"), columns, 30, basis_dtype=torch.float32)
    expected = (basis.T @ columns).square().T @ torch.linspace(1, 2, 60).double().log()
    torch.testing.assert_close((weights * nodes.log()).sum(1), expected, rtol=1e-6, atol=0)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="depth: expected a positive number of steps, got 0"):
        quadrature(Products(torch.eye(3), "test"), torch.eye(3), 0)
    with pytest.raises(ValueError, match="a product with the matrix is not finite"):
        quadrature(Products(torch.full((3, 3), torch.nan), "test"), torch.eye(3), 2)


@pytest.mark.parametrize("depth", [1, 4, 9])
def test_a_node_may_be_chosen(depth):
    """One degree more is exact, and the logarithm is between the two quadratures."""
    matrix, basis = symmetric(torch.logspace(-3, 0, 30))
    columns = starts(30, 4)
    found = recurrence(Products(matrix, "test"), columns, depth)
    nodes, weights = found.radau(0.0)
    assert nodes.shape == weights.shape == (4, depth + 1) and (nodes[:, 0] == 0).all()
    powers = torch.stack([(weights * nodes**p).sum(1) for p in range(2 * depth + 1)], 1)
    torch.testing.assert_close(powers, moments(matrix, columns, 2 * depth + 1), rtol=0, atol=1e-12)
    truth = (basis.T @ columns).square().T @ (torch.logspace(-3, 0, 30, dtype=torch.float64) + 1e-3).log()
    low, high = ((w * (n + 1e-3).log()).sum(1) for n, w in ((nodes, weights), found.gauss()))
    assert (low < truth).all() and (truth < high).all()
    assert found.lowest() <= float(found.gauss()[0].min())


def test_a_space_that_ended_takes_no_further_node():
    matrix, _ = symmetric([1.0] * 5 + [2.0] * 5)
    found = recurrence(Products(matrix, "test"), starts(10, 3), 6)
    nodes, weights = found.radau(0.5)
    torch.testing.assert_close((weights * nodes.log()).sum(1), (found.gauss()[1] * found.gauss()[0].log()).sum(1))
    assert found.ended.all() and abs(found.lowest() - 1.0) < 1e-12


def test_a_matrix_that_is_not_symmetric_is_refused():
    matrix = torch.randn(50, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="not symmetric"):
        recurrence(Products(matrix, "test"), starts(50, 2), 10)
    recurrence(Products(matrix + matrix.T, "test"), starts(50, 2), 10)


@pytest.mark.parametrize("lowest", [0.1, 0.0, -5.0])
def test_a_node_may_be_chosen_where_one_has_converged(lowest):
    """An isolated smallest eigenvalue, from which rounding does not tell the end."""
    values = torch.cat([torch.tensor([lowest]), torch.linspace(5, 10, 199)])
    found = recurrence(Products(torch.diag(values.double()), "test"), starts(200, 4), 60)
    for end in {found.lowest(), lowest, 0.0} - ({0.0} if lowest < 0 else set()):
        nodes, weights = found.radau(end)
        torch.testing.assert_close((weights * nodes.exp()).sum(1), (found.gauss()[1] * found.gauss()[0].exp()).sum(1))
