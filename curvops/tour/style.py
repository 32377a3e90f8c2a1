"""The figures' style: ICML's, with fonts that are there."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.text import Text
from tueplots import bundles

Style: TypeAlias = dict[Any, Any]  # its keys are those of matplotlib's rc parameters
Width: TypeAlias = Literal["column", "page"]

_COLUMN = {"column": "half", "page": "full"}  # the names in tueplots
INK = "0.15"  # of lines
THIN = 0.4  # points


def figure_style(rows: int = 2, columns: int = 3, *, width: Width = "page", usetex: bool = False) -> Style:
    """Return matplotlib's rc parameters for a figure as wide as ICML's page or column, with fonts that are there.

    It is for so many rows and columns of panels. With `usetex`, LaTeX sets the text; it must be installed.

    Raises:
        ValueError: If the width is neither "column" nor "page".

    Example:
        >>> style = figure_style(width="column")
        >>> style["figure.figsize"][0], style["axes.titlesize"], style["xtick.labelsize"]
        (3.25, 8, 7)
    """
    if width not in _COLUMN:
        raise ValueError(f"figure_style: width must be 'column' or 'page', got {width!r}.")
    style: Style = bundles.icml2024(column=_COLUMN[width], nrows=1.5 * rows, ncols=columns, usetex=usetex)
    if not usetex:
        there = set(fontManager.get_font_names())
        # two that come with matplotlib, of which STIX is cut like Times
        style["font.serif"] = [name for name in (*style["font.serif"], "STIXGeneral", "DejaVu Serif") if name in there]
        style["mathtext.fontset"] = "stix"
    marks = {"major.width": THIN, "major.size": 2, "major.pad": 1.5, "labelsize": style["axes.titlesize"] - 1}
    ticks = {f"{axis}tick.{what}": value for axis in "xy" for what, value in marks.items()}
    sizes = {"legend.fontsize": style["axes.titlesize"] - 1}
    return style | ticks | sizes | {"pdf.fonttype": 42, "axes.linewidth": THIN, "axes.titlepad": 3.0}


@contextmanager
def glyphs_warned_of_once() -> Iterator[None]:
    """Letters that a font lacks give one warning together; all other warnings come after the body as they are."""
    caught: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            yield
    finally:
        glyphs: dict[str, None] = {}  # in order
        for one in caught:
            if found := re.match(r"Glyph (\d+) .*missing from", str(one.message)):
                glyphs[chr(int(found[1]))] = None
            else:
                warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
        if glyphs:
            text = f"figures: the font lacks {len(glyphs)} of the letters in names, which are drawn as boxes: {''.join(glyphs)}"
            warnings.warn(text, UserWarning, stacklevel=3)


def settle_fonts(fig: Figure) -> None:
    """Name the fonts in the figure itself, so that it can be saved outside the style's context."""
    rc: Style = plt.rcParams
    names = [name for family in rc["font.family"] for name in rc.get(f"font.{family}", [family])]
    for text in fig.findobj(Text):
        text.set_fontfamily(names)
