"""Tensors with metadata in one open format without pickle (safetensors); a file is written whole or not at all."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import platform
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import Tensor

from curvops.extras import extra

KEY, SUM, SUMS = "curvops", "sha256", "sha256 of tensors"  # the text, and in it its own hash and those of the tensors


class Unreadable(ValueError):
    """A file is cut, or not what was written."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any], format: str) -> None:
    """Write tensors and what is to be known about them, which JSON must hold (needs ``safetensors``).

    Reading asks for the same ``format``, and sees by hashes whether anything is not what was written.
    """
    save = extra("safetensors.torch", "Saving to a file").save
    own = _apart(tensors)
    sums = {name: _sum(tensor) for name, tensor in own.items()}
    known = {**about, "format": format, "versions": versions(), SUMS: sums}
    # one entry, for the library writes several in any order
    content = save(own, metadata={KEY: json.dumps(known | {SUM: _sum_of_text(known)})})
    replace_atomically(path, lambda partial: partial.write_bytes(content))


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as the format takes them: of those that share memory all but one are copies."""
    found: dict[str, Tensor] = {}
    known: set[int] = set()
    for name, t in tensors.items():
        own = t.detach().cpu().contiguous()
        address = own.untyped_storage().data_ptr()
        found[name] = own.clone() if address in known else own
        known.add(address)
    return found


def read_tensors(path: Path, format: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file of `write_tensors`: the tensors and what is known about them.

    Files of earlier versions have no hashes, and are taken as they are.

    Raises:
        FileNotFoundError: If there is no such file.
        PermissionError: If it may not be read.
        ValueError: If it is cut, damaged, or of another format.
    """
    with _opened(path, format) as (file, about, sums):
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if sums is not None:
            found = {name: _sum(tensor) for name, tensor in tensors.items()}
            if wrong := [name for name in {**sums, **found} if sums.get(name) != found.get(name)]:
                raise _damaged(path, wrong[0])
        return tensors, about


def read_about(path: Path, format: str) -> dict[str, Any]:
    """What is known about the tensors, without them; errors as of `read_tensors`."""
    with _opened(path, format) as (_, about, _):
        return about


def _sum(tensor: Tensor) -> str:
    """A hash of a contiguous tensor's type, shape and bytes, which are not copied."""
    found = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    found.update((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))
    return found.hexdigest()


def _sum_of_text(about: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def _damaged(path: Path, what: str) -> Unreadable:
    return Unreadable(
        f"'{path}' is damaged or was edited: {what!r} is not what was written. Remove the file, or write it anew."
    )


@contextmanager
def _opened(path: Path, format: str) -> Iterator[tuple[Any, dict[str, Any], dict[str, str] | None]]:
    """The file, what is known about its tensors, and their hashes, if it has any."""
    library = extra("safetensors", "Loading from a file")
    if not path.is_file():
        raise FileNotFoundError(f"'{path}' is not a file.")
    path.open("rb").close()  # the library says of a file that may not be read that there is none
    try:
        with library.safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get(KEY, "null"))
            if not isinstance(about, dict) or about.get("format") != format:
                raise ValueError(f"'{path}' is a safetensors file, but not one of {format}.")
            own = about.pop(SUM, None)
            if (own is not None or SUMS in about) and own != _sum_of_text(about):
                raise _damaged(path, "what is known about its tensors")
            sums = about.pop(SUMS, None)
            yield file, about, sums
    except (library.SafetensorError, json.JSONDecodeError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Unreadable(f"'{path}' is truncated or not a safetensors file ({reason}).") from None


def replace_atomically(path: str | Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` fill a file beside ``path``, which takes the place of ``path`` only when it is complete."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        write(partial)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(partial)):
            raise
        # the name that the caller knows; a full disk names none
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def digest(path: Path) -> str:
    """A hash of a file's content."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            found.update(part)
    return found.hexdigest()


@cache  # a process runs what it has imported, and to read the packages' metadata takes longer than to write a small file
def versions() -> Mapping[str, str]:
    """Versions of this library and of those that the content of a file may depend on, as far as known."""
    found = {"curvops": "unknown", "python": platform.python_version()}
    for package in ("curvops", "torch", "numpy", "matplotlib"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
