"""The tour's files: the folder that takes them, and matrices in one open format without pickle (safetensors)."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from torch import Tensor

from curvops.files import read_tensors, write_tensors
from curvops.memory import byte_size
from curvops.tour.meter import Cost

_FORMAT = "curvature matrices"


class OutputError(OSError):
    """The output folder cannot take the tour's files; the message is one line that says why."""


@dataclass
class Finished:
    """What a tour has written so far: by file the titles of the matrices in it, and the files of figures and pages."""

    matrices: dict[Path, list[str]] = field(default_factory=dict)
    figures: list[Path] = field(default_factory=list)

    def __str__(self) -> str:
        kept = [f"{', '.join(titles)} in {path}" for path, titles in self.matrices.items()]
        kept += [f"{len(self.figures)} figures"] * bool(self.figures)
        return "; ".join(kept) or "nothing"


@dataclass(frozen=True)
class MatrixFile:
    """Matrices `[D, D]` by title, in the order in which they were computed, with what is needed to read them.

    In the order of the rows: from parameter name to shape, and from layer to number of parameters. The settings are those
    of the computation, such as setup, seed and device; the versions those of the libraries that wrote the file. By title
    as well: what each matrix cost, and what its operator's `explain()` says.
    """

    matrices: dict[str, Tensor]
    parameters: dict[str, tuple[int, ...]] = field(default_factory=dict)
    groups: dict[str, int] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    costs: dict[str, Cost] = field(default_factory=dict)
    explanations: dict[str, str] = field(default_factory=dict)


def save_matrices(
    path: str | Path,
    matrices: Mapping[str, Tensor],
    *,
    parameters: Mapping[str, tuple[int, ...]] | None = None,
    groups: Mapping[str, int] | None = None,
    settings: Mapping[str, Any] | None = None,
    costs: Mapping[str, Cost] | None = None,
    explanations: Mapping[str, str] | None = None,
) -> Path:
    """Write matrices `[D, D]` by title to a safetensors file, which takes the place of `path` once it is complete.

    The rest is as in `MatrixFile`, as far as JSON can hold it. Returns the path.

    Example:
        >>> import tempfile
        >>> import torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save_matrices(Path(folder) / "m.safetensors", {"Hessian": torch.eye(2)}, groups={"1": 2})
        ...     load_matrices(path).groups
        {'1': 2}
    """
    given = {"parameters": parameters, "groups": groups, "settings": settings, "costs": costs}
    given["explanations"] = explanations
    about = described(MatrixFile({}, **{name: dict(value or {}) for name, value in given.items()}))
    write_tensors(Path(path), matrices, {"titles": list(matrices)} | about, _FORMAT)
    return Path(path)


def load_matrices(path: str | Path) -> MatrixFile:
    """Read a file of `save_matrices`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is truncated, is not a safetensors file, or holds something else.
    """
    tensors, about = read_tensors(Path(path), _FORMAT)
    matrices = {title: tensors[title] for title in about["titles"]}
    return MatrixFile(matrices, **description(about))


def described(file: Any) -> dict[str, Any]:
    """What a file has beside its tensors, in a form that JSON can hold: parameters, groups, settings, costs, explanations."""
    plain = {name: getattr(file, name) for name in ("parameters", "groups", "settings", "explanations")}
    return {**plain, "costs": {title: asdict(cost) for title, cost in file.costs.items()}}


def description(about: Mapping[str, Any]) -> dict[str, Any]:
    """The same again, with the versions, from what was read."""
    return {
        "parameters": {name: tuple(shape) for name, shape in about["parameters"].items()},
        "groups": about["groups"],
        "settings": about["settings"],
        "versions": about["versions"],
        "costs": {title: Cost(**cost) for title, cost in about.get("costs", {}).items()},  # earlier files have none
        "explanations": about.get("explanations", {}),
    }


@contextmanager
def output_folder(folder: str | Path, expected_bytes: int, names: Iterable[str] = ()) -> Iterator[Path]:
    """The same as `prepare_output` for what the body writes; folders that were made are removed if it fails and leaves nothing."""
    missing = _missing(Path(folder))
    prepare_output(folder, expected_bytes, names)
    try:
        yield Path(folder)
    except Exception:  # an interrupted run is gone on with
        _remove(missing)
        raise


def prepare_output(folder: str | Path, expected_bytes: int, names: Iterable[str] = ()) -> Path:
    """Make the folder, find out by writing that many bytes that they fit into it, and return its path.

    Files of these names will be written there.

    Folders that were made are removed again if the answer is no.

    Raises:
        OutputError: If the folder cannot be made or written, or is too full, or a file's place is taken by a folder.
    """
    folder = Path(folder)
    missing = _missing(folder)
    for path in (folder / name for name in names):
        if path.is_dir():
            raise OutputError(f"cannot write '{path}': {os.strerror(errno.EISDIR)}")
    try:
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder) as file:  # goes with the process, also if that is killed
            for start in range(0, expected_bytes, 2**20):
                file.write(bytes(min(2**20, expected_bytes - start)))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        _remove(missing)
        size = f"{byte_size(expected_bytes)} " if expected_bytes else ""
        raise OutputError(f"cannot write {size}to '{folder}': {error.strerror or error}") from None
    return folder


def _missing(folder: Path) -> list[Path]:
    """The folder and those above it, as far as they are not there."""
    return [path for path in (folder, *folder.parents) if not os.path.lexists(path)]


def _remove(folders: Iterable[Path]) -> None:
    """Remove folders that are empty, from the innermost one on."""
    with contextlib.suppress(OSError):
        for path in folders:
            path.rmdir()
