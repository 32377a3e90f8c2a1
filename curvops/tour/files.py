"""The tour's files: matrices in one open format without pickle (safetensors), each file written whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from curvops.files import read_tensors, write_tensors

_FORMAT = "curvature matrices"


@dataclass(frozen=True)
class MatrixFile:
    """Matrices with what is needed to read them.

    Attributes:
        matrices: From title to matrix `[D, D]`, in the order in which they were computed.
        parameters: From parameter name to shape, in the order of the rows.
        groups: From layer to its number of parameters, in the order of the rows.
        settings: What the matrices were computed with, such as the setup, seed and device.
        versions: Of the libraries that wrote the file.
    """

    matrices: dict[str, Tensor]
    parameters: dict[str, tuple[int, ...]] = field(default_factory=dict)
    groups: dict[str, int] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


def save_matrices(
    path: str | Path,
    matrices: Mapping[str, Tensor],
    *,
    parameters: Mapping[str, tuple[int, ...]] | None = None,
    groups: Mapping[str, int] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Write matrices to a safetensors file, which takes the place of `path` once it is complete.

    Args:
        path: The file to write.
        matrices: From title to matrix `[D, D]`.
        parameters: From parameter name to shape.
        groups: From layer to its number of parameters.
        settings: Anything else worth keeping, as far as JSON can hold it.

    Returns:
        The path.

    Example:
        >>> import tempfile
        >>> import torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save_matrices(Path(folder) / "m.safetensors", {"Hessian": torch.eye(2)}, groups={"1": 2})
        ...     load_matrices(path).groups
        {'1': 2}
    """
    about = {
        "titles": list(matrices),
        "parameters": {name: list(shape) for name, shape in (parameters or {}).items()},
        "groups": dict(groups or {}),
        "settings": dict(settings or {}),
    }
    write_tensors(Path(path), matrices, about, _FORMAT)
    return Path(path)


def load_matrices(path: str | Path) -> MatrixFile:
    """Read a file of `save_matrices`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is truncated, is not a safetensors file, or holds something else.
    """
    tensors, about = read_tensors(Path(path), _FORMAT)
    return MatrixFile(
        {title: tensors[title] for title in about["titles"]},
        {name: tuple(shape) for name, shape in about["parameters"].items()},
        about["groups"],
        about["settings"],
        about["versions"],
    )
