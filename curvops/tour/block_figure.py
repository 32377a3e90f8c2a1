"""The coarse tour's figures: norms of blocks as heat maps, and what is known of traces, eigenvectors and densities."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import matplotlib.pyplot as plt
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from curvops.plots.axes import COLORS, SEQUENTIAL, decades
from curvops.tour.coarse_files import CoarseFile
from curvops.tour.figure import explain_mark, plot_matrices, points_of
from curvops.tour.groups import module_groups
from curvops.tour.labels import shortened
from curvops.tour.panels import log_abs
from curvops.tour.style import Style, figure_style, settle_fonts

DOUBT = 0.5  # standard error of a norm, relative to it, from which on a block is marked
FEW = 12  # groups up to which lines are drawn between them
DECADES = 8  # of norms that have a colour of their own, below the largest
ROW = 0.115  # inches of an eigenvector
ACROSS = 100  # letters that have room side by side below a panel
MARKS = "osD^v<"  # so that they are told apart in grey as well


def plot_blocks(coarse: CoarseFile, *, per_entry: bool = False, **options: Any) -> tuple[Figure, npt.NDArray[Any]]:
    """Draw the Frobenius norms of all blocks, one panel for each matrix, on a shared colour domain.

    A block is a square of the same size however many parameters it has. One whose standard error is above half its norm
    is marked by a cross ("error > ½ norm").

    Args:
        coarse: The coarse tour.
        per_entry: Draw the root mean square of a block's entries, ‖A_ij‖ / √(n_i n_j), by which blocks of different
            sizes compare.
        options: As of `plot_matrices`: `titles`, `rows`, `columns`, `limits`, `cmap`, `config`, `usetex`, ….

    Returns:
        The figure, and its axes `[rows, columns]`.

    Raises:
        ValueError: If no norms are there yet.

    Example:
        >>> from curvops.tour.coarse import coarse_tour
        >>> from curvops.tour.setups import tiny
        >>> fig, axes = plot_blocks(coarse_tour(tiny().risk(), titles=["Hessian", "KFAC"]))
        >>> [ax.get_title() for ax in axes.flat]
        ['Hessian', 'KFAC']
        >>> plt.close(fig)
    """
    if not coarse.norms:
        raise ValueError("plot_blocks: the coarse tour has no norms of blocks yet.")
    sizes = torch.tensor([float(size) for size in coarse.groups.values()], dtype=torch.float64, device="cpu")
    entries = torch.outer(sizes, sizes).sqrt() if per_entry else torch.ones((), device="cpu")
    shown = {title: norms.double().cpu() / entries for title, norms in coarse.norms.items()}
    largest = max(float(norms.max()) for norms in shown.values())
    what = "Root mean square entry of a block" if per_entry else "Frobenius norm of a block"
    given = {
        "groups": dict.fromkeys(coarse.groups, 1),
        "transform": partial(log_abs, epsilon=largest * 10.0**-DECADES or 1.0),
        "transform_title": f"{what}, $\\log_{{10}}$",
        "axis_label": "Layer" if _are_modules(coarse) else "Group",
    }
    fig, axes = plot_matrices(shown, **{**given, **options})
    if len(coarse.groups) > FEW:
        for line in (line for ax in axes.flat for line in list(ax.lines) if len(line.get_xdata()) == 2):
            line.remove()  # boundaries, which would hide blocks so small; those of names have more points
    doubtful = [coarse.errors[title].cpu() > DOUBT * norms.cpu() for title, norms in coarse.norms.items()]
    for ax, doubt in zip(axes.flat, doubtful, strict=False):
        _cross(ax, doubt)
    if any(bool(doubt.any()) for doubt in doubtful):
        cross = Line2D([], [], ls="", marker="x", ms=4, mew=0.5, color="black", label="error > ½ norm")
        explain_mark(fig, axes, cross, "left")
    return fig, axes


def complete_titles(coarse: CoarseFile) -> list[str]:
    """The titles of which there are all parts that `plot_spectra` shows."""
    return [title for title in coarse.norms if title in coarse.masses and title in coarse.densities]


def plot_spectra(coarse: CoarseFile, *, config: Any = None, usetex: bool = False) -> tuple[Figure, npt.NDArray[Any]]:
    """Draw the traces by group, the groups that the top eigenvectors live in, and the spectral densities.

    Returns:
        The figure, and its axes `[3]` in this order. Bars and bands are two standard errors.

    Raises:
        ValueError: If not all parts of a matrix are there yet.

    Example:
        >>> from curvops.tour.coarse import coarse_tour
        >>> from curvops.tour.setups import tiny
        >>> fig, axes = plot_spectra(coarse_tour(tiny().risk(), titles=["Hessian", "KFAC"]))
        >>> [ax.get_ylabel() for ax in axes]
        ['Trace', 'Eigenvalue', 'Density']
        >>> plt.close(fig)
    """
    titles = complete_titles(coarse)
    if not titles:
        raise ValueError("plot_spectra: the coarse tour has no matrix with eigenvectors and a density yet.")
    style: Style = figure_style(2, 3, usetex=usetex) if config is None else dict(config)
    rows = sum(len(coarse.masses[title]) for title in titles)
    heights = [1.5, max(ROW * rows, 0.9), 1.5]
    with plt.rc_context(style):
        fig, axes = plt.subplots(
            3, 1, figsize=(style["figure.figsize"][0], sum(heights) + 1.6), height_ratios=heights, layout="constrained"
        )
        _traces(axes[0], coarse, titles)
        _masses(axes[1], coarse, titles)
        _densities(axes[2], coarse, titles)
        for ax in axes:
            ax.tick_params(which="both", labelsize=7, width=0.4)
        fig.draw_without_rendering()  # so that texts that are made late have this style, too
        if not usetex:
            settle_fonts(fig)
    return fig, axes


def _are_modules(coarse: CoarseFile) -> bool:
    """Whether the groups are those of modules, of some depth of their names."""
    deepest = max((name.count(".") + 1 for name in coarse.parameters), default=0)
    groups = list(coarse.groups.items())
    return any(groups == list(module_groups(coarse.parameters, k).items()) for k in range(1, deepest + 1))


def _cross(ax: Axes, doubt: Tensor) -> None:
    rows, columns = doubt.nonzero(as_tuple=True)
    size = min(max(0.4 * points_of(ax) / len(doubt), 1.5), 5.0)
    for width, color in ((1.1, "white"), (0.5, "black")):  # seen on dark and on light blocks
        ax.plot(columns.numpy(), rows.numpy(), "x", ms=size, mew=width, color=color, zorder=3)


def _traces(ax: Axes, coarse: CoarseFile, titles: Sequence[str]) -> None:
    places = torch.arange(len(coarse.groups), dtype=torch.float64, device="cpu")
    every = torch.cat([coarse.traces[title].double().cpu() for title in titles])
    for k, title in enumerate(titles):
        aside = (k - (len(titles) - 1) / 2) * 0.8 / len(titles)
        values, errors = coarse.traces[title].double().cpu(), 2 * coarse.trace_errors[title].double().cpu()
        look: dict[str, Any] = {"fmt": MARKS[k % 6], "ms": 1.8, "lw": 0, "elinewidth": 0.6, "color": COLORS[k % 6]}
        ax.errorbar((places + aside).numpy(), values.numpy(), errors.numpy(), label=_folded(title), **look)
    if bool((every > 0).all()):
        ax.set_yscale("log")
    else:
        turn = float(every.abs().max()) * 1e-6 or 1.0
        ax.set_yscale("symlog", linthresh=turn)
        ax.set_yticks(decades(turn, *ax.get_ylim()))  # its own lie on each other around zero
        ax.minorticks_off()
    for edge in (places[:-1] + 0.5).tolist():
        ax.axvline(edge, color="0.85", lw=0.4, zorder=0)
    ax.set_xlim(-0.5, len(places) - 0.5)  # as of the image of masses below
    ax.set_xticks(places.numpy())
    ax.set_ylabel("Trace")
    ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=7, handlelength=1.0)
    ax.tick_params(labelbottom=False)


def _masses(ax: Axes, coarse: CoarseFile, titles: Sequence[str]) -> None:
    masses = torch.cat([coarse.masses[title].double().cpu() for title in titles])
    image = ax.imshow(masses.numpy(), vmin=0, vmax=1, cmap=SEQUENTIAL, aspect="auto", interpolation="none")
    values = [float(value) for title in titles for value in coarse.eigenvalues[title]]
    ax.set_yticks(range(len(values)), [f"{value:.2g}" for value in values])
    end = -0.5
    for title in titles:
        begin, end = end, end + len(coarse.masses[title])
        ax.axhline(end, color="0.2", lw=0.4)
        middle: dict[str, Any] = {"transform": ax.get_yaxis_transform(), "va": "center", "linespacing": 1.0}
        ax.text(1.015, (begin + end) / 2, _folded(title), fontsize=7, **middle)
    names = [shortened(name) for name in coarse.groups]
    letters = sum(map(len, names)) + 3 * len(names)
    ax.set_xticks(range(len(names)), names, rotation=90 if letters > ACROSS else 0, parse_math=False)
    ax.set_ylabel("Eigenvalue")
    ax.set_xlabel("Layer" if _are_modules(coarse) else "Group of parameters")
    bar = ax.figure.colorbar(image, cax=ax.inset_axes((1.16, 0.0, 0.02, 1.0)))
    bar.set_label("Mass of the eigenvector")
    bar.outline.set_linewidth(0.4)
    bar.ax.tick_params(labelsize=7, length=2, width=0.4)


def _densities(ax: Axes, coarse: CoarseFile, titles: Sequence[str]) -> None:
    curves, turn = coarse.curves(), coarse.threshold
    top = max(float(curve.values.max()) for curve in curves.values())
    bottom = 0.3 * top / max(density.dim for density in coarse.densities.values())  # of less than one eigenvalue
    for k, title in enumerate(titles):
        points, values, errors = curves[title]
        lower, upper = ((values + sign * 2 * errors).clamp(min=bottom).numpy() for sign in (-1, 1))
        ax.plot(points.numpy(), values.numpy(), lw=0.8, color=COLORS[k % 6])
        ax.fill_between(points.numpy(), lower, upper, color=COLORS[k % 6], alpha=0.2, lw=0)
    low, high = next(iter(curves.values())).points[[0, -1]].tolist()
    ax.set_xscale("asinh", linear_width=turn)
    ax.set_xticks(decades(turn, low, high))
    ax.minorticks_off()
    ax.set_xlim(low, high)
    ax.set_yscale("log")
    ax.set_ylim(bottom, 2 * top)
    ax.set_xlabel("Eigenvalue")
    ax.set_ylabel("Density")


def _folded(title: str) -> str:
    return title.replace(" ", "\n", 1)
