"""The figure: heat maps of curvature matrices side by side, on one colour domain, with the layers' boundaries."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from textwrap import wrap
from typing import Any

import matplotlib.pyplot as plt
import numpy.typing as npt
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.text import Text

from curvops.files import replace_atomically
from curvops.tour.groups import Groups, edges_of, shapes_of, sizes_of
from curvops.tour.labels import Label, placed_labels, spaced_edges
from curvops.tour.panels import ZERO, Look, Matrices, Transform, log_abs, named_matrices, shared_look
from curvops.tour.style import INK, THIN, Style, Width, figure_style, settle_fonts

# rows up to which a panel shows every entry, and pixels a side to which larger ones are averaged: 300 to an inch, for
# panels as wide as a third of a page
EVERY_ENTRY, PRINTED, THIRD = 700, 600, 2.25
PAD, BAR = 0.025, 0.125  # inches around everything, and the colour bar's width
OVER = 0.25  # inches that the colour bar's label may be longer than the bar
LINE = 1.2  # room for a name, in sizes of its letters
GAP = 2.5  # points between two boundaries that are drawn


def plot_matrices(
    matrices: Matrices | Any,
    titles: Sequence[str] | str | None = None,
    groups: Groups | None = None,
    *,
    transform: Transform = log_abs,
    transform_title: str | None = None,
    signed: bool | None = None,
    limits: tuple[float, float] | None = None,
    clip: float = 1.0,
    cmap: str | None = None,
    zeros: bool | None = None,
    look: Look | None = None,
    rows: int | None = None,
    columns: int | None = None,
    width: Width | None = None,
    axis_label: str = "Layer",
    config: Mapping[str, Any] | None = None,
    usetex: bool = False,
) -> tuple[Figure, npt.NDArray[Any]]:
    """Draw square matrices of one shape as heat maps on a shared colour domain.

    Names of groups that are too small for one each are moved aside, with a line to their place, or joined, as in `3–7`.
    Of more than 700 rows, in panels as wide as a third of a page, print cannot show every entry: a pixel is then the mean of
    a cell's transformed entries, without exact zeros where these have a colour, and the colour bar says so. Unaltered entries
    of both signs cancel in it; the page shows a cell's smallest and largest entry, too.

    Args:
        matrices: Tensors `[D, D]` or operators with `to_dense()`: a mapping from title to matrix, a sequence
            together with `titles`, or a single one.
        titles: One title per matrix; replaces the mapping's keys, or the kind of a single operator.
        groups: Sizes of consecutive groups (layers) of the `D` parameters, or a mapping from label to size; a model, whose
            modules are the groups; or, for operators, "modules", "tensors", or the number of parts of the modules' names that
            count. Sizes alone are labelled 1, 2, … with empty groups left out.
        transform: Applied to each matrix before it is drawn; must keep its shape.
        transform_title: Label of the colour bar. The two transformations here have their own.
        signed: Draw with a diverging colour map whose centre is zero; by default where `transform(-m) == -transform(m)`.
        limits: Ends of the colour domain, beyond which the bar ends in an arrow; by default those of all entries.
        clip: Share of the entries that the default colour domain holds, by magnitude where `signed`.
        cmap: Name of a colour map that replaces the default one.
        zeros: Give exact zeros a colour of their own, named in a legend; by default for `log_abs`.
        look: All of the above from `transform` to here, as of `shared_look`, for several figures alike.
        rows: Rows of panels, by default as many as `columns` asks for.
        columns: Panels per row, by default 3, or 2 in a column of text, or fewer for fewer matrices.
        width: As wide as a `"page"` or a `"column"` of it; by default a column for one panel.
        axis_label: What the groups are, written once along each side.
        config: matplotlib's rc parameters; by default `figure_style`, ICML's.
        usetex: Let LaTeX set the text of the default style.

    Returns:
        The figure, and its axes `[rows, columns]`. Its height follows from its width, which the square panels fill.

    Raises:
        TypeError: If an entry is neither a tensor nor an operator.
        ValueError: If the matrices are not square, of one shape and free of NaN, if the group sizes do not sum to `D`,
            or if the number of titles or panels does not fit.

    Example:
        >>> import torch
        >>> fig, axes = plot_matrices({"A": torch.eye(5), "B": torch.ones(5, 5)}, groups=[2, 3])
        >>> axes.shape
        (1, 2)
        >>> plt.close(fig)
    """
    named = named_matrices(matrices, titles)
    side = len(next(iter(named.values())))
    several = matrices.values() if isinstance(matrices, Mapping) else matrices if len(named) > 1 else [matrices]
    sizes = sizes_of(groups, side, next((shapes for m in several if (shapes := shapes_of(m))), None))
    width = width or ("column" if len(named) == 1 else "page")
    rows, columns = _grid_of(len(named), rows, columns, 2 if width == "column" else 3)
    if look is None:
        look = shared_look(
            [named],
            transform=transform,
            transform_title=transform_title,
            signed=signed,
            limits=limits,
            clip=clip,
            cmap=cmap,
            zeros=zeros,
        )

    style: Style = figure_style(rows, columns, width=width, usetex=usetex) if config is None else dict(config)
    with plt.rc_context(style):
        fig, axes = plt.subplots(rows, columns, squeeze=False, layout="compressed")
        pixels = pixels_of(fig, columns, side)
        for ax, (title, matrix) in zip(axes.flat, named.items(), strict=False):
            image = look.shown(matrix, pixels, title)
            extent = (-0.5, side - 0.5, side - 0.5, -0.5)
            ax.imshow(image, vmin=look.lower, vmax=look.upper, cmap=look.cmap, extent=extent, interpolation="none")
            ax.set_title(title)
            ax.set(xticks=[], yticks=[])
        for ax in axes.flat[len(named) :]:
            ax.set_axis_off()
            ax.set_aspect("equal")
        thin = BAR / fig.get_figwidth()
        room: Style = {"fraction": 1.2 * thin, "aspect": rows / columns / thin, "anchor": (1.0, 0.5), "pad": 0.012}
        bar = fig.colorbar(axes[0, 0].images[0], ax=axes, extend=look.extend, **room)
        bar.set_label(look.title if pixels is None else f"{look.title}, cell means")
        bar.outline.set_linewidth(THIN)
        _arrange(fig, axes, bar, axis_label if sizes else "Parameter", sizes)
        if look.some_zeros:
            zero = Patch(facecolor=ZERO, edgecolor=INK, linewidth=THIN, label="exactly zero")
            explain_mark(fig, axes, zero, "right")
        if not plt.rcParams["text.usetex"]:
            settle_fonts(fig)
    return fig, axes


def save_figure(fig: Figure, path: str | Path, *, dpi: int = 300) -> Path:
    """Write a figure of `plot_matrices` in the format of the file's suffix, whole or not at all, and return the path.

    Vector formats embed the panels losslessly, one pixel per entry, or per cell where `plot_matrices` has drawn means of
    cells; pixel formats, for which `dpi` is, are smoothed where a pixel covers more than one entry.
    """
    path = Path(path)
    kind = path.suffix.lstrip(".").lower()
    for image in (image for ax in fig.axes for image in ax.get_images()):
        image.set_interpolation("none" if kind in {"pdf", "svg", "eps", "ps"} else "antialiased")
    extra: dict[str, Any] = {"metadata": {"CreationDate": None}} if kind == "pdf" else {}
    if kind == "png":
        extra = {"pil_kwargs": {"compress_level": 4}}  # quicker than the usual 6, for files hardly larger
    with plt.rc_context({"pdf.fonttype": 42, "ps.fonttype": 42, "svg.fonttype": "none"}):
        replace_atomically(path, lambda partial: fig.savefig(partial, format=kind, dpi=dpi, bbox_inches=None, **extra))
    return path


def pixels_of(fig: Figure, columns: int, side: int) -> int | None:
    """How many pixels a side of a panel in so many columns is averaged to; None where it shows every entry."""
    scale = max(1.0, fig.get_figwidth() / columns / THIRD)
    return None if side <= EVERY_ENTRY * scale else round(PRINTED * scale)


def explain_mark(fig: Figure, axes: npt.NDArray[Any], mark: Artist, side: str) -> None:
    """Say below the panels, at their left or right side, what a mark means."""
    axis: Any = fig._supxlabel  # type: ignore[attr-defined]  # no public way to it
    place = axes[-1, 0].get_position().x0 if side == "left" else axes[-1, -1].get_position().x1
    below: Any = f"lower {side}"
    legend = fig.legend(
        handles=[mark],
        loc=below,
        bbox_to_anchor=(place, axis.get_position()[1]),
        frameon=False,
        borderpad=0,
        borderaxespad=0,
        handlelength=1.2,
        handletextpad=0.4,
        prop={"family": axis.get_fontfamily(), "size": axis.get_fontsize() - 1},
    )
    legend.set_in_layout(False)
    make_room(fig, legend)


def make_room(fig: Figure, artist: Artist) -> None:
    """Leave out the name of the axis below the panels if something beside it runs into it."""
    axis: Text = fig._supxlabel  # type: ignore[attr-defined]  # no public way to it
    if artist.get_window_extent().padded(0.05 * fig.dpi).overlaps(axis.get_window_extent()):
        axis.set_visible(False)


def _grid_of(number: int, rows: int | None, columns: int | None, most: int) -> tuple[int, int]:
    """Return rows and columns of panels that hold this many matrices."""
    columns = columns or (math.ceil(number / rows) if rows else min(number, most))
    rows = rows or math.ceil(number / columns)
    if rows < 1 or columns < 1 or rows * columns < number:
        raise ValueError(f"plot_matrices: {number} matrices do not fit into {rows} x {columns} panels.")
    return rows, columns


def _arrange(fig: Figure, axes: npt.NDArray[Any], bar: Any, label: str, sizes: Mapping[str, int]) -> None:
    """Name both sides and the groups, and find the height at which the square panels fill the figure's width."""
    rows, columns = axes.shape
    size = axes.flat[0].title.get_fontsize()
    down, across = fig.supxlabel(label, fontsize=size), fig.supylabel(label, fontsize=size)
    engine: Any = fig.get_layout_engine()
    engine.set(w_pad=PAD, h_pad=PAD, wspace=0, hspace=0)
    height = rows / columns * fig.get_figwidth() + rows
    names: Any = ()
    for _ in range(4):  # the bar's height has a say in its ticks, and their labels' width in the panels'
        fig.set_figheight(height + 1)  # more than enough
        engine.execute(fig)
        before, names = names, _name_groups(axes, sizes)
        _fold(axes, bar.ax.yaxis.label)
        if names != before:
            engine.execute(fig)
        boxes = [ax.get_tightbbox() for ax in axes.flat]
        content = max(box.y1 for box in boxes) - min(box.y0 for box in boxes) + down.get_window_extent().height
        height = content / fig.dpi + 4 * PAD  # the engine pads panels and label on both sides
        if names == before:
            break
    # a hair less: the width has room to spare then, and the bar is exactly as tall as the panels
    fig.set_figheight(height - 0.045 * rows / columns)
    engine.execute(fig)
    # the engine would centre them on the figure
    first, last = axes[0, 0].get_position(), axes[-1, -1].get_position()
    down.set_x((first.x0 + last.x1) / 2)
    across.set_y((last.y0 + first.y1) / 2)
    _draw_boundaries(axes, names[1])
    fig.set_layout_engine("none")  # names are placed for panels as they are now


def _name_groups(axes: npt.NDArray[Any], sizes: Mapping[str, int]) -> tuple[list[str], list[int], bool, bool]:
    """Write the groups' names along the outer panels, where there is room in panels as large as they are now.

    Returns the names, where what is named begins and ends, whether some are moved aside, and whether they stand upright
    below the panels.
    """
    if not sizes:
        return [], [], False, False
    corner = axes[-1, 0]
    scale = points_of(corner) / sum(sizes.values())  # of an entry
    letters = plt.rcParams["ytick.labelsize"]
    letters = letters if isinstance(letters, (int, float)) else plt.rcParams["font.size"]
    labels = placed_labels(list(sizes), [edge * scale for edge in edges_of(sizes)], LINE * letters)
    texts, places = [label.text for label in labels], [label.place / scale - 0.5 for label in labels]
    moved = any(abs(label.place - label.centre) > 0.5 for label in labels)
    style: Style = {"length": 0, "pad": 6.0} if moved else {}
    upright = _crowded(labels, letters)
    for ax in axes.flat:
        ax.tick_params(**style)
        # a name is no formula, whatever it has of dollars
        ax.set_xticks(places, texts, rotation=90 if upright else 0, parse_math=False)
        ax.set_yticks(places, texts, parse_math=False)
        ax.label_outer(remove_inner_ticks=True)
        for line in list(ax.lines):
            line.remove()
    for label in labels if moved else ():
        ends = [label.centre / scale - 0.5] * 2 + [label.place / scale - 0.5] * 2
        out = [-points / points_of(corner) for points in (0, 1.5, 4.5, 5.5)]
        look: Style = {"color": "black", "lw": THIN, "clip_on": False, "solid_joinstyle": "round"}
        for ax in (ax for ax in axes[:, 0] if ax.axison):
            ax.plot(out, ends, transform=ax.get_yaxis_transform(), **look)
        for ax in (ax for ax in axes[-1] if ax.axison):
            ax.plot(ends, out, transform=ax.get_xaxis_transform(), **look)
    edges = edges_of(sizes)
    return texts, [*(edges[label.first] for label in labels), edges[-1]], moved, upright


def _crowded(labels: Sequence[Label], letters: float) -> bool:
    """Whether names side by side below a panel would run into each other, so that they must stand upright."""
    widths = [0.62 * letters * len(label.text) for label in labels]
    gaps = [b.place - a.place for a, b in pairwise(labels)]
    return any(gap < (a + b) / 2 + 3 for gap, (a, b) in zip(gaps, pairwise(widths), strict=True))


def _draw_boundaries(axes: npt.NDArray[Any], edges: Sequence[int]) -> None:
    """Draw lines between groups, dark on white, so that they are seen on dark and on light blocks."""
    if len(edges) < 2:
        return
    scale = points_of(axes[0, 0]) / edges[-1]
    kept = [edges[k] - 0.5 for k in spaced_edges([edge * scale for edge in edges], GAP)]
    for ax in axes.flat:
        if not ax.axison:
            continue
        for color, width, order in (("white", 2.25 * THIN, 2.0), (INK, THIN, 2.1)):
            for edge in kept:
                ax.axhline(edge, color=color, lw=width, zorder=order)
                ax.axvline(edge, color=color, lw=width, zorder=order)


def _fold(axes: npt.NDArray[Any], label: Text) -> None:
    """Break titles that are wider than their panels, and the colour bar's label if it is longer than all panels, into lines."""
    for ax in axes.flat:
        _break(ax.title, "width", ax.get_window_extent().width)
    height = axes[0, 0].get_window_extent().y1 - axes[-1, 0].get_window_extent().y0
    _break(label, "height", height + OVER * axes[0, 0].figure.dpi)


def _break(text: Text, along: str, room: float) -> None:
    """Break a text into as few lines as fit into so much room along a side of the paper."""
    words = text.get_text()
    for lines in range(2, len(words.split()) + 1):
        if getattr(text.get_window_extent(), along) <= room:
            return
        text.set(text="\n".join(wrap(words, math.ceil(len(words) / lines), break_long_words=False)), linespacing=1.0)


def points_of(ax: Any) -> float:
    """The side of a panel."""
    return float(ax.get_window_extent().width) * 72 / float(ax.figure.dpi)
