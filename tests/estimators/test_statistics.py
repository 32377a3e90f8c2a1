"""Over 200 fixed seeds, estimates have the right mean and the standard error that they state.

Bounds: a mean of 200 is within 4 of its standard errors (one in 16,000 fails by chance); the mean stated variance over
the variance over seeds, which has a relative deviation of 0.1 to 0.15 itself, is between 0.6 and 1.6; and at most 15 %
of the estimates are off by more than two stated errors (4.6 % of normal ones; few, skewed samples have more). All are
asked of the published methods and of the leave-one-out estimators' error, which is ours.
"""

import warnings

import pytest
import torch

from curvops.estimators import by_group, diagonal, logdet, squared_norm, trace, trace_function
from estimators.matrices import GROUPS, SPECTRA, block, with_spectrum

SEEDS = 200


def over_seeds(estimate, seeds=SEEDS):
    """Values and stated errors ``[seeds, …]``."""
    found = [estimate(seed) for seed in range(seeds)]
    values = torch.stack([one.as_subclass(torch.Tensor).detach() for one in found])
    return values, torch.stack([one.standard_error for one in found])


def check(values, errors, truth, conservative=1.6, beyond=0.15):
    deviation = values.std(0)
    bias = (values.mean(0) - truth).abs() / deviation * SEEDS**0.5
    ratio = errors.square().mean(0) / deviation.square()
    assert bias.max() < 4, f"biased by {bias.max():.1f} standard errors"
    assert ratio.min() > 0.6 and ratio.max() < conservative, (
        f"stated / true variance {ratio.min():.2f}, {ratio.max():.2f}"
    )
    assert (((values - truth) / errors).abs() > 2).double().mean() < beyond


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("distribution", ["rademacher", "normal"])
@pytest.mark.parametrize("method", ["hutchinson", "hutch++", "xtrace"])
def test_trace(method, distribution, spectrum):
    """Of the whole matrix, and by group where few samples are not too skewed."""
    matrix = with_spectrum(SPECTRA[spectrum])
    groups = {"whole": slice(None)} | (GROUPS if distribution == "rademacher" and spectrum != "geometric" else {})
    options = {"method": method, "distribution": distribution, "num_products": 48, "groups": groups}
    found = [trace(matrix, seed=seed, **options) for seed in range(SEEDS)]
    for name, rows in groups.items():
        check(*over_seeds(lambda seed, name=name: found[seed][name]), block(matrix, rows).trace())


@pytest.mark.parametrize("method", ["hutchinson", "hutch++", "xtrace"])
def test_trace_of_a_matrix_that_is_not_symmetric(method):
    matrix = with_spectrum(SPECTRA["harmonic"]).tril()
    check(*over_seeds(lambda seed: trace(matrix, method=method, num_products=48, seed=seed)), matrix.trace())


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("method", ["hutchinson", "xdiag"])
def test_diagonal(method, spectrum):
    matrix = with_spectrum(SPECTRA[spectrum])
    values, errors = over_seeds(lambda seed: diagonal(matrix, method=method, num_products=48, seed=seed))
    bias = (values.mean(0) - matrix.diagonal()) / values.std(0) * SEEDS**0.5
    assert bias.abs().max() < 4.5  # of 60 entries
    ratio = errors.square().mean() / values.var(0).mean()
    assert 0.8 < ratio < 1.25


@pytest.mark.parametrize("rows", [60, 40])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_squared_norm(spectrum, rows):
    matrix = with_spectrum(SPECTRA[spectrum])[:rows]
    found = over_seeds(lambda seed: squared_norm(matrix, num_products=48, seed=seed))
    check(*found, matrix.square().sum())


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_squared_norms_and_traces_by_group(spectrum):
    """The jackknife's variance is too large where pairs outweigh single vectors, by at most a factor of two."""
    matrix = with_spectrum(SPECTRA[spectrum])
    found = [by_group(matrix, GROUPS, num_products=48, seed=seed) for seed in range(SEEDS)]
    for name, rows in GROUPS.items():
        truth = block(matrix, rows)
        squares = over_seeds(lambda seed, name=name: found[seed][name].squared_norm)
        check(*squares, truth.square().sum(), conservative=2.5, beyond=0.2)
        check(*over_seeds(lambda seed, name=name: found[seed][name].trace), truth.trace())


@pytest.mark.parametrize("distribution", ["rademacher", "normal"])
def test_functions(distribution):
    matrix = with_spectrum(torch.linspace(0, 2, 150, dtype=torch.float64))
    options = {"depth": 8, "num_products": 96, "distribution": distribution}
    truth = torch.linalg.eigvalsh(matrix)
    check(*over_seeds(lambda seed: trace_function(matrix, torch.exp, seed=seed, **options)), truth.exp().sum())
    found = over_seeds(lambda seed: logdet(matrix, damping=1.0, seed=seed, **options))
    check(*found, (truth + 1).log().sum())


@pytest.mark.parametrize("damping", [1e-8, 1e-6, 1e-4, 1e-2, 1.0])
def test_a_log_determinant_states_what_its_depth_leaves(damping):
    """A third of the eigenvalues is zero: without the quadrature's part errors are 18 where 600 are missing."""
    values = torch.cat([torch.zeros(100, dtype=torch.float64), torch.logspace(-5, 2, 200, dtype=torch.float64)])
    matrix, truth = with_spectrum(values), (values + damping).log().sum()
    options = {"damping": damping, "depth": 15, "num_products": 150}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found, errors = over_seeds(lambda seed: logdet(matrix, seed=seed, **options), 20)
    assert ((found - truth).abs() < 4 * errors).all() and ((found - truth).abs().mean() < errors.mean())
    assert any("a depth above 15" in str(each.message) for each in caught) == (damping < 0.1)


def test_errors_fall_as_published():
    """Four times the products: half the error for Hutchinson, and a quarter for Hutch++ and XTrace on a spectrum 1/i."""
    matrix = with_spectrum(1 / torch.arange(1, 301, dtype=torch.float64))

    def error(method, products):
        found = [trace(matrix, method=method, num_products=products, seed=seed) - matrix.trace() for seed in range(60)]
        return torch.stack(found).square().mean().sqrt()

    coarse, fine = ({method: error(method, m) for method in ("hutchinson", "hutch++", "xtrace")} for m in (30, 120))
    assert 1.4 < coarse["hutchinson"] / fine["hutchinson"] < 2.8  # 60 seeds give each error to 9 %
    for method in ("hutch++", "xtrace"):
        assert coarse[method] / fine[method] > 3 and fine[method] < fine["hutchinson"] / 3


def test_xtrace_uses_each_product_twice():
    """Where eigenvalues fall geometrically its basis of m / 2 vectors beats that of m / 3: here 0.7^24 against 0.7^16."""
    matrix = with_spectrum(SPECTRA["geometric"])
    errors = {
        method: torch.stack([trace(matrix, method=method, num_products=48, seed=seed) for seed in range(60)])
        - matrix.trace()
        for method in ("hutch++", "xtrace")
    }
    assert errors["xtrace"].square().mean().sqrt() < errors["hutch++"].square().mean().sqrt() / 5
