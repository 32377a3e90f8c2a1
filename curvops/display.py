"""What notebooks show: small tables and heat maps as plain HTML, with all text escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import torch
from torch import Tensor

PIXELS = 128  # of a heat map's side, at most
_CELL = "text-align:left;vertical-align:top;padding:0 1em 0 0;border:0"
_DECADES = 6  # that a heat map shows, below the largest entry


def card(title: str, facts: Iterable[tuple[str, str]] = (), *, picture: str = "", more: str = "") -> str:
    """A title, facts in two columns, and beside them a picture; all but ``picture`` and ``more`` is plain text.

    Example:
        >>> card("2 < 3", [("shape", "3 × 3")]).count("&lt;")
        1
    """
    rows = table((), [(name, value) for name, value in facts])
    text = f'<div><div style="font-weight:bold">{escape(title)}</div>{rows}{more}</div>'
    style = "display:flex;flex-wrap:wrap;gap:1.5em;align-items:flex-start;overflow-x:auto"
    return f'<div style="{style}">{text}{picture}</div>'


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, most: int = 30) -> str:
    """A table of plain text; of more than ``most`` rows the first ones, and how many were left out."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f'<{tag} style="{_CELL}">{escape(str(cell))}</{tag}>' for cell in cells) + "</tr>"

    if not rows:
        return ""
    lines = [line(header, "th")] * bool(header) + [line(row, "td") for row in rows[:most]]
    left = f"<div>… and {len(rows) - most} more rows</div>" if len(rows) > most else ""
    return f'<table style="border-collapse:collapse;background:none">{"".join(lines)}</table>{left}'


def heat_map(matrix: Tensor) -> str:
    """An image of log₁₀ |entries| of a matrix ``[rows, columns]``, zeros left blank; empty without matplotlib.

    Where there are more entries than pixels, a pixel is the largest of its entries.
    """
    sizes = torch.abs(matrix.detach()).to("cpu", torch.float32)
    if not sizes.numel() or not torch.isfinite(sizes).all() or not (largest := float(sizes.max())) > 0:
        return ""
    shape = [min(PIXELS, side) for side in sizes.shape]
    pixels = torch.nn.functional.adaptive_max_pool2d(sizes[None], shape)[0]
    depths = ((pixels / largest).log10() / _DECADES + 1).clamp(0, 1)
    source = _image(depths, pixels == 0)
    style = "image-rendering:pixelated;border:1px solid currentColor"
    words = f"log₁₀ of the absolute entries, from {largest:.2g} (dark) to {_DECADES} decades below; zeros are blank"
    return source and (
        f'<img src="{source}" width="{PIXELS}" alt="{escape(words)}" title="{escape(words)}" style="{style}">'
    )


def _image(depths: Tensor, blank: Tensor) -> str:
    """A PNG as a data URL."""
    try:
        from matplotlib import colormaps
        from matplotlib.image import imsave
    except ImportError:
        return ""
    colors: Any = colormaps["magma_r"](depths.numpy())
    colors[..., 3] = (~blank).numpy()
    buffer = io.BytesIO()
    imsave(buffer, colors, format="png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
