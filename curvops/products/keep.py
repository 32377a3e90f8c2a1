"""Linearizations that are kept from product to product, within a memory budget."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial

from curvops.products.count import counted
from curvops.products.products import CHUNK, WORTH, BatchProduct
from curvops.risk.data import Batch
from curvops.risk.empirical_risk import EmpiricalRisk
from curvops.tree import content, tensors_of

TOGETHER_BYTES = 2**27  # graphs that go together: beyond, convolutions by `vmap` were measured slower than one by one
Build = Callable[[Batch], BatchProduct]


@dataclass
class Kept:
    """A linearization that is held.

    Attributes:
        product: The linearization.
        sources: The batches as the loader gave them.
        versions: What they held when it was made.
        graph: The bytes of its forward pass' graph.
    """

    product: BatchProduct
    sources: Sequence[Batch]
    versions: object
    graph: int = 0

    @property
    def size(self) -> int:
        """The bytes that it holds by now."""
        return self.graph + self.product.held_bytes


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
        self._limit = 0

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
        self._trim()

    def _walk(self, title: str) -> Generator[BatchProduct, None, None]:
        self._limit, number = self.budget(), 0
        with closing(self._risk.batches(title)) as batches:
            for place, batch in enumerate(batches):
                number += 1
                if place in self._kept:
                    yield self._kept[place].product
                    continue
                room = self._limit - self.size
                product, size = linearized(self.build, batch, self._limit)
                yield product
                # only now is everything made that a product needs
                if size is not None and size + product.held_bytes <= room:
                    self._kept[place] = Kept(product, [batch], versions([batch]), size)
        self._number = number

    def _trim(self) -> None:
        """Drop what has outgrown the budget, as when a later product takes another way."""
        if self._form and self.size > self._limit:
            self.clear()
        while self._kept and self.size > self._limit:
            self._kept.popitem()


def linearized(build: Build, batch: Batch, budget: int) -> tuple[BatchProduct, int | None]:
    """A batch's linearization, and the bytes of its graph if it may be kept and they can be counted."""
    if budget <= 0:
        product = build(batch)
        product.together, product.once = 1, True
        return product, None
    product, size = counted(partial(build, batch))
    if size is not None:
        # intermediate results are about as large as the graph, for each of the vectors that go together
        within = budget // max(1, 2 * size)
        product.together = min(CHUNK, max(WORTH, TOGETHER_BYTES // max(1, size)), max(1, within))
    return product, size


def versions(batches: Sequence[Batch]) -> object:
    """Changes with the data of some batches."""
    return content(tensors_of([(batch.X, batch.y) for batch in batches]))
