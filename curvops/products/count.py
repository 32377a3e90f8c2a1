"""How much memory autograd holds on to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

T = TypeVar("T")


def counted(work: Callable[[], T]) -> tuple[T, int | None]:
    """What some work gives, and the bytes that its graph holds if they can be counted."""
    try:
        with counted_bytes() as count:
            return work(), count.total
    except RuntimeError:  # a model that uses `torch.func` inside refuses the hooks that count
        return work(), None


class Count:
    """Bytes of distinct memory that autograd has saved."""

    def __init__(self) -> None:
        self._sizes: dict[int, int] = {}

    @property
    def total(self) -> int:
        """The bytes."""
        return sum(self._sizes.values())

    def add(self, tensor: Tensor) -> Tensor:
        """Count a tensor, and give what is saved in its place."""
        storage = tensor.untyped_storage()
        self._sizes[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the same memory, without the cycle of an output that saves itself


@contextmanager
def counted_bytes() -> Iterator[Count]:
    """A context that counts what autograd saves, the parameters' own memory included."""
    count = Count()

    def unpack(tensor: Any) -> Any:
        return tensor

    with saved_tensors_hooks(count.add, unpack):
        yield count
