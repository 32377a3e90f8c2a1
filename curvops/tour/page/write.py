"""Stops of the tour on one page of HTML, which needs nothing but a browser."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeAlias

from plotly.offline import get_plotlyjs

from curvops.files import replace_atomically, versions
from curvops.tour.coarse_files import CoarseFile, matrices_of
from curvops.tour.files import MatrixFile
from curvops.tour.page.axis import Axis, entries_axis, groups_axis
from curvops.tour.page.blobs import Blobs, json_for_html, packed
from curvops.tour.page.code import group_code
from curvops.tour.page.palettes import palettes
from curvops.tour.page.stops import EIGENVALUES, View, number_bytes, view_of_blocks, view_of_matrices

Stop: TypeAlias = MatrixFile | CoarseFile

PAGE_BYTES = 50_000_000  # of matrices that a page holds, before they are compressed
_SCRIPTS = ("bytes", "text", "colors", "charts", "heat", "compare", "curves", "about", "main")


def write_page(
    path: str | Path,
    stops: Mapping[str, Stop] | Stop,
    *,
    title: str | None = None,
    max_bytes: int = PAGE_BYTES,
) -> Path:
    """Write a page that shows the stops of a tour, whole or not at all, and return its path.

    The page is one file that loads nothing: plotly, the matrices and our scripts are in it. Of a `MatrixFile` it holds
    every entry exactly as it was saved, as long as all matrices of all stops fit into `max_bytes`; beyond that, cells of
    neighbouring entries of the same parameter, with their mean, smallest and largest entry, and the page says so.
    Eigenvalues, norms of blocks and diagonals are those of the whole matrices in either case; eigenvalues are left out
    above 2000 rows. Compression saves about a quarter, and base64 adds as much.

    Args:
        path: The file to write, such as `tour.html`.
        stops: By label the stops of a tour, such as checkpoints of a training run, between which a slider moves; or a
            single one. They have the same parameters, groups and titles.
        title: The page's heading; by default the setup's title, if the first stop's settings have one.
        max_bytes: How many bytes of matrices the page holds before they are compressed.

    Raises:
        TypeError: If a stop is neither a `MatrixFile` nor a `CoarseFile`.
        ValueError: If there is no stop or no matrix, if stops do not fit each other, if shapes do not fit the parameters,
            or if a matrix has entries that are not finite.

    Example:
        >>> import tempfile
        >>> import torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     page = write_page(Path(folder) / "tour.html", MatrixFile({"Hessian": torch.eye(2)}))
        ...     "Hessian" in page.read_text(encoding="utf-8")
        True
    """
    given = dict(stops) if isinstance(stops, Mapping) else {"": stops}
    _check(given)
    first = next(iter(given.values()))
    axis = _axis(list(given.values()), max_bytes)
    blobs = Blobs()
    views: dict[str, View] = {}
    for label, stop in given.items():
        if isinstance(stop, CoarseFile):
            views[str(label)] = view_of_blocks(stop, axis, blobs)
        else:
            views[str(label)] = view_of_matrices(stop, axis, blobs)
    heading = title or str(first.settings.get("setup") or "Curvature matrices")
    data = {
        "title": heading,
        "kind": "norms" if isinstance(first, CoarseFile) else "entries" if axis.exact else "cells",
        "axis": axis.described(),
        "titles": list(matrices_of(first)),
        "stops": [{"label": label, **asdict(view)} for label, view in views.items()],
        "group_code": group_code(first.parameters, first.groups) if isinstance(first, CoarseFile) else [],
        "palettes": palettes(),
        "eigenvalue_limit": EIGENVALUES,
        "written_by": versions()["curvops"],
    }
    text = _page(heading, data, blobs)
    replace_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))
    return Path(path)


def _check(stops: Mapping[str, Stop]) -> None:
    """Raise an error unless the stops can be shown together."""
    if not stops:
        raise ValueError("write_page: expected at least one stop, got none.")
    first_label, first = next(iter(stops.items()))
    for label, stop in stops.items():
        if not isinstance(stop, (MatrixFile, CoarseFile)):
            raise TypeError(
                f"write_page: stop {label!r} must be a MatrixFile or a CoarseFile, got {type(stop).__name__}."
                " load_matrices() and load_coarse() read them from files."
            )
        if not matrices_of(stop):
            raise ValueError(f"write_page: stop {label!r} has no matrices.")
        for what, one, other in (
            ("kind of file", type(stop).__name__, type(first).__name__),
            ("titles", list(matrices_of(stop)), list(matrices_of(first))),
            ("parameters", stop.parameters, first.parameters),
            ("groups", stop.groups, first.groups),
        ):
            if one != other:
                raise ValueError(
                    f"write_page: the stops of a page must have the same {what}, but {first_label!r} has {other}"
                    f" and {label!r} has {one}. Write a page for each."
                )
        _check_matrices(label, stop)


def _check_matrices(label: str, stop: Stop) -> None:
    side = len(stop.groups) if isinstance(stop, CoarseFile) else len(next(iter(stop.matrices.values())))
    for title, matrix in matrices_of(stop).items():
        where = f"write_page: {title!r} of stop {label!r}" if label else f"write_page: {title!r}"
        if tuple(matrix.shape) != (side, side) or not side:
            raise ValueError(f"{where}: expected a matrix {side} × {side}, got {tuple(matrix.shape)}.")
        if not bool(matrix.isfinite().all()):
            raise ValueError(
                f"{where} has {int((~matrix.isfinite()).sum())} entries that are NaN or infinite, which no colour shows."
                " Leave the matrix out, or compute it in double precision."
            )


def _axis(stops: Sequence[Stop], max_bytes: int) -> Axis:
    """Return the finest axis with which the matrices of all stops fit into so many bytes."""
    first = stops[0]
    if isinstance(first, CoarseFile):
        return groups_axis(first.groups)
    everything = [matrix for stop in stops if isinstance(stop, MatrixFile) for matrix in stop.matrices.values()]
    side, step = len(everything[0]), 1
    axis = entries_axis(first.parameters, first.groups, side, step)
    each = sum(map(number_bytes, everything))
    if each * side**2 <= max_bytes:
        return axis
    while 3 * each * axis.rows**2 > max_bytes and step < side:  # mean, smallest and largest entry
        step += 1
        axis = entries_axis(first.parameters, first.groups, side, step)
    return axis


@cache  # seconds, where there are many pages
def _plotly() -> str:
    return packed(get_plotlyjs().encode())


def _page(title: str, data: Mapping[str, Any], blobs: Blobs) -> str:
    """Return the page's HTML."""
    folder = files("curvops.tour.page")
    scripts = "\n".join((folder / f"{name}.js").read_text(encoding="utf-8") for name in _SCRIPTS)
    held = "\n".join(f'<script type="text/plain" id="blob-{k}">{text}</script>' for k, text in enumerate(blobs.texts))
    parts = {
        "title": html.escape(title),
        "style": (folder / "page.css").read_text(encoding="utf-8"),
        "data": json_for_html(data),
        "blobs": held,
        "plotly": _plotly(),
        "script": f'"use strict";\n(() => {{\n{scripts}\n}})();',
    }
    # cut at the marks once, so that no mark within a text is replaced
    pieces = (folder / "page.html").read_text(encoding="utf-8").split("%%")
    return "".join(parts[piece] if k % 2 else piece for k, piece in enumerate(pieces))
