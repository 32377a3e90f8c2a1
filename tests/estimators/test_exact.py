"""Estimators are exact where theory says so, and their formulas equal definitions that leave vectors out by hand."""

import pytest
import torch

from curvops import OuterProductOperator
from curvops.estimators import by_group, diagonal, logdet, squared_norm, trace, trace_function
from curvops.estimators.diagonal import _XDiag
from curvops.estimators.probes import Probes
from curvops.estimators.trace import _XTrace
from curvops.matrix import Products
from estimators.matrices import GROUPS, SPECTRA, D, block, hessian, low_rank, with_spectrum

DENSE = with_spectrum(SPECTRA["indefinite"]) + 0.1 * torch.arange(D * D, dtype=torch.float64).reshape(D, D).sin()


def is_exact(found, truth, products=D):
    torch.testing.assert_close(found.as_subclass(torch.Tensor), truth)
    assert found.exact and found.products == products and not found.standard_error.any()
    assert found.standard_error.shape == truth.shape


@pytest.mark.parametrize("method", ["hutchinson", "hutch++", "xtrace"])
def test_as_many_products_as_dimensions(method):
    is_exact(trace(DENSE, method=method, num_products=D), DENSE.trace())
    found = trace(DENSE, method=method, groups=GROUPS)
    for name, rows in GROUPS.items():
        is_exact(found[name], block(DENSE, rows).trace())


def test_as_many_products_as_dimensions_of_the_others():
    for method in ("hutchinson", "xdiag"):
        is_exact(diagonal(DENSE, method=method), DENSE.diagonal())
    is_exact(squared_norm(DENSE), DENSE.square().sum())
    symmetric = DENSE + DENSE.T
    norms, blocks = squared_norm(symmetric, groups=GROUPS), by_group(symmetric, GROUPS)
    for name, rows in GROUPS.items():
        truth = block(symmetric, rows)
        for found in (norms[name], blocks[name].squared_norm):
            is_exact(found, truth.square().sum())
        is_exact(blocks[name].trace, truth.trace())
        is_exact(blocks[name].diagonal, truth.diagonal())
    is_exact(trace_function(symmetric, torch.exp), torch.linalg.matrix_exp(symmetric).trace())
    positive = DENSE @ DENSE.T
    is_exact(logdet(positive, damping=0.3), torch.logdet(positive + 0.3 * torch.eye(D).double()))


@pytest.mark.parametrize("rank", [0, 1, 7])
@pytest.mark.parametrize("distribution", ["rademacher", "normal"])
def test_low_rank(rank, distribution):
    matrix = low_rank(D, rank)
    for method in ("hutch++", "xtrace"):
        found = trace(matrix, method=method, num_products=30, distribution=distribution)
        torch.testing.assert_close(found.as_subclass(torch.Tensor), matrix.trace(), rtol=1e-10, atol=1e-10)
        assert found.standard_error < 1e-10
    found = diagonal(matrix, num_products=30)
    torch.testing.assert_close(found.as_subclass(torch.Tensor), matrix.diagonal(), rtol=1e-10, atol=1e-10)
    assert found.standard_error.max() < 1e-10


def test_signs_are_exact_for_a_diagonal_matrix():
    matrix = torch.diag(torch.arange(D, dtype=torch.float64))
    for found, truth in (
        (trace(matrix, method="hutchinson", num_products=2), matrix.trace()),
        (diagonal(matrix, method="hutchinson", num_products=2), matrix.diagonal()),
        (squared_norm(matrix, num_products=2), matrix.square().sum()),
    ):
        torch.testing.assert_close(found.as_subclass(torch.Tensor), truth)
        assert not found.standard_error.any()


def test_a_multiple_of_the_identity_has_one_eigenvalue():
    found = logdet(2 * torch.eye(500, dtype=torch.float64), damping=1, num_products=60)
    torch.testing.assert_close(found.item(), 500 * torch.tensor(3.0).double().log().item())
    assert not found.exact and found.standard_error < 1e-10


def test_the_quadrature_is_exact_for_polynomials():
    """Depth 3 gives degree 5: the samples are vᵀA⁵v, as Hutchinson's."""
    matrix = with_spectrum(SPECTRA["indefinite"])
    quadrature = trace_function(matrix, lambda x: x**5, depth=3, num_products=30, seed=4)
    power = trace(torch.linalg.matrix_power(matrix, 5), method="hutchinson", num_products=10, seed=4)
    torch.testing.assert_close(quadrature.as_subclass(torch.Tensor), power.as_subclass(torch.Tensor))
    torch.testing.assert_close(quadrature.standard_error, power.standard_error)


@pytest.mark.parametrize("exact", [True, False])
def test_the_log_determinant_is_differentiable_in_its_damping(exact):
    matrix = with_spectrum(SPECTRA["geometric"])
    damping = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    options = {"num_products": D} if exact else {"num_products": 50, "depth": 10}
    found = logdet(matrix, damping=damping, **options)
    assert found.exact is exact and found.requires_grad
    (slope,) = torch.autograd.grad(found, damping)
    step = 1e-5
    ends = [logdet(matrix, damping=0.1 + sign * step, **options).item() for sign in (1, -1)]
    torch.testing.assert_close(slope.item(), (ends[0] - ends[1]) / (2 * step), rtol=1e-7, atol=0)
    if exact:
        torch.testing.assert_close(slope, torch.linalg.inv(matrix + 0.1 * torch.eye(D).double()).trace())


def test_traces_of_a_partition_add_up_and_take_the_products_of_one():
    operator, dense = hessian()
    for method in ("hutchinson", "hutch++", "xtrace"):
        options = {"method": method, "num_products": 18}
        whole, parts = trace(operator, **options), trace(operator, groups="tensors", **options)
        torch.testing.assert_close(sum(parts.values()), whole.as_subclass(torch.Tensor))
        assert all(part.products == whole.products == 18 for part in parts.values())
    parts = by_group(operator, "modules", num_products=18)
    assert list(parts) == ["0", "2"] and all(part.trace.products == 18 for part in parts.values())
    exact = by_group(operator, "modules")
    for name, rows in {"0": slice(0, 16), "2": slice(16, len(dense))}.items():
        is_exact(exact[name].trace, block(dense, rows).trace(), len(dense))


def test_bounds_of_a_block_s_largest_eigenvalue():
    matrix = with_spectrum(SPECTRA["geometric"])
    for name, found in by_group(matrix, GROUPS).items():
        low, high = found.eigenvalue_bounds
        assert low <= torch.linalg.eigvalsh(block(matrix, GROUPS[name])).max() <= high


def leaving_out(matrix, tests, spherical):
    """XTrace's and XDiag's sample j from the vectors of some set, by definition, as diagonals."""

    def sample(j, vectors):
        omega, product = tests[:, j], matrix @ tests[:, j]
        Q = torch.linalg.qr(matrix @ tests[:, [k for k in vectors if k != j]]).Q
        rest = omega - Q @ (Q.T @ omega)
        scale = (len(Q) - Q.shape[1]) / rest.square().sum() if spherical else 1
        xtrace = ((matrix @ Q) * Q).sum(1) + scale * rest * (matrix @ rest)
        xdiag = (Q * (matrix.T @ Q)).sum(1) + omega * (product - Q @ (Q.T @ product))
        return xtrace, xdiag

    return sample


@pytest.mark.parametrize("distribution", ["rademacher", "normal"])
def test_estimates_and_errors_by_definition(distribution):
    """With vectors added in two rounds, for a matrix that is not symmetric."""
    matrix, m = DENSE[:20, :20], 7
    rows = {"all": slice(0, 20), "some": torch.arange(3, 9)}
    with Products(matrix, "test") as products:
        xtrace = _XTrace(Probes(products, 3, distribution), rows)
        xdiag = _XDiag(Probes(products, 3, distribution))
        for sampler in (xtrace, xdiag):
            sampler.add(3)
            sampler.add(4)
    sample = leaving_out(matrix, xtrace.sketch.tests, distribution == "normal")
    samples = [sample(j, range(m)) for j in range(m)]
    without = [[sample(j, [k for k in range(m) if k != i]) for j in range(m)] for i in range(m)]

    def expected(reduce, which):
        values = torch.stack([reduce(one[which]) for one in samples])
        change = values - torch.stack([torch.stack([reduce(one[which]) for one in some]) for some in without])
        pairs = [change[i, j] * change[j, i] for i in range(m) for j in range(m) if i != j]
        return values.mean(0), values.var(0) / m, sum(pairs) / len(pairs)

    value, error = xtrace.result()
    for i, index in enumerate(rows.values()):
        mean, independent, covariance = expected(lambda d, index=index: d[index].sum(), 0)
        torch.testing.assert_close(value[i], mean)
        torch.testing.assert_close(error[i], (independent + covariance.clamp(min=0)).sqrt())
    value, error = xdiag.result()
    mean, independent, covariance = expected(lambda d: d, 1)
    torch.testing.assert_close(value, mean)
    ratio = 1 + covariance.sum() / independent.sum()
    assert ratio > 0.25
    torch.testing.assert_close(error, (independent * ratio).sqrt())


@pytest.mark.parametrize("seed", range(20))
def test_a_singular_matrix_has_no_determinant_whatever_rounding_makes_of_zero(seed):
    factor = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    with pytest.raises(ValueError, match="expected a positive definite matrix"):
        logdet(factor @ factor.T)
    is_exact(logdet(factor @ factor.T, damping=0.1), torch.logdet(factor @ factor.T + 0.1 * torch.eye(5)), 5)


def test_the_log_determinant_of_a_singular_matrix():
    """Minus infinity where the matrix is declared psd and known whole; else a number whose error is infinite, and a warning."""
    factor = torch.randn(40, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    singular = OuterProductOperator(factor.T)
    assert singular.psd and logdet(singular, num_products=300) == -torch.inf
    with pytest.warns(UserWarning, match="a depth above 10 or a larger damping"):
        found = logdet(factor.T @ factor, depth=10, num_products=100)
    assert found.standard_error == torch.inf and repr(found).endswith(
        "± inf, Lanczos quadrature of depth 10, 100 products)"
    )
    with pytest.raises(ValueError, match="not symmetric"):
        logdet(factor[:, :40] + 100 * torch.eye(40), depth=5, num_products=20)
