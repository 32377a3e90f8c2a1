"""Plots of spectra, estimates and losses, axes in and axes out. Needs matplotlib."""

from curvops.plots.convergence import plot_convergence
from curvops.plots.density import plot_spectral_density
from curvops.plots.landscape import Landscape
from curvops.plots.layers import plot_eigenvectors_by_layer
from curvops.plots.loss import plot_loss_along, plot_loss_plane

__all__ = [
    "Landscape",
    "plot_convergence",
    "plot_eigenvectors_by_layer",
    "plot_loss_along",
    "plot_loss_plane",
    "plot_spectral_density",
]
