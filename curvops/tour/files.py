"""The tour's files: matrices in one open format without pickle (safetensors), each file written whole or not at all."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

_KEY = "curvops"
_FORMAT = 1


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
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save_matrices(Path(folder) / "m.safetensors", {"Hessian": torch.eye(2)}, groups={"1": 2})
        ...     load_matrices(path).groups
        {'1': 2}
    """
    about = {
        "format": _FORMAT,
        "titles": list(matrices),
        "parameters": {name: list(shape) for name, shape in (parameters or {}).items()},
        "groups": dict(groups or {}),
        "settings": dict(settings or {}),
        "versions": _versions(),
    }
    # clones, because the format refuses tensors that share memory
    tensors = {
        title: matrix.detach().cpu().clone(memory_format=torch.contiguous_format) for title, matrix in matrices.items()
    }
    content = save(tensors, metadata={_KEY: json.dumps(about)})
    replace_atomically(path, lambda partial: partial.write_bytes(content))
    return Path(path)


def load_matrices(path: str | Path) -> MatrixFile:
    """Read a file of `save_matrices`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is truncated, is not a safetensors file, or holds something else.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"'{path}' is not a file.")
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get(_KEY, "null"))
            names = set(file.keys())
            if about is None or about.get("format") != _FORMAT or set(about["titles"]) != names:
                raise ValueError(
                    f"'{path}' is a safetensors file, but not one of curvature matrices (format {_FORMAT})."
                )
            matrices = {title: file.get_tensor(title) for title in about["titles"]}
    except SafetensorError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"'{path}' is truncated or not a safetensors file ({reason}).") from None
    return MatrixFile(
        matrices,
        {name: tuple(shape) for name, shape in about["parameters"].items()},
        about["groups"],
        about["settings"],
        about["versions"],
    )


def replace_atomically(path: str | Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a file beside `path`, then put it in the place of `path` in one step.

    Whatever stops `write`, the file that was at `path` before stays as it was.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(partial)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("curvops", "torch", "numpy", "matplotlib"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
