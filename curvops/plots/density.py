"""Plot of a spectral density: the bulk with its error band, and the outliers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from curvops.plots.axes import BLUE, RED, decades, drawn_on
from curvops.spectrum.density import NOTHING, Scale, SpectralDensity

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_spectral_density(
    density: SpectralDensity,
    *,
    ax: Axes | None = None,
    scale: Scale = "symlog",
    width: float | None = None,
    threshold: float | None = None,
    errors: float = 2.0,
) -> Axes:
    """Plot the density of eigenvalues that were not deflated, with a band of its error, and mark those that were.

    Both axes are true to area: the density is per unit of the scale that the eigenvalues are drawn on. Its own axis is
    logarithmic and ends at the height of about one eigenvalue; for a linear one call ``ax.set_yscale("linear")``.

    Details between the quadrature's nodes are not resolved: a node stands for all eigenvalues near it, and the band is
    of the start vectors only (``density.cumulative`` states both). Eigenvalues that were deflated are named outliers
    where they lie outside of the bulk's range.

    Args:
        density: From ``op.spectral_density()``, with outliers where pairs were given to ``deflate``.
        ax: Axes to draw on. Default: new ones.
        scale: ``"linear"``, or ``"symlog"``: asinh(λ / threshold), linear near zero and logarithmic on both sides.
        width: Standard deviation of the smoothing Gaussian on the scale. Default: 1 % of what is drawn.
        threshold: Where the symmetric logarithm turns. Default: 1e-4 of the largest |λ|.
        errors: Half of the band's height in standard errors; there is none from one start vector.

    Returns:
        The axes.

    Raises:
        TypeError: If it is no `SpectralDensity`.
        ValueError: If there is no such scale.

    Example:
        >>> import torch
        >>> from curvops.spectrum import spectral_density
        >>> found = spectral_density(torch.diag(torch.arange(50.0)))
        >>> plot_spectral_density(found, scale="linear").get_xlabel()
        'Eigenvalue'
    """
    if not isinstance(density, SpectralDensity):
        raise TypeError(
            f"plot_spectral_density: expected a SpectralDensity, from op.spectral_density(), got {type(density).__name__}."
        )
    largest = torch.cat([density.nodes.flatten(), density.outliers]).abs().max()
    turn = float(threshold or 1e-4 * largest or 1.0)
    points, values, band = density.density(width=width, scale=scale, threshold=turn, outliers=False)
    with drawn_on(ax, "plot_spectral_density") as ax:
        ax.fill_between(points, values - errors * band, values + errors * band, color=BLUE, alpha=0.25, lw=0)
        ax.plot(points, values, color=BLUE, label="density")
        bulk = density.nodes[density.weights > NOTHING]
        outside = (density.outliers < bulk.min()) | (density.outliers > bulk.max())
        _marked(ax, density.outliers[outside], RED, f"outlier{'s' * (int(outside.sum()) > 1)}")
        _marked(ax, density.outliers[~outside], BLUE, "known exactly, within the bulk")
        if density.products and not density.complete:
            ax.set_title("Details between nodes are not resolved", fontsize="small", color="gray")
        if scale == "symlog":
            ax.set_xscale("asinh", linear_width=turn)
            if ticks := decades(turn, *ax.get_xlim()):
                ax.set_xticks(ticks)
        ax.set_yscale("log")
        bottom, top = float(values.max()) / max(density.dim, 10), float((values + errors * band.nan_to_num()).max())
        ax.set_ylim(bottom, top * (top / bottom) ** 0.08)
        ax.set_xlabel("Eigenvalue")
        ax.set_ylabel("Density" if scale == "linear" else "Density on this scale")
        return ax


def _marked(ax: Axes, values: torch.Tensor, color: str, name: str) -> None:
    """Eigenvalues at the bottom, whatever the scale of the density."""
    if len(values):
        at_bottom: dict[str, Any] = {"transform": ax.get_xaxis_transform(), "clip_on": False, "zorder": 3}
        label = f"{len(values)} {name}"
        ax.plot(values, torch.full_like(values, 0.03), "v", color=color, ms=3, label=label, **at_bottom)
        ax.legend()
