"""Eigenvalues, eigenvectors and spectral densities of any symmetric matrix with products."""
