"""Noise: independent of the batches, and statistically sound at fixed seeds."""

import itertools

import pytest
import torch

from curvops.losses import Noise

# a standard normal statistic passes 5 with probability 6e-7
LIMIT = 5.0


def z_score(sample, mean, variance):
    return (sample.mean() - mean).abs() / (variance / sample.numel()) ** 0.5


@pytest.mark.parametrize("name", ["uniform", "normal", "signs"])
@pytest.mark.parametrize("width", [None, 3])
def test_any_cut_gives_the_same_noise(name, width):
    whole = getattr(Noise(5, 0), name)(10, 2, 4, width)
    assert whole.shape == (10, 4) + (() if width is None else (width,))
    parts = [getattr(Noise(5, start), name)(2 * size, 2, 4, width) for start, size in ((0, 1), (1, 3), (4, 1))]
    assert torch.equal(torch.cat(parts), whole)
    # more samples or channels keep the first ones
    more = getattr(Noise(5, 0), name)(10, 2, 6, width)
    assert torch.equal(more[:, :4], whole)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63, 10**30])
def test_moments(seed):
    args = (2000, 4, 5, 5)
    uniform = Noise(seed, 0).uniform(*args)
    normal = Noise(seed, 7).normal(*args)
    signs = Noise(seed, 0).signs(*args)
    assert uniform.min() > 0 and uniform.max() < 1
    assert z_score(uniform, 1 / 2, 1 / 12) < LIMIT
    assert z_score((uniform - 0.5) ** 2, 1 / 12, 1 / 180) < LIMIT
    assert z_score(normal, 0, 1) < LIMIT
    assert z_score(normal**2, 1, 2) < LIMIT
    assert z_score(normal**4, 3, 96) < LIMIT
    assert z_score(signs, 0, 1) < LIMIT
    assert set(signs.unique().tolist()) == {-1.0, 1.0}


def excess(cells):
    """Standard errors by which the counts of 64 cells differ from equal ones."""
    expected = cells.numel() / 64
    chi2 = ((torch.bincount(cells.long().flatten(), minlength=64) - expected) ** 2 / expected).sum()
    return abs(chi2 - 63) / (2 * 63) ** 0.5


def test_uniform_cells_are_equally_full():
    sample = Noise(0, 0).uniform(100_000, 10, 2)
    for scale in (1, 2**20):  # the leading and some later digits
        assert excess((sample * scale).frac() * 64) < LIMIT


def test_pairs_of_neighbours_are_equally_full():
    """Joint histogram of neighbours along each component of the key."""
    sample = (8 * Noise(0, 0).uniform(4 * 2000, 4, 4, 4)).floor().reshape(2000, 4, 4, 4)
    for axis in range(4):
        size = sample.shape[axis]
        # overlapping pairs inflate the variance somewhat
        assert excess(sample.narrow(axis, 0, size - 1) * 8 + sample.narrow(axis, 1, size - 1)) < 2 * LIMIT


def correlation(a, b):
    a, b = a.reshape(-1), b.reshape(-1)
    return (torch.corrcoef(torch.stack([a, b]))[0, 1] * a.numel() ** 0.5).abs()


def test_low_correlation_across_keys():
    sample = Noise(0, 0).normal(4 * 500, 4, 4, 4).reshape(500, 4, 4, 4)
    for axis, lag in itertools.product(range(4), (1, 2)):
        size = sample.shape[axis]
        a = sample.narrow(axis, 0, size - lag)
        assert correlation(a, sample.narrow(axis, lag, size - lag)) < LIMIT
    # swapped components are different keys
    square = Noise(0, 0).normal(64 * 64, 64, 1).reshape(64, 64)
    above = torch.ones(64, 64).triu(1).bool()
    assert correlation(square[above], square.mT[above]) < LIMIT


def test_low_correlation_across_seeds_and_streams():
    args = (5000, 1, 2)
    for a, b in ((0, 1), (1, 2), (0, -1), (0, 2**32)):
        assert correlation(Noise(a, 0).normal(*args), Noise(b, 0).normal(*args)) < LIMIT
    noise = Noise(0, 0)
    assert correlation(noise.uniform(*args), noise.normal(*args)) < LIMIT
    assert correlation(noise.uniform(*args), noise.signs(*args)) < LIMIT
    assert correlation(noise.normal(*args), noise.signs(*args)) < LIMIT


def test_no_number_appears_twice():
    sample = Noise(0, 0).uniform(100_000, 10, 5)
    assert sample.unique().numel() == sample.numel()


def test_unequal_data_use_the_place_in_the_batch():
    assert Noise(0, 3).uniform(5, None, 2).unique().numel() == 10
    assert not torch.equal(Noise(0, 3).uniform(5, None, 2), Noise(0, 4).uniform(5, None, 2))


def test_frozen_values():
    """The noise is part of what a seed means: it may not change between versions."""
    frozen = [[0.9752873302169826, 0.8122692366755756], [0.9364038021624114, 0.39550009528522845]]
    assert Noise(0, 0).uniform(2, 1, 2).tolist() == frozen
