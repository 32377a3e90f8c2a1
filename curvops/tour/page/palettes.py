"""The figure's colour maps for a browser, on light and on dark ground."""

from __future__ import annotations

import colorsys

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex

from curvops.tour.panels import DIVERGING, SEQUENTIAL

_STEPS = 33  # plotly blends between them


def palettes() -> dict[str, dict[str, list[str]]]:
    """Return the sequential and the diverging colours from the lower end to the upper one, for `light` and `dark`.

    On dark ground a small entry is close to the ground, too: the sequential colours are reversed, the diverging ones have
    their lightness mirrored.

    Example:
        >>> palettes()["light"]["diverging"][16]
        '#f7f6f6'
    """
    found: dict[str, dict[str, list[str]]] = {"light": {}, "dark": {}}
    for name, colors in (("sequential", SEQUENTIAL), ("diverging", DIVERGING)):
        light = colormaps[colors](np.linspace(0, 1, _STEPS))[:, :3].tolist()
        found["light"][name] = [to_hex((red, green, blue)) for red, green, blue in light]
        dark = light[::-1] if name == "sequential" else [_mirrored(*color) for color in light]
        found["dark"][name] = [to_hex((red, green, blue)) for red, green, blue in dark]
    return found


def _mirrored(red: float, green: float, blue: float) -> tuple[float, float, float]:
    hue, lightness, saturation = colorsys.rgb_to_hls(red, green, blue)
    return colorsys.hls_to_rgb(hue, 1 - lightness, saturation)
