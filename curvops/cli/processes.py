"""Under torchrun the processes of a command share the data; the first one speaks and writes the files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch.distributed

from curvops.ranks import Ranks

_OURS: list[Any] = []  # the group, from `join` to `leave`, unless whoever calls the command line had made one


def number() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def is_first() -> bool:
    """Whether this is the only process, or the first of several."""
    return number() == 1 or os.environ["RANK"] == "0"


def join(device: str | None) -> Any:
    """The group of all processes, which lives until `leave`; None of one alone."""
    if number() == 1:
        return None
    cuda = (device or "").startswith("cuda")
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if cuda else "gloo")
        _OURS.append(torch.distributed.group.WORLD)
    return torch.distributed.group.WORLD


def joined() -> bool:
    """Whether this process is in a group of several."""
    return number() > 1 and torch.distributed.is_initialized()


def leave() -> None:
    """End the group, if `join` has made it."""
    if _OURS:
        _OURS.clear()
        torch.distributed.destroy_process_group()


class Share:
    """This process's batches, one after the other, of a loader that each process has; a loader in all else."""

    def __init__(self, loader: Any, group: Any) -> None:
        try:
            number = len(loader)
        except TypeError:
            number = sum(1 for _ in loader)
        self._loader, self._own = loader, Ranks(group).own(number)

    def __iter__(self) -> Iterator[Any]:
        yield from islice(self._loader, self._own.start, self._own.stop)

    def __len__(self) -> int:
        return self._own.stop - self._own.start

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._loader, name)
