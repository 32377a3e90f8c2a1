"""Linearizations that are kept from product to product, within a memory budget."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from curvops.linearize.reference import BatchProduct
from curvops.risk.data import Batch
from curvops.risk.empirical_risk import EmpiricalRisk
from curvops.risk.tree import content, tensors_of


@dataclass
class Kept:
    """One batch's linearization, the batch's versions when it was made, and the bytes that it holds."""

    product: BatchProduct
    batch: Batch
    versions: object
    size: int


class KeptLinearizations:
    """The linearizations of all batches: from memory where kept, else made anew.

    What is kept is dropped as soon as parameters, buffers, modes, autocast state or the kept batches' tensors
    have changed.

    Args:
        risk: The empirical risk.
        build: Makes the linearization of a batch.
        budget: Bytes that may be kept, asked for when something is to be kept.
    """

    def __init__(self, risk: EmpiricalRisk, build: Callable[[Batch], BatchProduct], budget: Callable[[], int]) -> None:
        self._risk, self._build, self._budget = risk, build, budget
        self._kept: dict[int, Kept] = {}
        self._token: object = None
        self._number: int | None = None

    @property
    def size(self) -> int:
        """Bytes that are kept."""
        return sum(kept.size for kept in self._kept.values())

    def __str__(self) -> str:
        total = "?" if self._number is None else self._number
        if not self._kept:
            return "no batch is kept"
        return f"{len(self._kept)} of {total} batches kept, {self.size / 2**20:.1f} MiB"

    def clear(self) -> None:
        """Drop everything."""
        self._kept, self._number = {}, None

    def each(self, title: str) -> Generator[BatchProduct, None, None]:
        """The linearizations, batch by batch; call within the risk's evaluation."""
        token = self._risk.token()
        if token != self._token or any(kept.versions != _versions(kept.batch) for kept in self._kept.values()):
            self.clear()
            self._token = token
        if self._number is not None and len(self._kept) == self._number:
            # nothing is needed from the loader
            yield from [kept.product for kept in self._kept.values()]
            return
        yield from self._walk(title)

    def _walk(self, title: str) -> Generator[BatchProduct, None, None]:
        budget, number = self._budget(), 0
        with closing(self._risk.batches(title)) as batches:
            for place, batch in enumerate(batches):
                number += 1
                if place in self._kept:
                    yield self._kept[place].product
                    continue
                room = budget - self.size
                if room <= 0:
                    yield self._build(batch)
                    continue
                product, size = self._counted(batch)
                yield product
                if size is not None and size <= room:
                    self._kept[place] = Kept(product, batch, _versions(batch), size)
        self._number = number

    def _counted(self, batch: Batch) -> tuple[BatchProduct, int | None]:
        """A batch's linearization and the bytes that it holds, if they can be counted."""
        try:
            with counted_bytes() as count:
                return self._build(batch), count.total
        except RuntimeError:  # a model that uses `torch.func` inside refuses the hooks that count
            return self._build(batch), None


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


def _versions(batch: Batch) -> object:
    return content(tensors_of((batch.X, batch.y)))
