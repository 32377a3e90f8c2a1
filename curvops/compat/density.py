"""Spectral densities under the peer's names and arguments."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from curvops.compat.estimates import new_seed
from curvops.spectrum.density import SpectralDensity, spectral_density
from curvops.spectrum.lanczos import eigenpairs

Boundaries = tuple[float | None, float | None] | None


def approximate_boundaries(A: Any, tol: float = 1e-2, boundaries: Boundaries = None) -> tuple[float, float]:
    """The least and the largest eigenvalue, where they are not given."""
    low, high = boundaries or (None, None)
    if low is None or high is None:
        values = eigenpairs(A, 1, "both", tolerance=tol or None).values
        low, high = (float(v) if given is None else given for v, given in zip(values, (low, high), strict=True))
    return low, high


def approximate_boundaries_abs(A: Any, tol: float = 1e-2, boundaries: Boundaries = None) -> tuple[float, float]:
    """The least and the largest absolute value of an eigenvalue, where they are not given."""
    low, high = boundaries or (None, None)
    if low is None:
        low = math.sqrt(max(float(eigenpairs(A @ A, 1, "smallest", tolerance=tol or None).values[0]), 0.0))
    if high is None:
        high = abs(float(eigenpairs(A, 1, "magnitude", tolerance=tol or None).values[0]))
    return low, high


class _Cached:
    """Quadratures of a matrix, which are kept from one call to the next."""

    boundaries = staticmethod(approximate_boundaries)

    def __init__(self, A: Any, ncv: int, boundaries: Boundaries = None, boundaries_tol: float = 1e-2) -> None:
        self._matrix, self._depth = A, ncv
        self._low, self._high = self.boundaries(A, boundaries_tol, boundaries)
        self._found: list[SpectralDensity] = []

    def _quadratures(self, num_repeats: int) -> SpectralDensity:
        """Of at least so many start vectors."""
        missing = num_repeats - sum(len(found.nodes) for found in self._found)
        if missing > 0:
            found = spectral_density(self._matrix, depth=self._depth, num_vectors=missing, seed=new_seed())
            self._found.append(found)
        nodes, weights = (torch.cat([getattr(f, part) for f in self._found]) for part in ("nodes", "weights"))
        complete = all(found.complete for found in self._found)
        return replace(self._found[0], nodes=nodes[:num_repeats], weights=weights[:num_repeats], complete=complete)

    def _smoothed(
        self, found: SpectralDensity, ends: tuple[float, float], num_points: int, kappa: float, margin: float
    ) -> tuple[Tensor, Tensor]:
        """A grid beyond the ends by the margin, and the density there (Papyan 2020, section D.2)."""
        padding = margin * (ends[1] - ends[0])
        low, high = ends[0] - padding, ends[1] + padding
        grid = torch.linspace(low, high, num_points, dtype=torch.float64, device="cpu")
        width = (high - low) / (self._depth - 1) / math.sqrt(8 * math.log(kappa))
        return grid, found.density(grid, width=width).values

    def _answer(self, grid: Tensor, density: Tensor) -> tuple[Tensor, Tensor]:
        device, dtype = self._matrix.device, self._matrix.dtype
        return grid.to(device, dtype), density.to(device, dtype)


class LanczosApproximateSpectrumCached(_Cached):
    """Spectral density, smoothed in λ."""

    def approximate_spectrum(
        self, num_repeats: int = 1, num_points: int = 1024, kappa: float = 3.0, margin: float = 0.05
    ) -> tuple[Tensor, Tensor]:
        """A grid and the density there, of so many start vectors and Gaussians of a width by ``kappa``."""
        found = self._quadratures(num_repeats)
        return self._answer(*self._smoothed(found, (self._low, self._high), num_points, kappa, margin))


class LanczosApproximateLogSpectrumCached(_Cached):
    """Spectral density of |A|, smoothed in log(|λ| + ε)."""

    boundaries = staticmethod(approximate_boundaries_abs)

    def approximate_log_spectrum(
        self,
        num_repeats: int = 1,
        num_points: int = 1024,
        kappa: float = 3.0,
        margin: float = 0.05,
        epsilon: float = 1e-5,
    ) -> tuple[Tensor, Tensor]:
        """A grid of |λ| + ε, even in its logarithm, and the density there per unit of it."""
        found = self._quadratures(num_repeats)
        found = replace(found, nodes=(found.nodes.abs() + epsilon).log())
        ends = math.log(self._low + epsilon), math.log(self._high + epsilon)
        grid, density = self._smoothed(found, ends, num_points, kappa, margin)
        return self._answer(grid.exp(), density / grid.exp())


def lanczos_approximate_spectrum(
    A: Any,
    ncv: int,
    num_points: int = 1024,
    num_repeats: int = 1,
    kappa: float = 3.0,
    boundaries: Boundaries = None,
    margin: float = 0.05,
    boundaries_tol: float = 1e-2,
) -> tuple[Tensor, Tensor]:
    """A grid and the spectral density there: see `LanczosApproximateSpectrumCached`."""
    found = LanczosApproximateSpectrumCached(A, ncv, boundaries, boundaries_tol)
    return found.approximate_spectrum(num_repeats, num_points, kappa, margin)


def lanczos_approximate_log_spectrum(
    A: Any,
    ncv: int,
    num_points: int = 1024,
    num_repeats: int = 1,
    kappa: float = 1.04,
    boundaries: Boundaries = None,
    margin: float = 0.05,
    boundaries_tol: float = 1e-2,
    epsilon: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """A grid and the density of |A| there: see `LanczosApproximateLogSpectrumCached`."""
    found = LanczosApproximateLogSpectrumCached(A, ncv, boundaries, boundaries_tol)
    return found.approximate_log_spectrum(num_repeats, num_points, kappa, margin, epsilon)
