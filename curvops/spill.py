"""Tensors in files of a folder, mapped to memory: pages that the system can write out and give to others."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from curvops.memory import byte_size

CHUNK = 16 * 2**20  # bytes of a file, which small tensors share
Places: TypeAlias = "dict[int, tuple[Tensor, int]]"  # by address of the memory: file, and where it begins there
ALIGNED = 64  # bytes: where memory begins that is allocated, on which the bits of sums may depend


class Spill:
    """Makes tensors in files of a folder, or, without one, in memory.

    A file has no name: it is removed from the folder as soon as it is mapped, and its space is free when the last tensor
    in it is gone, also where the process is killed. The space is taken when a tensor is made, so that a full disk is an
    error then, and not a bus error when it is filled. The entries have the bits, strides and alignment that they have in memory.

    Args:
        folder: A folder that is there, on a disk; one in memory (tmpfs, as ``/tmp`` may be) saves none.
        device: Where the tensors are to be used.

    Attributes:
        device: Of the tensors.
        bytes: Taken so far.

    Raises:
        TypeError, ValueError: If the folder is none, or the device is not the CPU.

    Example:
        >>> import tempfile
        >>> import torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     found = Spill(folder, torch.device("cpu")).zeros((2, 2), torch.float32)
        >>> found.add_(1)
        tensor([[1., 1.],
                [1., 1.]])
    """

    def __init__(self, folder: str | Path | None, device: torch.device) -> None:
        self.device, self.bytes, self._folder = device, 0, folder
        self._chunk = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._used = 0
        if folder is None:
            return
        if not isinstance(folder, (str, Path)):
            raise TypeError(f"spill: expected the path of a folder, got {type(folder).__name__}.")
        if not Path(folder).is_dir():
            raise ValueError(f"spill: '{folder}' is not a folder. Make it, or pass another one.")
        if device.type not in ("cpu", "meta"):
            raise ValueError(f"spill: files are mapped to the memory of the CPU, the parameters are on {device}.")
        if os.name != "posix":
            raise ValueError(f"spill: files that are mapped stay in their folder on this system ({os.name}).")

    @property
    def active(self) -> bool:
        """Whether there is a folder."""
        return self._folder is not None and self.device.type == "cpu"

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Zeros."""
        size = prod(shape) * dtype.itemsize
        if not (self.active and size):
            return torch.zeros(shape, dtype=dtype, device=self.device)
        start = self._room(size)
        return self._chunk[start : start + size].view(dtype).view(shape)

    def put(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor, or without a folder the tensor itself."""
        return self.put_all([tensor])[0]

    def put_all(self, tensors: Sequence[Tensor], places: Places | None = None) -> list[Tensor]:
        """Copies of tensors, of which those that share memory still do.

        With ``places`` they share it with what was put there before; the caller holds that as long.
        """
        places = {} if places is None else places
        return [self._copied(tensor.detach(), places) if self.active else tensor for tensor in tensors]

    def _copied(self, tensor: Tensor, places: Places) -> Tensor:
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if not size:
            return tensor
        if address not in places:
            beyond = address % ALIGNED
            start = self._room(beyond + size) + beyond
            self._chunk[start : start + size] = torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage)
            places[address] = self._chunk, start
        chunk, start = places[address]
        offset = start // tensor.itemsize + tensor.storage_offset()
        return torch.empty(0, dtype=tensor.dtype, device="cpu").set_(
            chunk.untyped_storage(), offset, tensor.shape, tensor.stride()
        )

    def _room(self, size: int) -> int:
        """Where so many bytes of the chunk begin, which may be a new one."""
        if self._used + size > len(self._chunk):
            self._chunk, self._used = self._mapped(max(size, CHUNK)), 0
        start = self._used
        self._used += -(-size // ALIGNED) * ALIGNED
        self.bytes += size
        return start

    def _mapped(self, size: int) -> Tensor:
        path = None
        try:
            handle, path = tempfile.mkstemp(prefix="curvops-", dir=self._folder)
            with os.fdopen(handle, "wb") as file:
                _reserve(file.fileno(), size)
            return torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
        except OSError as error:
            raise OSError(
                f"spill: '{self._folder}' has no room for {byte_size(size)} more ({error.strerror or error}). "
                "Pass a folder on another disk, or leave 'spill' out."
            ) from error
        finally:
            if path is not None:
                Path(path).unlink()


def _reserve(handle: int, size: int) -> None:
    """Take space on a disk for a file of zeros."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, size)
        return
    for start in range(0, size, CHUNK):
        os.write(handle, bytes(min(CHUNK, size - start)))
