"""Tensors that are cut over several processes (DTensors), and this process's part of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from curvops.tree import map_tensors

LEAST = "2.13"  # seen to be right; with 2.6 second derivatives of DTensors are silently wrong


class Sharding(NamedTuple):
    """How a DTensor is cut: over which processes, along which axes, and the shape and strides of the whole."""

    mesh: Any
    placements: tuple[Any, ...]
    shape: torch.Size
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Any) -> Sharding:
        """How a DTensor is cut."""
        return cls(tensor.device_mesh, tuple(tensor.placements), tensor.shape, tuple(tensor.stride()))

    def cut(self, tensor: Tensor) -> Tensor:
        """A tensor that all processes have whole as a DTensor that is cut like this, which sends nothing."""
        from torch.distributed.tensor import Replicate  # it takes long to import

        whole: Any = _dtensor().from_local(tensor, self.mesh, [Replicate()] * self.mesh.ndim, run_check=False)
        wanted = [Replicate() if placement.is_partial() else placement for placement in self.placements]
        return whole.redistribute(self.mesh, wanted)

    def summed(self, tensor: Tensor) -> Any:
        """The sum of the tensors of all processes, each of which has one of the whole's shape, as a DTensor that is cut like this."""
        from torch.distributed.tensor import Partial

        several = [Partial()] * self.mesh.ndim
        terms: Any = _dtensor().from_local(tensor.contiguous(), self.mesh, several, run_check=False)
        return terms.redistribute(self.mesh, self.placements)

    @property
    def all(self) -> set[int]:
        """The processes of its mesh."""
        return set(self.mesh.mesh.flatten().tolist())

    @property
    def over(self) -> set[int]:
        """The processes that have parts of it, or the same ones, besides this one."""
        axes = range(len(self.placements))
        groups = [torch.distributed.get_process_group_ranks(self.mesh.get_group(axis)) for axis in axes]
        return {rank for group in groups for rank in group} - {torch.distributed.get_rank()}

    def whole(self, part: Tensor) -> Tensor:
        """The DTensor of which this process has a part, which may have a trailing axis of columns."""
        columns = part.shape[len(self.shape) :]
        shape = (*self.shape, *columns)
        stride = torch.empty(shape, device="meta").stride() if columns else self.stride
        return _dtensor().from_local(
            part, self.mesh, self.placements, run_check=False, shape=torch.Size(shape), stride=tuple(stride)
        )

    def part(self, tensor: Any) -> Tensor:
        """This process's part of a DTensor, which may be cut otherwise; a part as it is."""
        if not is_sharded(tensor):
            return tensor
        if tuple(tensor.placements) != self.placements:
            tensor = tensor.redistribute(self.mesh, self.placements)
        return tensor.to_local()


def is_sharded(tensor: object) -> bool:
    """Whether this is a DTensor; their module, which takes long to import, is there if one is."""
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def gathered(tensor: Any) -> Tensor:
    """A tensor whole, on each of the processes that have parts of it; all of them must ask."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


class Gathering(TorchFunctionMode):
    """Every operation on tensors that are cut is one on the whole ones, as PyTorch cannot reshape all that are cut."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*map_tensors(gathered, args), **map_tensors(gathered, kwargs or {}))


def shardings(tensors: Mapping[str, Tensor]) -> dict[str, Sharding]:
    """Of those that are DTensors, how they are cut."""
    found = {name: Sharding.of(tensor) for name, tensor in tensors.items() if is_sharded(tensor)}
    if found and torch.__version__ < LEAST:
        raise TypeError(
            f"{next(iter(found))!r} is a DTensor, of which this PyTorch ({torch.__version__}) takes wrong second derivatives, "
            f"as far as known. Use PyTorch {LEAST} or newer, or parameters that are not cut."
        )
    return found


def least(number: float, shards: Mapping[str, Sharding]) -> float:
    """The least of the numbers of all processes that have parts of some tensors, so that they choose alike."""
    return float(_minimum(torch.tensor(number, dtype=torch.float64, device="cpu"), shards))


def alike(word: int, shards: Mapping[str, Sharding]) -> bool:
    """Whether all processes that have parts of some tensors have the same word of 64 bits; all of them must ask."""
    low, high = _minimum(torch.tensor([word, ~word], device="cpu"), shards).tolist()
    return bool(low == ~high)


def world() -> tuple[int, int]:
    """This process's number among all, and how many they are."""
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def common(values: set[Any] | None, shards: Mapping[str, Sharding]) -> set[Any] | None:
    """The small objects that all processes have that have parts of some tensors; ``None`` where one of them has ``None``."""
    for group, _ in _groups(shards):
        several: list[Any] = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(several, values, group=group)
        values = None if None in several else set.intersection(*several)
    return values


def _minimum(numbers: Tensor, shards: Mapping[str, Sharding]) -> Tensor:
    for group, device in _groups(shards):
        numbers = numbers.to(device)
        torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MIN, group)
    return numbers


def _groups(shards: Mapping[str, Sharding]) -> list[tuple[Any, str]]:
    """The groups of processes that have parts of some tensors, one for each axis of a mesh, and where they send from."""
    groups: dict[int, tuple[Any, str]] = {}
    for how in shards.values():
        for axis in range(len(how.placements)):
            group = how.mesh.get_group(axis)
            groups[id(group)] = group, how.mesh.device_type
    return list(groups.values())


def local(tensor: Any) -> Tensor:
    """This process's part of a tensor that may be a DTensor, without its graph."""
    if not is_sharded(tensor):
        return tensor.detach()
    with torch.inference_mode(False):
        return tensor.detach().to_local()


def _dtensor() -> Any:
    from torch.distributed.tensor import DTensor

    return DTensor
