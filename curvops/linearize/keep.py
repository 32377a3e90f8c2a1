"""Linearizations that are kept from product to product, within a memory budget."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from curvops.linearize.products import BatchProduct
from curvops.risk.data import Batch
from curvops.risk.empirical_risk import EmpiricalRisk
from curvops.risk.tree import content, tensors_of

Build = Callable[[Batch], BatchProduct]


@dataclass
class Kept:
    """A linearization that is held.

    Attributes:
        product: The linearization.
        sources: The batches as the loader gave them.
        versions: What they held when it was made.
        size: The bytes that it holds.
    """

    product: BatchProduct
    sources: Sequence[Batch]
    versions: object
    size: int


class KeptLinearizations:
    """The linearizations of all batches: from memory where kept, else made anew.

    Args:
        risk: The empirical risk.
        build: Makes the linearization of a batch.
        budget: Bytes that may be kept, asked for when something is to be kept.
    """

    def __init__(self, risk: EmpiricalRisk, build: Build, budget: Callable[[], int]) -> None:
        self.build, self.budget = build, budget
        self._risk = risk
        self._kept: dict[int, Kept] = {}
        self._token: object = None
        self._number: int | None = None
        self._form = ""

    @property
    def size(self) -> int:
        """Bytes that are kept."""
        return sum(kept.size for kept in self._kept.values())

    @property
    def all(self) -> list[Kept] | None:
        """What is kept, if that is everything that products need."""
        if self._number is None or len(self._kept) < self._number:
            return None
        return list(self._kept.values())

    def __str__(self) -> str:
        total = "?" if self._number is None else self._number
        if not self._kept:
            return "no batch is kept"
        what = self._form or f"{len(self._kept)} of {total} batches kept"
        return f"{what}, {self.size / 2**20:.1f} MiB"

    def clear(self) -> None:
        """Drop everything."""
        self._kept, self._number, self._form = {}, None, ""

    def refresh(self) -> bool:
        """Drop everything if anything has changed: parameters, buffers, modes, autocast state or the kept data."""
        token = self._risk.token()
        fresh = token == self._token
        if fresh and all(kept.versions == versions(kept.sources) for kept in self._kept.values()):
            return False
        self.clear()
        self._token = token
        return True

    def replace(self, kept: Sequence[Kept], form: str) -> None:
        """Keep something else that gives the same products together; the rest goes."""
        self._kept, self._number, self._form = dict(enumerate(kept)), len(kept), form

    def each(self, title: str) -> Generator[BatchProduct, None, None]:
        """The linearizations, batch by batch; call within the risk's evaluation, after `refresh`."""
        if (kept := self.all) is not None:
            # nothing is needed from the loader
            yield from [k.product for k in kept]
        else:
            yield from self._walk(title)

    def _walk(self, title: str) -> Generator[BatchProduct, None, None]:
        budget, number = self.budget(), 0
        with closing(self._risk.batches(title)) as batches:
            for place, batch in enumerate(batches):
                number += 1
                if place in self._kept:
                    yield self._kept[place].product
                    continue
                room = budget - self.size
                if room <= 0:
                    yield self.build(batch)
                    continue
                product, size = counted(self.build, batch)
                yield product
                if size is not None and size <= room:
                    self._kept[place] = Kept(product, [batch], versions([batch]), size)
        self._number = number


def counted(build: Build, batch: Batch) -> tuple[BatchProduct, int | None]:
    """A batch's linearization and the bytes that it holds, if they can be counted."""
    try:
        with counted_bytes() as count:
            return build(batch), count.total
    except RuntimeError:  # a model that uses `torch.func` inside refuses the hooks that count
        return build(batch), None


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


def versions(batches: Sequence[Batch]) -> object:
    """Changes with the data of some batches."""
    return content(tensors_of([(batch.X, batch.y) for batch in batches]))
