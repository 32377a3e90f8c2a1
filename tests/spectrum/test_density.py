"""Spectral densities against dense spectra."""

import numpy as np
import pytest
import torch

from curvops.spectrum.density import SpectralDensity, spectral_density
from curvops.spectrum.lanczos import eigenpairs
from spectrum.test_lanczos import symmetric

BULK = torch.linspace(-1, 1, 60).double()
VALUES = torch.cat([BULK, torch.tensor([5.0, 8.0, 30.0, 100.0]).double()])


def test_as_many_starts_as_dimensions_at_full_depth_are_exact():
    found = spectral_density(symmetric(VALUES), depth=64, num_vectors=64)
    powers = torch.arange(4).double()
    curve = found.moments(3)
    torch.testing.assert_close(curve.values, (VALUES[:, None] ** powers).mean(0), rtol=1e-12, atol=1e-12)
    assert not curve.errors.any() and found.products <= 64 * 64
    points = torch.tensor([-2.0, -0.5, 0.01, 4.0, 20.0, 200.0]).double()
    expected = (VALUES[:, None] <= points).double().mean(0)
    torch.testing.assert_close(found.cumulative(points).values, expected, rtol=0, atol=1e-10)
    points, values, _ = found.density(width=0.5)
    expected = torch.distributions.Normal(VALUES, 0.5).log_prob(points[:, None]).exp().mean(1)
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("scale", ["linear", "symlog"])
def test_a_density_integrates_to_one(scale):
    found = spectral_density(symmetric(VALUES), depth=20, num_vectors=3)
    points, values, errors = found.density(scale=scale, threshold=0.1)
    coordinate = (points / 0.1).asinh() if scale == "symlog" else points
    torch.testing.assert_close(torch.trapezoid(values, coordinate), torch.tensor(1.0).double(), rtol=1e-4, atol=0)
    assert (errors >= 0).all() and points[0] < -1 and points[-1] > 100
    with pytest.raises(ValueError, match="scale: expected 'linear' or 'symlog', got 'log'"):
        found.density(scale="log")


def test_vectors_to_deflate_are_orthonormal():
    metric = symmetric(torch.linspace(1, 3, 64))
    pairs = eigenpairs(symmetric(VALUES), 2, metric=metric, metric_inverse=torch.linalg.inv(metric))
    with pytest.raises(ValueError, match="deflate: expected orthonormal vectors"):
        spectral_density(symmetric(VALUES), deflate=pairs)
    low = eigenpairs(symmetric(VALUES), 2, basis_dtype=torch.float32)
    assert spectral_density(symmetric(VALUES), deflate=low, num_vectors=2).products > 0


def test_errors_are_standard_errors():
    """Over many seeds the mean has no bias, and its spread is what single runs say."""
    matrix = symmetric(VALUES)
    runs = [spectral_density(matrix, depth=3, num_vectors=16, seed=seed).moments(3) for seed in range(200)]
    values, errors = (torch.stack([getattr(run, name) for run in runs])[:, 1:] for name in ("values", "errors"))
    expected = (VALUES[:, None] ** torch.arange(1, 4)).mean(0)
    bias = (values.mean(0) - expected) / (values.std(0) / len(runs) ** 0.5)
    assert bias.abs().max() < 3
    torch.testing.assert_close(errors.square().mean(0).sqrt(), values.std(0), rtol=0.2, atol=0)


def test_bulk_and_outliers():
    matrix = symmetric(VALUES)
    outliers = eigenpairs(matrix, 4, tolerance=1e-10)
    found = spectral_density(matrix, depth=60, num_vectors=60, deflate=outliers)
    assert found.nodes.abs().max() < 1 + 1e-9 and len(found.outliers) == 4
    torch.testing.assert_close(
        found.moments(2).values, (VALUES[:, None] ** torch.arange(3)).mean(0), rtol=1e-10, atol=1e-12
    )
    points, values, _ = found.density(width=0.05, outliers=False)
    assert points[-1] < 2
    torch.testing.assert_close(torch.trapezoid(values, points), torch.tensor(60 / 64).double(), rtol=1e-4, atol=0)
    few = spectral_density(matrix, depth=20, num_vectors=4, deflate=outliers)
    plain = spectral_density(matrix, depth=20, num_vectors=4)
    assert few.moments(2).errors[2] < plain.moments(2).errors[2] / 100
    with pytest.raises(ValueError, match=r"deflate: expected fewer than 3 vectors of this length, got \(64, 4\)"):
        spectral_density(torch.eye(3), deflate=outliers)


def test_groups_of_starts_seeds_and_the_random_state():
    matrix, before = symmetric(VALUES), torch.get_rng_state()
    whole = spectral_density(matrix, depth=10, num_vectors=5)
    parts = spectral_density(matrix, depth=10, num_vectors=5, memory_budget=2 * 10 * 64 * 8)
    torch.testing.assert_close(whole.nodes, parts.nodes)
    assert torch.equal(whole.nodes, spectral_density(matrix, depth=10, num_vectors=5).nodes)
    assert not torch.equal(whole.nodes, spectral_density(matrix, depth=10, num_vectors=5, seed=1).nodes)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_small_and_zero_matrices(size):
    found = spectral_density(torch.zeros(size, size, dtype=torch.float64))
    assert not found.nodes.any()
    assert found.cumulative(torch.tensor([-1.0, 0.0])).values.tolist() == pytest.approx([0.0, 1.0])
    points, values, _ = found.density()
    torch.testing.assert_close(torch.trapezoid(values, points), torch.tensor(1.0).double(), rtol=1e-4, atol=0)
    with pytest.raises(ValueError, match="num_vectors: expected a positive integer, got 0"):
        spectral_density(torch.eye(2), num_vectors=0)


SPREAD = torch.rand(60, generator=torch.Generator().manual_seed(3)).double()
ZEROS = torch.zeros(60).double()
CLUSTERS = {
    "half at zero, positive": torch.cat([ZEROS, SPREAD]),
    "half at zero, both signs": torch.cat([ZEROS, SPREAD[:20] - 1, SPREAD[20:]]),
    "decades on both sides": torch.cat([ZEROS, -(10 ** (6 * SPREAD[:20] - 6)), 10 ** (6 * SPREAD[20:] - 4)]),
    "two clusters": torch.cat([ZEROS[:40] + 1, ZEROS[:40] - 1, 3 * SPREAD - 1.5]),
    "even": torch.linspace(-1, 1, 120).double(),
}


@pytest.mark.parametrize("values", CLUSTERS.values(), ids=CLUSTERS)
def test_the_truth_lies_within_the_error_of_the_cumulative_share(values):
    matrix = symmetric(values, seed=7)  # not of the numbers that start vectors are drawn from
    points = torch.cat([torch.tensor([-10.0, -0.5, 0.0, 1e-6, 0.25, 0.75, 200.0]).double(), values[::13] + 1e-7])
    true = (values <= points.unsqueeze(1)).double().mean(1)
    widths = []
    for depth in (4, 10, 25):
        # as many starts as dimensions have no variance: what is left is the quadrature's resolution
        _, found, errors = spectral_density(matrix, depth=depth, num_vectors=len(values)).cumulative(points)
        assert ((found - true).abs() <= errors + 1e-9).all()
        assert (found >= 0).all() and (found <= 1 + 1e-9).all()
        widths.append(float(errors.mean()))
        few = [spectral_density(matrix, depth=depth, num_vectors=4, seed=seed).cumulative(points) for seed in range(3)]
        assert all(((one.values - true).abs() <= 3 * one.errors + 1e-9).all() for one in few)
    assert 0.5 > widths[0] > widths[1] > widths[2] > 0


def test_shares_beyond_the_spectrum_are_none_and_all():
    _, found, errors = spectral_density(symmetric(CLUSTERS["even"], seed=7), depth=12).cumulative(
        torch.tensor([-50.0, 50.0])
    )
    torch.testing.assert_close(found, torch.tensor([0.0, 1.0]).double(), rtol=0, atol=1e-12)
    assert errors.max() < 1e-12


def test_no_resolution_is_missing_where_the_krylov_space_ended():
    values = torch.cat([ZEROS, ZEROS[:30] + 1, ZEROS[:10] - 2])
    points = torch.tensor([-3.0, -1.0, 0.5, 2.0]).double()
    true = (values <= points.unsqueeze(1)).double().mean(1)
    matrix = torch.diag(values)
    ended = spectral_density(matrix, depth=5, num_vectors=100)
    assert ended.complete and not spectral_density(matrix, depth=2, num_vectors=100).complete
    torch.testing.assert_close(ended.cumulative(points).values, true, rtol=0, atol=1e-9)
    assert ended.cumulative(points).errors.max() < 1e-12
    at_zero = ended.cumulative(torch.zeros(1))
    assert at_zero.values - at_zero.errors <= 0.1 + 1e-9 and at_zero.values + at_zero.errors >= 0.7 - 1e-9


KNOWN = {
    "thirds, several times": torch.tensor(
        [-1 / 3, -1 / 3, -1 / 3, 0, -0.0, 1 / 3, 1 / 3, 1 / 3, 0.1, 0.1, 0.1]
    ).double(),
    "decades on both sides": CLUSTERS["decades on both sides"],
    "one": torch.full((7,), 0.1).double(),
    "tiny": torch.linspace(-3, 4, 50).double() * 5e-324,
}


@pytest.mark.parametrize("bins", [4000, 12])
@pytest.mark.parametrize("values", KNOWN.values(), ids=KNOWN)
def test_shares_of_known_eigenvalues_hold_at_each_of_them(values, bins):
    found = SpectralDensity.of(values, bins)
    known = np.sort(values.numpy())
    beside = [np.nextafter(known, side) for side in (-np.inf, np.inf)]
    points = np.concatenate([known, *beside, [-1e9, 1e9]])
    true = np.searchsorted(known, points, side="right") / len(known)
    _, shares, errors = found.cumulative(torch.from_numpy(points))
    assert (np.abs(shares.numpy() - true) <= errors.numpy() + 1e-12).all()
    binned = len(np.unique(known)) > bins
    assert bool(errors.any()) == binned and float(errors[-2:].max()) == 0
    # no more than half a bin's weight
    assert float(errors.max()) <= float(found.weights[0].max()) / 2 + 1e-12
    powers = found.moments(3)
    true = (values[:, None] ** torch.arange(4)).mean(0)
    assert ((powers.values - true).abs() <= powers.errors + 1e-12 * values.abs().max() ** torch.arange(4)).all()


def test_many_known_eigenvalues_are_put_into_bins():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(20_000, generator=generator, dtype=torch.float64) ** 5
    found = SpectralDensity.of(torch.cat([values, ZEROS]))
    assert found.nodes.shape[0] == 2 and 500 < found.nodes.shape[1] <= 4002
    points = values[::10]
    true = (torch.cat([values, ZEROS]) <= points.unsqueeze(1)).double().mean(1)
    _, shares, errors = found.cumulative(points)
    assert ((shares - true).abs() <= errors + 1e-12).all() and errors.max() < 2e-3
    below, at = found.cumulative(torch.tensor([-1e-300, 0.0], dtype=torch.float64)).values
    assert float(at - below) == pytest.approx(60 / 20_060, abs=1e-12)
    assert "all are known, in" in found._repr_html_()


def test_results_have_memory_of_their_own():
    matrix = torch.arange(1.0, 41.0, dtype=torch.float64).diag()
    pairs = eigenpairs(matrix, 2)
    kept = pairs.values.clone()
    spectral_density(matrix, deflate=pairs).outliers.mul_(2)
    assert torch.equal(pairs.values, kept)


def test_a_density_prints_in_a_line():
    for found in (
        spectral_density(torch.diag(torch.linspace(1, 2, 400))),
        SpectralDensity.of(torch.arange(9.0)),
    ):
        text = repr(found)
        assert len(text) < 250 and "\n" not in text and "tensor" not in text and f"eigenvalues: {found.dim}" in text
