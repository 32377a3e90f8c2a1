"""Eigenvalues, eigenvectors and spectral densities of any symmetric matrix with products."""

from curvops.spectrum.choice import Which
from curvops.spectrum.density import Curve, SpectralDensity, spectral_density
from curvops.spectrum.lanczos import eigenpairs
from curvops.spectrum.pairs import EigenPairs

__all__ = ["Curve", "EigenPairs", "SpectralDensity", "Which", "eigenpairs", "spectral_density"]
