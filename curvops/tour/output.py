"""The tour's output folder: can everything be written there? Asked before any work is done."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

_CHUNK = 1 << 20


class OutputError(Exception):
    """The output folder cannot take the tour's files; the message is one line that says why."""


def prepare_output(folder: str | Path, expected_bytes: int) -> Path:
    """Make the folder, and find out by writing that many bytes that they fit into it.

    The folders that are missing are made, and are removed again if the answer is no.

    Args:
        folder: Where the files will go.
        expected_bytes: How much they will need.

    Returns:
        The folder.

    Raises:
        OutputError: If the folder cannot be made or written, or is too full.
    """
    folder = Path(folder)
    missing = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    trial = folder / f".space.{os.getpid()}.part"
    try:
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with trial.open("wb") as file:
                for start in range(0, expected_bytes, _CHUNK):
                    file.write(bytes(min(_CHUNK, expected_bytes - start)))
                file.flush()
                os.fsync(file.fileno())
        finally:
            trial.unlink(missing_ok=True)
    except OSError as error:
        with contextlib.suppress(OSError):
            for path in missing:
                path.rmdir()
        megabytes = f"{expected_bytes / 1e6:.0f} MB"
        raise OutputError(f"cannot write {megabytes} to '{folder}': {error.strerror or error}") from None
    return folder
