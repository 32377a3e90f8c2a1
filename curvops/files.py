"""Tensors with metadata in one open format without pickle (safetensors); a file is written whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

KEY = "curvops"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any], format: str) -> None:
    """Write tensors and what is to be known about them (needs ``safetensors``).

    Args:
        path: The file; one that is there stays unless the new one is complete.
        tensors: By name.
        about: Anything that JSON can hold.
        format: What kind of file it is; reading asks for the same.

    Raises:
        OSError: If the file cannot be written.
    """
    from safetensors.torch import save

    text = json.dumps({**about, "format": format, "versions": {"curvops": own_version(), "torch": torch.__version__}})
    # clones, because the format refuses tensors that share memory
    owned = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    replace_atomically(path, save(owned, metadata={KEY: text}))


def read_tensors(path: Path, format: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file of `write_tensors`: the tensors and what is known about them.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is cut, or of another format.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"'{path}' is not a file.")
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get(KEY, "null"))
            if about is None or about.get("format") != format:
                raise ValueError(f"'{path}' is a safetensors file, but not one of format {format!r}.")
            return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118 (not a dict)
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"'{path}' is truncated or not a safetensors file ({reason}).") from None


def replace_atomically(path: Path, content: bytes) -> None:
    """Put a file in the place of another in one step; whatever stops it, the old one stays."""
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(partial).chmod(0o644)
        Path(partial).replace(path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def own_version() -> str:
    """The installed version of this library."""
    try:
        return version("curvops")
    except PackageNotFoundError:
        return "unknown"
