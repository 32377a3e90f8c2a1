"""The figure: heat maps of curvature matrices side by side, on one colour domain, with the layers' boundaries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.text import Text
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from curvops.files import replace_atomically
from curvops.tour.layout import arrange
from curvops.tour.panels import Groups, Transform, edges_of, grid_of, named_matrices, side_of, transformed
from curvops.tour.style import Style, figure_style

SEQUENTIAL = "magma_r"
DIVERGING = "RdBu_r"  # in both maps little ink means a small entry, also in grey
LEVELS = 128  # as many colours as an eye tells apart; more would only make the files larger
EVERY_ENTRY = 700
"""Number of rows up to which a panel shows every entry."""
PRINTED = 600
"""Side in pixels to which larger matrices are averaged: 300 to an inch, when six panels fill a page's width."""

_FOR_SAVING: Style = {"pdf.fonttype": 42, "ps.fonttype": 42, "svg.fonttype": "none"}


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
        matrices: Tensors of shape `[D, D]`, or operators with `to_dense()`; a mapping from title
            to matrix, or a sequence together with `titles`.
        titles: One title per matrix; replaces the mapping's keys.
        groups: How the `D` parameters fall into consecutive groups (layers): sizes, or a mapping
            from label to size. Sizes alone are labelled 1, 2, … with empty groups left out.
        transform: Applied to each matrix before it is drawn; must keep its shape.
        transform_title: Label of the colour bar. The two transformations here have their own.
        signed: Draw with a diverging colour map whose centre is zero. By default this is done for
            odd transformations, those with `transform(-m) == -transform(m)`.
        limits: Ends of the colour domain. By default they span the smallest and largest
            transformed entry of all matrices. Where entries lie beyond, the bar ends in an arrow.
        clip: Share of all entries that the default colour domain holds, by magnitude where `signed`,
            so that a few outliers do not leave the rest without colour.
        cmap: Name of a colour map that replaces the default one.
        rows: Rows of panels. By default as many as `columns` asks for.
        columns: Panels per row, by default 3, or fewer for fewer matrices.
        axis_label: What the groups are, written once along each side.
        config: matplotlib's rc parameters; by default `figure_style`, ICML's full width.
        usetex: Let LaTeX set the text of the default style.

    Returns:
        The figure, and its axes as an array of shape `[rows, columns]`. Its height follows from
        its width, so that the panels are square and fill it.

    Raises:
        TypeError: If an entry is neither a tensor nor an operator.
        ValueError: If the matrices are not square, of one shape and free of NaN, if the group
            sizes do not sum to `D`, or if the number of titles or panels does not fit.

    Example:
        >>> import torch
        >>> fig, axes = plot_matrices({"A": torch.eye(5), "B": torch.ones(5, 5)}, groups=[2, 3])
        >>> axes.shape
        (1, 2)
        >>> plt.close(fig)
    """
    named = named_matrices(matrices, titles)
    side = side_of(named)
    labels, edges = edges_of(groups, side)
    rows, columns = grid_of(len(named), rows, columns)
    images = {title: transformed(transform, matrix, title) for title, matrix in named.items()}
    if signed is None:
        first = next(iter(named))
        signed = bool((transform(-named[first]) == -images[first]).all())
    lower, upper = limits or color_domain(list(images.values()), signed=signed, clip=clip)

    style: Style = dict(config) if config is not None else figure_style(rows, columns, usetex=usetex)
    # the panels are placed below, to the point: a layout engine of the style would move them
    style |= {"figure.constrained_layout.use": False, "figure.autolayout": False}
    with plt.rc_context(style):
        fig = plt.figure()
        axes = np.array(
            [[fig.add_subplot(rows, columns, r * columns + c + 1) for c in range(columns)] for r in range(rows)]
        )
        for ax in axes.flat[len(images) :]:
            ax.set_axis_off()
        drawn: AxesImage | None = None
        for ax, (title, image) in zip(axes.flat, images.items(), strict=False):
            drawn = ax.imshow(
                _shrunk(image).numpy(),
                vmin=lower,
                vmax=upper,
                cmap=_color_map(cmap, signed),
                extent=(-0.5, side - 0.5, side - 0.5, -0.5),
                interpolation="none",
            )
            ax.set_title(title)
            _mark_groups(ax, labels, edges)
        for ax in axes.flat:
            ax.label_outer(remove_inner_ticks=True)
        assert drawn is not None
        bar = fig.colorbar(drawn, cax=fig.add_axes((0.9, 0.1, 0.02, 0.8)), extend=_beyond(images, lower, upper))
        bar.set_label(_bar_label(transform, transform_title))
        bar.outline.set_linewidth(0.4)
        arrange(fig, axes, bar.ax, axis_label if groups is not None else "Parameter")
        if not plt.rcParams["text.usetex"]:
            _settle_fonts(fig)
    return fig, axes


def save_figure(fig: Figure, path: str | Path, *, dpi: int = 300) -> Path:
    """Write a figure of `plot_matrices` in the format of the file's suffix, whole or not at all.

    Vector formats embed the panels losslessly, one pixel per entry; pixel formats are smoothed
    where a pixel covers more than one entry. `dpi` is for the latter.

    Returns:
        The path.
    """
    path = Path(path)
    kind = path.suffix.lstrip(".").lower()
    vector = kind in {"pdf", "svg", "eps", "ps"}
    for image in (image for ax in fig.axes for image in ax.get_images()):
        image.set_interpolation("none" if vector else "antialiased")
    extra: dict[str, Any] = {"metadata": {"CreationDate": None}} if kind == "pdf" else {}
    with plt.rc_context(_FOR_SAVING):
        replace_atomically(path, lambda partial: fig.savefig(partial, format=kind, dpi=dpi, bbox_inches=None, **extra))
    return path


def color_domain(images: Sequence[Tensor], *, signed: bool, clip: float = 1.0) -> tuple[float, float]:
    """Return the ends of a colour domain for all images together.

    Args:
        images: What is drawn, after the transformation; infinite entries do not count.
        signed: Centre the domain on zero.
        clip: Share of the entries that lie inside; by magnitude where `signed`, else from below.

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


def _beyond(images: Mapping[str, Tensor], lower: float, upper: float) -> str:
    below = any(bool((image < lower).any()) for image in images.values())
    above = any(bool((image > upper).any()) for image in images.values())
    return {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}[below, above]


def _shrunk(image: Tensor) -> Tensor:
    if image.shape[0] <= EVERY_ENTRY:
        return image
    return adaptive_avg_pool2d(image[None], PRINTED)[0]


def _color_map(name: str | None, signed: bool) -> Colormap:
    # an odd number of colours has one in the middle, for zero
    return colormaps[name or (DIVERGING if signed else SEQUENTIAL)].resampled(LEVELS + 1 if signed else LEVELS)


def _mark_groups(ax: Axes, labels: Sequence[str], edges: Sequence[int]) -> None:
    for edge in edges[1:-1]:
        ax.axhline(edge - 0.5, color="0.2", lw=0.4)
        ax.axvline(edge - 0.5, color="0.2", lw=0.4)
    centres = [(a + b - 1) / 2 for a, b in pairwise(edges)] if labels else []
    # names stand upright below a panel, where they would run into each other
    ax.set_xticks(centres, labels, rotation=90 if max(map(len, labels), default=0) > 3 else 0)
    ax.set_yticks(centres, labels)


def _bar_label(transform: Transform, title: str | None) -> str:
    if title is not None:
        return title
    if transform is log_abs:
        return "Logarithmic absolute entries, $\\log_{10}$"
    return "Unaltered matrix entries" if transform is unchanged else ""


def _settle_fonts(fig: Figure) -> None:
    """Name the fonts in the figure itself, so that it can be saved outside the style's context."""
    rc: Style = plt.rcParams
    names = [name for family in rc["font.family"] for name in rc.get(f"font.{family}", [family])]
    for text in fig.findobj(Text):
        text.set_fontfamily(names)
