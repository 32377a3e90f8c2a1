"""The coarse tour's file: what is known of matrices too large to be formed, in one open format without pickle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from curvops.files import read_tensors, write_tensors
from curvops.spectrum import Curve, SpectralDensity
from curvops.tour.files import MatrixFile, described, description
from curvops.tour.meter import Cost

_FORMAT = "coarse curvature"
# the fields that hold one tensor for each title, in the file under "field/title"
_TENSORS = ("norms", "errors", "traces", "trace_errors", "eigenvalues", "residuals", "masses")


@dataclass(frozen=True)
class CoarseFile:
    """What the blocks of curvature matrices `[D, D]` and their spectra look like, by title in the tour's order.

    G groups of consecutive parameters cut each matrix A into blocks A_ij. A title that is not finished is missing in the
    fields that come last. An error is a standard error, zero where the value is exact.

    Attributes:
        norms, errors: Frobenius norms ‖A_ij‖ of the blocks, `[G, G]`, symmetric.
        traces, trace_errors: Traces of the diagonal blocks, `[G]`.
        eigenvalues, residuals: The k that are largest in magnitude, descending in magnitude, and ‖A v − λ v‖, `[k]`.
        masses: Sum of the squared entries of each of their eigenvectors within a group, `[k, G]`; rows sum to 1.
        densities: How many eigenvalues lie where; see `curves`.
        parameters: From parameter name to shape, in the order of the rows.
        groups: From group to number of parameters (entries), in the order of the rows.
        settings: Of the computation, such as setup, seed and device.
        versions: Of the libraries that wrote the file.
        costs: By title, of all parts together (the peak is the largest).
        explanations: By title, what the operator's `explain()` says.
        products: By title, products with vectors that were taken.
    """

    norms: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, Tensor] = field(default_factory=dict)
    traces: dict[str, Tensor] = field(default_factory=dict)
    trace_errors: dict[str, Tensor] = field(default_factory=dict)
    eigenvalues: dict[str, Tensor] = field(default_factory=dict)
    residuals: dict[str, Tensor] = field(default_factory=dict)
    masses: dict[str, Tensor] = field(default_factory=dict)
    densities: dict[str, SpectralDensity] = field(default_factory=dict)
    parameters: dict[str, tuple[int, ...]] = field(default_factory=dict)
    groups: dict[str, int] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    costs: dict[str, Cost] = field(default_factory=dict)
    explanations: dict[str, str] = field(default_factory=dict)
    products: dict[str, int] = field(default_factory=dict)

    def curves(self, count: int = 400) -> dict[str, Curve]:
        """The spectral densities by title, `points`, `values` and `errors` `[count]` each, at the same eigenvalues.

        Points are even on a symmetric logarithm, asinh(λ / t), and the density is per unit of it, so that it integrates
        to 1 over it. The threshold t is 1e-5 of the largest |λ| of all.
        """
        if not self.densities:
            return {}
        seen = torch.cat([torch.cat([d.nodes[d.weights > 0], d.outliers]) for d in self.densities.values()]).double()
        turn = self.threshold
        low, high = ((value / turn).asinh() for value in (seen.min(), seen.max()))
        width = float(high - low) / 75 or 1.0
        even = torch.linspace(float(low) - 4 * width, float(high) + 4 * width, count, dtype=torch.float64, device="cpu")
        points = turn * even.sinh()

        def curve(density: SpectralDensity) -> Curve:
            return density.density(points, width=width, scale="symlog", threshold=turn)

        return {title: curve(density) for title, density in self.densities.items()}

    @property
    def threshold(self) -> float:
        """Where the scale of `curves` turns from linear to logarithmic."""
        largest = max(float(torch.cat([d.nodes.flatten(), d.outliers]).abs().max()) for d in self.densities.values())
        return 1e-5 * largest or 1.0


def matrices_of(file: MatrixFile | CoarseFile) -> dict[str, Tensor]:
    """The matrices `[D, D]` of a file by title, or where these are too large their blocks' Frobenius norms `[G, G]`."""
    return file.norms if isinstance(file, CoarseFile) else file.matrices


def save_coarse(path: str | Path, coarse: CoarseFile) -> Path:
    """Write a coarse tour to a safetensors file, which takes the place of `path` once it is complete.

    Settings must be such as JSON can hold; the versions are those of this moment. Returns the path.

    Example:
        >>> import tempfile
        >>> import torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "coarse.safetensors"
        ...     _ = save_coarse(path, CoarseFile(norms={"Hessian": torch.eye(1)}, groups={"all": 3}))
        ...     load_coarse(path).norms
        {'Hessian': tensor([[1.]])}
    """
    tensors = {f"{name}/{title}": t for name in _TENSORS for title, t in getattr(coarse, name).items()}
    densities = {title: kept_parts(density) for title, density in coarse.densities.items()}
    tensors |= {f"{name}/{title}": t for title, (parts, _) in densities.items() for name, t in parts.items()}
    about = {
        "titles": {name: list(getattr(coarse, name)) for name in _TENSORS},
        "densities": {title: known for title, (_, known) in densities.items()},
        "products": coarse.products,
        **described(coarse),
    }
    write_tensors(Path(path), tensors, about, _FORMAT)
    return Path(path)


def load_coarse(path: str | Path) -> CoarseFile:
    """Read a file of `save_coarse`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is truncated, is not a safetensors file, or holds something else.
    """
    tensors, about = read_tensors(Path(path), _FORMAT)
    titles = about["titles"]
    given: dict[str, Any] = {name: {t: tensors[f"{name}/{t}"] for t in titles[name]} for name in _TENSORS}
    given["densities"] = {
        title: SpectralDensity(
            tensors[f"nodes/{title}"], tensors[f"weights/{title}"], tensors[f"outliers/{title}"], **more
        )
        for title, more in about["densities"].items()
    }
    return CoarseFile(**given, products=about["products"], **description(about))


def kept_parts(density: SpectralDensity) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A density's tensors and what else is known about it, as files keep them."""
    tensors = {name: value for name, value in vars(density).items() if isinstance(value, Tensor)}
    return tensors, {name: value for name, value in vars(density).items() if name not in tensors}


def with_part(coarse: CoarseFile, title: str, part: Mapping[str, Any]) -> CoarseFile:
    """The coarse tour with further fields of a title: from field name to what it holds for the title."""
    given = {f.name: getattr(coarse, f.name) for f in fields(coarse)}
    return CoarseFile(**{**given, **{name: {**given[name], title: value} for name, value in part.items()}})
