"""Where the panels go: squares that fill the figure's width, and a colour bar exactly as tall as they are."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

GAP = 0.09  # inches between panels, and from the last panel to the bar
BAR = 0.11  # the bar's width
EDGE = 0.02  # paper around everything
LABEL = 0.03  # from the tick labels to the label of a side


def arrange(fig: Figure, axes: npt.NDArray[Any], bar: Axes, axis_label: str) -> None:
    """Place square panels, the bar and the labels of the two sides, and set the figure's height.

    The text is measured first; all that is left of the figure's width goes to the panels.
    """
    images = [image for ax in axes.flat for image in ax.get_images()]
    for image in images:
        image.set_visible(False)  # the text alone is measured, which is quick
    fig.draw_without_rendering()
    for image in images:
        image.set_visible(True)
    rows, columns = axes.shape
    width = fig.get_figwidth()
    down = fig.supxlabel(axis_label, fontsize=axes.flat[0].title.get_fontsize())
    across = fig.supylabel(axis_label, fontsize=axes.flat[0].title.get_fontsize())
    label = max(_inches(fig, down.get_window_extent()).height, _inches(fig, across.get_window_extent()).width)

    left = EDGE + label + LABEL + max(_overhang(fig, ax)[0] for ax in axes[:, 0])
    bottom = EDGE + label + LABEL + max(_overhang(fig, ax)[1] for ax in axes[-1])
    right = EDGE + _overhang(fig, bar)[2]
    tops = [max(_overhang(fig, ax)[3] for ax in row) for row in axes]
    side = (width - left - right - columns * GAP - BAR) / columns
    height = bottom + rows * side + sum(tops) + (rows - 1) * GAP / 2 + EDGE

    fig.set_figheight(height)
    top = height - EDGE
    for row, above in zip(axes, tops, strict=True):
        top -= above + side
        for c, ax in enumerate(row):
            _place(ax, width, height, left + c * (side + GAP), top, side, side)
        top -= GAP / 2
    grid_height = height - EDGE - tops[0] - bottom
    _place(bar, width, height, left + columns * (side + GAP), bottom, BAR, grid_height)
    middle = left + (columns * side + (columns - 1) * GAP) / 2
    down.set(x=middle / width, y=EDGE / height, va="bottom")
    across.set(x=EDGE / width, y=(bottom + grid_height / 2) / height, ha="left")


def _place(ax: Axes, width: float, height: float, x: float, y: float, w: float, h: float) -> None:
    ax.set_position((x / width, y / height, w / width, h / height))


def _inches(fig: Figure, box: Bbox) -> Bbox:
    return box.transformed(fig.dpi_scale_trans.inverted())


def _overhang(fig: Figure, ax: Axes) -> tuple[float, float, float, float]:
    """How far the text of a panel reaches out of its frame: left, bottom, right, top, in inches."""
    frame, tight = ax.get_window_extent(), ax.get_tightbbox()
    if tight is None or not ax.axison:
        return 0.0, 0.0, 0.0, 0.0
    frame, outer = _inches(fig, frame), _inches(fig, tight)
    return (
        max(frame.x0 - outer.x0, 0.0),
        max(frame.y0 - outer.y0, 0.0),
        max(outer.x1 - frame.x1, 0.0),
        max(outer.y1 - frame.y1, 0.0),
    )
