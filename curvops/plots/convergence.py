"""Plot of an estimate over the products that it took, with its error and a reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, SupportsFloat

from curvops.estimators import Estimate
from curvops.plots.axes import GREY, drawn_on

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_convergence(
    estimates: Sequence[Estimate],
    reference: SupportsFloat | None = None,
    *,
    ax: Axes | None = None,
    label: str | None = None,
    errors: float = 1.0,
) -> Axes:
    """Plot estimates of one number over their products, with error bars, beside what they should be.

    Several methods share axes: plot one after the other onto the same.

    Args:
        estimates: Estimates without axes, such as ``[op.trace(num_products=m) for m in (10, 30, 100)]``.
        reference: The number that is estimated, if it is known.
        ax: Axes to draw on. Default: new ones.
        label: For the legend. Default: the method's name.
        errors: Length of an error bar to each side, in standard errors.

    Returns:
        The axes.

    Raises:
        TypeError: If one of them is no `Estimate`.
        ValueError: If there is none, or one has axes.

    Example:
        >>> import torch
        >>> from curvops.estimators import trace
        >>> matrix = torch.diag(1 / torch.arange(1.0, 101.0))
        >>> ax = plot_convergence([trace(matrix, num_products=m) for m in (10, 20, 40)], matrix.trace())
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['reference', 'XTrace']
    """
    if not estimates:
        raise ValueError("plot_convergence: expected at least one estimate, got none.")
    for estimate in estimates:
        if not isinstance(estimate, Estimate):
            raise TypeError(
                f"plot_convergence: expected estimates, such as op.trace(), got {type(estimate).__name__}. Arithmetic "
                "makes a plain tensor of an estimate."
            )
        if estimate.ndim:
            raise ValueError(
                f"plot_convergence: expected estimates of one number, got shape {tuple(estimate.shape)}. "
                "Take the part of one entry, estimate.part(index)."
            )
    along = sorted(estimates, key=lambda estimate: estimate.products)
    products, values = [e.products for e in along], [float(e) for e in along]
    lengths = [errors * float(e.standard_error) for e in along]
    with drawn_on(ax, "plot_convergence") as ax:
        if reference is not None:
            ax.axhline(float(reference), color=GREY, lw=0.8, ls="--", label="reference")
        ax.errorbar(products, values, lengths, fmt=".-", ms=3, capsize=2, label=label or along[-1].method)
        ax.set_xscale("log")
        ax.set_xlabel("Products with the matrix")
        ax.set_ylabel("Estimate")
        ax.legend()
        return ax
