"""The figure: heat maps of curvature matrices side by side, on one colour domain, with the layers' boundaries."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, TypeAlias

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.text import Text
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d
from tueplots import bundles

from curvops.files import replace_atomically

Transform: TypeAlias = Callable[[Tensor], Tensor]
Groups: TypeAlias = Mapping[str, int] | Sequence[int]
Style: TypeAlias = dict[Any, Any]  # its keys are those of matplotlib's rc parameters

SEQUENTIAL, DIVERGING = "magma_r", "RdBu_r"  # in both maps little ink means a small entry, also in grey
LEVELS = 128  # as many colours as an eye tells apart; more would only make the files larger
EVERY_ENTRY = 700  # rows up to which a panel shows every entry
PRINTED = 600  # pixels a side to which larger ones are averaged: 300 to an inch, where six panels fill a page's width
PAD, BAR = 0.025, 0.125  # inches around everything, and the colour bar's width


def log_abs(matrix: Tensor, epsilon: float = 1e-6) -> Tensor:
    """Return log10 of the absolute entries, clamped from below at `epsilon`.

    Example:
        >>> import torch
        >>> log_abs(torch.tensor([[100.0, -1.0], [0.0, 1e-3]])).tolist()
        [[2.0, 0.0], [-6.0, -3.0]]
    """
    return matrix.abs().clamp(min=epsilon).log10()


def unchanged(matrix: Tensor) -> Tensor:
    """Return the matrix as it is."""
    return matrix


def figure_style(rows: int = 2, columns: int = 3, *, usetex: bool = False) -> Style:
    """Return matplotlib's rc parameters for a figure at ICML's full width, with fonts that are there.

    It is for so many rows and columns of panels. With `usetex`, LaTeX sets the text; it must be installed.
    """
    style: Style = bundles.icml2024(column="full", nrows=1.5 * rows, ncols=columns, usetex=usetex)
    if not usetex:
        there = set(fontManager.get_font_names())
        # two that come with matplotlib, of which STIX is cut like Times
        style["font.serif"] = [name for name in (*style["font.serif"], "STIXGeneral", "DejaVu Serif") if name in there]
        style["mathtext.fontset"] = "stix"
    ticks = {f"{axis}tick.major.{what}": v for axis in "xy" for what, v in (("width", 0.4), ("size", 2), ("pad", 1.5))}
    return style | ticks | {"pdf.fonttype": 42, "axes.linewidth": 0.4, "axes.titlepad": 3.0}


def plot_matrices(
    matrices: Mapping[str, Any] | Sequence[Any],
    titles: Sequence[str] | None = None,
    groups: Groups | None = None,
    *,
    transform: Transform = log_abs,
    transform_title: str | None = None,
    signed: bool | None = None,
    limits: tuple[float, float] | None = None,
    clip: float = 1.0,
    cmap: str | None = None,
    rows: int | None = None,
    columns: int | None = None,
    axis_label: str = "Layer",
    config: Mapping[str, Any] | None = None,
    usetex: bool = False,
) -> tuple[Figure, npt.NDArray[Any]]:
    """Draw square matrices of one shape as heat maps on a shared colour domain.

    Args:
        matrices: Tensors `[D, D]` or operators with `to_dense()`: a mapping from title to matrix, or a sequence
            together with `titles`.
        titles: One title per matrix; replaces the mapping's keys.
        groups: Sizes of consecutive groups (layers) of the `D` parameters, or a mapping from label to size. Sizes alone
            are labelled 1, 2, … with empty groups left out.
        transform: Applied to each matrix before it is drawn; must keep its shape.
        transform_title: Label of the colour bar. The two transformations here have their own.
        signed: Draw with a diverging colour map whose centre is zero; by default where `transform(-m) == -transform(m)`.
        limits: Ends of the colour domain, beyond which the bar ends in an arrow; by default those of all entries.
        clip: Share of the entries that the default colour domain holds, by magnitude where `signed`.
        cmap: Name of a colour map that replaces the default one.
        rows: Rows of panels, by default as many as `columns` asks for.
        columns: Panels per row, by default 3, or fewer for fewer matrices.
        axis_label: What the groups are, written once along each side.
        config: matplotlib's rc parameters; by default `figure_style`, ICML's full width.
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
    named = _named_matrices(matrices, titles)
    side = len(next(iter(named.values())))
    labels, edges = _edges_of(groups, side)
    rows, columns = _grid_of(len(named), rows, columns)
    images = {title: _transformed(transform, matrix, title) for title, matrix in named.items()}
    if signed is None:
        first = next(iter(named))
        signed = bool((transform(-named[first]) == -images[first]).all())
    if transform_title is None:
        known = ((log_abs, "Logarithmic absolute entries, $\\log_{10}$"), (unchanged, "Unaltered matrix entries"))
        transform_title = next((title for function, title in known if function is transform), "")
    lower, upper = limits or color_domain(list(images.values()), signed=signed, clip=clip)
    # an odd number of colours has one in the middle, for zero
    colors = colormaps[cmap or (DIVERGING if signed else SEQUENTIAL)].resampled(LEVELS + 1 if signed else LEVELS)

    style: Style = figure_style(rows, columns, usetex=usetex) if config is None else dict(config)
    with plt.rc_context(style):
        fig, axes = plt.subplots(rows, columns, squeeze=False, layout="compressed")
        for ax, (title, image) in zip(axes.flat, images.items(), strict=False):
            shown = image if side <= EVERY_ENTRY else adaptive_avg_pool2d(image[None], PRINTED)[0]
            extent = (-0.5, side - 0.5, side - 0.5, -0.5)
            ax.imshow(shown.numpy(), vmin=lower, vmax=upper, cmap=colors, extent=extent, interpolation="none")
            ax.set_title(title)
            _mark_groups(ax, labels, edges)
        for ax in axes.flat[len(images) :]:
            ax.set_axis_off()
            ax.set_aspect("equal")
        for ax in axes.flat:
            ax.label_outer(remove_inner_ticks=True)
        below, above = min(map(torch.min, images.values())) < lower, max(map(torch.max, images.values())) > upper
        extend = ("neither", "min", "max", "both")[int(below) + 2 * int(above)]
        thin = BAR / fig.get_figwidth()
        room: Style = {"fraction": 1.2 * thin, "aspect": rows / columns / thin, "anchor": (1.0, 0.5), "pad": 0.012}
        bar = fig.colorbar(axes[0, 0].images[0], ax=axes, extend=extend, **room)
        bar.set_label(transform_title)
        bar.outline.set_linewidth(0.4)
        _arrange(fig, axes, axis_label if groups is not None else "Parameter")
        if not plt.rcParams["text.usetex"]:
            _settle_fonts(fig)
    return fig, axes


def save_figure(fig: Figure, path: str | Path, *, dpi: int = 300) -> Path:
    """Write a figure of `plot_matrices` in the format of the file's suffix, whole or not at all, and return the path.

    Vector formats embed the panels losslessly, one pixel per entry; pixel formats, for which `dpi` is, are smoothed
    where a pixel covers more than one entry.
    """
    path = Path(path)
    kind = path.suffix.lstrip(".").lower()
    for image in (image for ax in fig.axes for image in ax.get_images()):
        image.set_interpolation("none" if kind in {"pdf", "svg", "eps", "ps"} else "antialiased")
    extra: dict[str, Any] = {"metadata": {"CreationDate": None}} if kind == "pdf" else {}
    with plt.rc_context({"pdf.fonttype": 42, "ps.fonttype": 42, "svg.fonttype": "none"}):
        replace_atomically(path, lambda partial: fig.savefig(partial, format=kind, dpi=dpi, bbox_inches=None, **extra))
    return path


def color_domain(images: Sequence[Tensor], *, signed: bool, clip: float = 1.0) -> tuple[float, float]:
    """Return the ends of a colour domain for all images together.

    Infinite entries do not count. Where `signed`, the domain is centred on zero. `clip` is the share of the entries that
    lie inside: by magnitude where `signed`, else from below.

    Raises:
        ValueError: If `clip` is not in (0, 1].
    """
    if not 0 < clip <= 1:
        raise ValueError(f"color_domain: clip must be in (0, 1], got {clip}.")
    entries = np.concatenate([image[image.isfinite()].numpy().ravel() for image in images])
    if not entries.size:
        return -0.5, 0.5
    if signed:
        upper = float(np.quantile(abs(entries), clip)) or float(abs(entries).max())
        lower = -upper
    else:
        lower, upper = float(entries.min()), float(np.quantile(entries, clip))
    return (lower, upper) if lower < upper else (lower - 0.5, upper + 0.5)


def _named_matrices(matrices: Mapping[str, Any] | Sequence[Any], titles: Sequence[str] | None) -> dict[str, Tensor]:
    """Return the matrices as tensors on the CPU, by title; they are square, of one shape and free of NaN."""
    values = list(matrices.values()) if isinstance(matrices, Mapping) else list(matrices)
    if not values:
        raise ValueError("plot_matrices: expected at least one matrix, got none.")
    if titles is None and not isinstance(matrices, Mapping):
        raise ValueError(
            "plot_matrices: a sequence of matrices needs titles=[…], or pass a mapping from title to them."
        )
    titles = list(matrices if titles is None else titles)
    if len(titles) != len(values):
        raise ValueError(
            f"plot_matrices: expected one title for each of the {len(values)} matrices, got {len(titles)}: {titles}."
        )
    if len(set(titles)) != len(titles):
        raise ValueError(f"plot_matrices: the titles must differ, got {titles}.")
    named = {}
    for title, value in zip(titles, values, strict=True):
        dense = value.to_dense() if hasattr(value, "to_dense") else None  # tensors have it, too
        if not isinstance(dense, Tensor):
            raise TypeError(
                f"plot_matrices: {title!r} must be a tensor or an operator with to_dense(), got {type(value).__name__}."
            )
        dense = dense.detach().cpu()
        named[title] = dense if dense.dtype in (torch.float32, torch.float64) else dense.double()
    shapes = {title: tuple(matrix.shape) for title, matrix in named.items()}
    first = next(iter(shapes.values()))
    if len(first) != 2 or first[0] != first[1] or first[0] == 0 or len(set(shapes.values())) > 1:
        raise ValueError(f"plot_matrices: expected square matrices of one shape, got {shapes}.")
    for title, matrix in named.items():
        if matrix.isnan().any():
            raise ValueError(f"plot_matrices: {title!r} has {int(matrix.isnan().sum())} entries that are NaN.")
    return named


def _edges_of(groups: Groups | None, side: int) -> tuple[list[str], list[int]]:
    """Return the labels of the non-empty groups, and where each begins and the last one ends."""
    if groups is None:
        return [], [0, side]
    sizes = list(groups.values()) if isinstance(groups, Mapping) else list(groups)
    if any(size < 0 for size in sizes) or sum(sizes) != side:
        raise ValueError(f"plot_matrices: the group sizes {sizes} sum to {sum(sizes)}, the matrices have {side} rows.")
    kept = [size for size in sizes if size]
    numbers = [str(k + 1) for k in range(len(kept))]
    labels = [label for label, size in groups.items() if size] if isinstance(groups, Mapping) else numbers
    return labels, list(accumulate(kept, initial=0))


def _grid_of(number: int, rows: int | None, columns: int | None) -> tuple[int, int]:
    """Return rows and columns of panels that hold this many matrices."""
    columns = columns or (math.ceil(number / rows) if rows else min(number, 3))
    rows = rows or math.ceil(number / columns)
    if rows < 1 or columns < 1 or rows * columns < number:
        raise ValueError(f"plot_matrices: {number} matrices do not fit into {rows} x {columns} panels.")
    return rows, columns


def _transformed(transform: Transform, matrix: Tensor, title: str) -> Tensor:
    """Return what is drawn of a matrix."""
    image = transform(matrix)
    came = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
    if came != tuple(matrix.shape):
        raise ValueError(
            f"plot_matrices: transform must keep the shape {tuple(matrix.shape)}, got {came} for {title!r}."
        )
    if image.isnan().any():
        raise ValueError(f"plot_matrices: transform makes {int(image.isnan().sum())} entries of {title!r} NaN.")
    return image


def _mark_groups(ax: Axes, labels: Sequence[str], edges: Sequence[int]) -> None:
    for edge in edges[1:-1]:
        ax.axhline(edge - 0.5, color="0.2", lw=0.4)
        ax.axvline(edge - 0.5, color="0.2", lw=0.4)
    centres = [(a + b - 1) / 2 for a, b in pairwise(edges)] if labels else []
    # names stand upright below a panel, where they would run into each other
    ax.set_xticks(centres, labels, rotation=90 if max(map(len, labels), default=0) > 3 else 0)
    ax.set_yticks(centres, labels)


def _arrange(fig: Figure, axes: npt.NDArray[Any], label: str) -> None:
    """Label both sides, and find the height at which the square panels fill the figure's width."""
    rows, columns = axes.shape
    size = axes.flat[0].title.get_fontsize()
    down, across = fig.supxlabel(label, fontsize=size), fig.supylabel(label, fontsize=size)
    engine: Any = fig.get_layout_engine()
    engine.set(w_pad=PAD, h_pad=PAD, wspace=0, hspace=0)
    height = rows / columns * fig.get_figwidth() + rows
    for _ in range(2):  # the bar's height has a say in its ticks, and their labels' width in the panels'
        fig.set_figheight(height + 1)  # more than enough
        engine.execute(fig)
        boxes = [ax.get_tightbbox() for ax in axes.flat]
        content = max(box.y1 for box in boxes) - min(box.y0 for box in boxes) + down.get_window_extent().height
        height = content / fig.dpi + 4 * PAD  # the engine pads panels and label on both sides
    # a hair less: the width has room to spare then, and the bar is exactly as tall as the panels
    fig.set_figheight(height - 0.045 * rows / columns)
    engine.execute(fig)
    # the engine would centre them on the figure
    first, last = axes[0, 0].get_position(), axes[-1, -1].get_position()
    down.set_x((first.x0 + last.x1) / 2)
    across.set_y((last.y0 + first.y1) / 2)


def _settle_fonts(fig: Figure) -> None:
    """Name the fonts in the figure itself, so that it can be saved outside the style's context."""
    rc: Style = plt.rcParams
    names = [name for family in rc["font.family"] for name in rc.get(f"font.{family}", [family])]
    for text in fig.findobj(Text):
        text.set_fontfamily(names)
