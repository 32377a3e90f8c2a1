"""The figure's look: tueplots' ICML bundle, with fonts that are there and can be embedded."""

from __future__ import annotations

from typing import Any, TypeAlias

from matplotlib.font_manager import FontProperties, findfont
from tueplots import bundles

Style: TypeAlias = dict[Any, Any]  # its keys are those of matplotlib's rc parameters

_ALWAYS_THERE = ("STIXGeneral", "DejaVu Serif")  # shipped with matplotlib; STIX is cut like Times


def figure_style(rows: int = 2, columns: int = 3, *, usetex: bool = False) -> Style:
    """Return matplotlib's rc parameters for a figure at ICML's full width.

    Args:
        rows: Rows of panels.
        columns: Panels per row.
        usetex: Let LaTeX set the text; it must be installed.
    """
    style: Style = bundles.icml2024(column="full", nrows=1.5 * rows, ncols=columns, usetex=usetex)
    if not usetex:
        style["font.serif"] = [name for name in (*style["font.serif"], *_ALWAYS_THERE) if _installed(name)]
        style["mathtext.fontset"] = "stix"
    return style | {
        "pdf.fonttype": 42,
        "axes.linewidth": 0.4,
        "xtick.major.width": 0.4,
        "ytick.major.width": 0.4,
        "xtick.major.size": 2.0,
        "ytick.major.size": 2.0,
        "xtick.major.pad": 1.5,
        "ytick.major.pad": 1.5,
        "axes.titlepad": 3.0,
    }


def _installed(family: str) -> bool:
    try:
        findfont(FontProperties(family=[family]), fallback_to_default=False)
    except ValueError:
        return False
    return True
