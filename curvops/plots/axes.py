"""The axes that a plot is drawn on: the caller's, or new ones in the style of the tour's figures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil, floor, log10
from typing import TYPE_CHECKING, Any

from curvops.extras import extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SEQUENTIAL = "magma_r"  # little ink for small values, also in grey
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")  # told apart by all eyes (Okabe & Ito)
BLUE, RED, GREY = *COLORS[:2], "0.4"
STYLE: dict[str, Any] = {
    "figure.figsize": (3.25, 2.2),  # inches: a column of a page
    "figure.dpi": 150,
    "font.family": ["STIXGeneral"],  # it comes with matplotlib, and is cut like Times
    "font.size": 8,
    "mathtext.fontset": "stix",
    "axes.labelsize": 8,
    "axes.linewidth": 0.4,
    "axes.prop_cycle": f"cycler('color', {COLORS})",
    "legend.fontsize": 7,
    "legend.frameon": False,
    "lines.linewidth": 1.0,
    "pdf.fonttype": 42,
}
OURS = "curvops.plots"  # mark of the figures that are made here
TICKS: dict[str, Any] = {"width": 0.4, "labelsize": 7, "labelfontfamily": "STIXGeneral"}


@contextmanager
def drawn_on(ax: Axes | None, title: str) -> Iterator[Axes]:
    """The axes to draw on; new ones, with their figure, if none are given.

    Args:
        ax: The caller's axes, whose style stays; or some that came from here, for more of the same.
        title: What is drawn, for the error where matplotlib is missing.
    """
    pyplot = extra("matplotlib.pyplot", title)
    if ax is not None:
        with pyplot.rc_context(STYLE if ax.figure.get_gid() == OURS else {}):
            yield ax
        return
    with pyplot.rc_context(STYLE):
        figure, ax = pyplot.subplots(layout="constrained")
        figure.set_gid(OURS)
        ax.tick_params(which="major", length=2, pad=1.5, **TICKS)
        ax.tick_params(which="minor", length=1, **TICKS)
        try:
            yield ax
        except BaseException:
            pyplot.close(figure)
            raise
        figure.draw_without_rendering()  # texts that are made late take their fonts from here


def decades(turn: float, low: float, high: float) -> list[float]:
    """Zero, and powers of ten on both sides: at most five, that a symmetric logarithm which turns there keeps apart."""
    first, last = ceil(log10(3 * turn)), floor(log10(max(-low, high, 3 * turn)))
    powers = [10.0**k for k in range(last, first - 1, -1 - max(last - first, 0) // 5)]
    return [x for x in (*(-power for power in powers), 0.0, *powers[::-1]) if low <= x <= high]
