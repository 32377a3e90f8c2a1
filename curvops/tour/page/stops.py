"""What a page shows of one stop of the tour, a `MatrixFile` or a `CoarseFile`, computed in double precision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curvops.tour.coarse_files import CoarseFile
from curvops.tour.files import MatrixFile
from curvops.tour.page.axis import Axis
from curvops.tour.page.blobs import Array, Blobs
from curvops.tour.page.code import operator_code

EIGENVALUES = 2000  # rows of matrices up to which all eigenvalues are computed
_SHARE = 0.99  # of a matrix's entries that the linear colours hold, by magnitude


@dataclass(frozen=True)
class Sheet:
    """A matrix as the page draws it, `[rows, rows]`: values, and the bounds or standard errors of each cell if it has any."""

    values: Array
    low: Array | None = None
    high: Array | None = None
    errors: Array | None = None

    def scale(self) -> dict[str, float]:
        """The smallest magnitude that is not zero, the largest, and one that few exceed."""
        drawn = [abs(part) for part in (self.values, self.low, self.high) if part is not None]
        largest = drawn[0] if len(drawn) == 1 else np.maximum(drawn[1], drawn[2])
        seen = largest[largest > 0]
        if not seen.size:
            return {"least": 0.0, "most": 0.0, "usual": 0.0}
        usual = float(np.quantile(drawn[0], _SHARE)) or float(drawn[0].max())
        return {"least": float(seen.min()), "most": float(seen.max()), "usual": usual}

    def embedded(self, blobs: Blobs) -> dict[str, Any]:
        """The sheet for JSON, its arrays as blobs."""
        parts = {"values": self.values, "low": self.low, "high": self.high, "errors": self.errors}
        return {name: blobs.add(part) for name, part in parts.items() if part is not None} | {"scale": self.scale()}


@dataclass
class View:
    """What the page shows of one stop: by title unless it says otherwise, arrays as blobs."""

    sheets: dict[str, Any] = field(default_factory=dict)
    blocks: dict[str, Any] = field(default_factory=dict)  # Frobenius norms [G, G]
    pairs: list[Any] = field(default_factory=list)  # of the differences, in the order of `combinations(titles, 2)`
    traces: dict[str, Any] = field(default_factory=dict)  # of diagonal blocks [G], with standard errors if any
    diagonals: dict[str, Any] = field(default_factory=dict)  # [D]
    eigenvalues: dict[str, Any] = field(default_factory=dict)  # [D], or some [k] with residuals and masses [k, G]
    curves: dict[str, Any] = field(default_factory=dict)  # of the spectral density, with their errors
    threshold: float | None = None  # where the scale of `curves` turns from linear to logarithmic
    about: dict[str, Any] = field(default_factory=dict)
    code: dict[str, str | None] = field(default_factory=dict)  # of the operators whose blocks are known by norms


def view_of_matrices(stop: MatrixFile, axis: Axis, blobs: Blobs) -> View:
    """Return what there is to see of matrices."""
    view = View(about=_about(stop))
    arrays = {title: _array(matrix) for title, matrix in stop.matrices.items()}
    for title, array in arrays.items():
        view.sheets[title] = (Sheet(array) if axis.exact else _averaged(array, axis)).embedded(blobs)
        view.blocks[title] = blobs.add(_block_norms(array, axis))
        view.diagonals[title] = blobs.add(array.diagonal())
        view.traces[title] = {"values": blobs.add(np.add.reduceat(array.diagonal().astype(float), axis.group_starts))}
        if axis.side <= EIGENVALUES:
            # of the symmetric part, which the lower triangle alone is not in single precision
            double = torch.from_numpy(array).double()
            values = torch.linalg.eigvalsh((double + double.T) / 2).flip(0)
            view.eigenvalues[title] = {"values": blobs.add(values.numpy())}
    for one, other in combinations(arrays.values(), 2):
        view.pairs.append(blobs.add(_block_norms(one.astype(float) - other, axis)))
    return view


def view_of_blocks(stop: CoarseFile, axis: Axis, blobs: Blobs) -> View:
    """Return what there is to see of matrices that are known by their blocks."""
    view = View(about=_about(stop), code={title: operator_code(title, stop.settings) for title in stop.norms})
    for title, norms in stop.norms.items():
        errors = stop.errors.get(title)
        sheet = Sheet(_array(norms), errors=None if errors is None else _array(errors))
        view.sheets[title] = sheet.embedded(blobs)
        view.blocks[title] = blobs.add(_array(norms).astype(float))
    for title, traces in stop.traces.items():
        given = {"values": traces, "errors": stop.trace_errors.get(title)}
        view.traces[title] = _blobs_of(given, blobs)
    for title, values in stop.eigenvalues.items():
        given = {"values": values, "residuals": stop.residuals.get(title), "masses": stop.masses.get(title)}
        view.eigenvalues[title] = _blobs_of(given, blobs)
    if stop.densities:
        view.threshold = stop.threshold
        for title, curve in stop.curves().items():
            view.curves[title] = _blobs_of(curve._asdict(), blobs)
    return view


def _array(tensor: Tensor) -> Array:
    """The tensor's numbers, in single precision if it has no more than that and else in double."""
    return tensor.detach().cpu().to(torch.float32 if number_bytes(tensor) == 4 else torch.float64).numpy()


def number_bytes(tensor: Tensor) -> int:
    """Bytes that a page takes for each number of a tensor."""
    return 4 if tensor.dtype.itemsize <= 4 and tensor.is_floating_point() else 8


def _blobs_of(given: Mapping[str, Any], blobs: Blobs) -> dict[str, Any]:
    return {name: blobs.add(_array(value)) for name, value in given.items() if isinstance(value, Tensor)}


def _averaged(array: Array, axis: Axis) -> Sheet:
    """Average the entries of each cell, and keep the smallest and the largest one, all in the array's precision."""
    starts = axis.starts
    counts = np.diff(starts, append=axis.side)
    # the sums of a cell's entries must not leave the range of numbers, which they all but reach
    shrink = 2.0**-60 if array.itemsize == 8 and abs(array).max() > 1e280 else 1.0
    sums, low, high = (
        function.reduceat(function.reduceat(given, starts, 0, dtype=kind), starts, 1)
        for function, given, kind in (
            (np.add, array if shrink == 1 else array * shrink, float),
            (np.minimum, array, array.dtype),
            (np.maximum, array, array.dtype),
        )
    )
    return Sheet((sums / np.outer(counts, counts) / shrink).astype(array.dtype), low, high)


def _block_norms(array: Array, axis: Axis) -> Array:
    starts = axis.group_starts
    most = float(abs(array).max()) or 1.0  # squares alone would leave the range of numbers
    squares = np.square(array.astype(float) / most)
    return most * np.sqrt(np.add.reduceat(np.add.reduceat(squares, starts, 0), starts, 1))


def _about(stop: MatrixFile | CoarseFile) -> dict[str, Any]:
    """The facts of a stop as texts and finite numbers, whatever its settings are."""
    costs = {
        title: {
            name: value if value is not None and np.isfinite(value) else None for name, value in asdict(cost).items()
        }
        for title, cost in stop.costs.items()
    }
    return {
        "settings": {str(key): _text(value) for key, value in stop.settings.items()},
        "versions": {str(key): str(value) for key, value in stop.versions.items()},
        "costs": costs,
        "products": dict(getattr(stop, "products", {})),
        "explanations": {title: str(text) for title, text in stop.explanations.items()},
    }


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_text(one)}" for key, one in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value))
    return str(value)
