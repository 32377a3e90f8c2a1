"""The sum over batches of their products, and how it gets faster while it is used."""

from __future__ import annotations

import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing

import torch
from torch import Tensor

from curvops.products.certify import Account, reason, relative_difference, tolerance
from curvops.products.choose import CLEARLY, timed
from curvops.products.keep import Build, Kept, KeptLinearizations, linearized, versions
from curvops.products.products import WORTH, BatchProduct
from curvops.risk.data import Batch, joined_batches

JOINED_BYTES = 2**28  # what a joined batch's linearization may hold: beyond, larger batches are no faster
LONG = 0.05  # seconds of a batch's product from which the overhead of one more batch does not matter
TRACING = 10.0  # seconds of products after which a program for forward mode is made, which takes up to as long


class Upgrade(ABC):
    """Another form of all batches' linearizations, which costs something to make and makes products cheaper.

    Attributes:
        form: What is kept then, for the account.
        final: Whether nothing is faster.
    """

    form: str
    final = False

    @abstractmethod
    def due(self, kept: Sequence[Kept], vectors: int, seconds: float) -> bool | None:
        """Whether it is worth its cost by now; ``None`` if it never will be.

        Args:
            kept: The linearizations.
            vectors: Number of products so far, the ones at hand included.
            seconds: What they took so far.
        """

    @abstractmethod
    def build(self, kept: Sequence[Kept]) -> list[Kept]:
        """Make it."""

    def accept(self) -> None:  # noqa: B027 (most have nothing to do)
        """It serves from now on."""


class Relinearized(Upgrade):
    """The linearizations made anew in another way, with an account of its own choices.

    Args:
        build: Linearizes a batch.
        account: Where the choices of what it makes are recorded.
        budget: Bytes that may be kept.
        accept: Takes ``build`` and ``account`` if they are to serve.
    """

    def __init__(
        self, build: Build, account: Account, budget: Callable[[], int], accept: Callable[[Build, Account], None]
    ) -> None:
        self._build, self._account, self._budget, self._accept = build, account, budget, accept

    def accept(self) -> None:
        self._accept(self._build, self._account)

    def _kept(self, sources: Sequence[Batch]) -> Kept:
        (batch,) = joined_batches(sources, sum(source.size for source in sources))
        product, held = linearized(self._build, batch, self._budget())
        return Kept(product, sources, versions(sources), held or 0)


class JoinedBatches(Relinearized):
    """Fewer and larger batches, where the model does not mix the data of a batch."""

    form = "batches joined"

    def due(self, kept: Sequence[Kept], vectors: int, seconds: float) -> bool | None:
        if len(kept) < 2 or 2 * sum(k.size for k in kept) > self._budget():
            return None
        if vectors < WORTH:
            return False
        return True if seconds < LONG * vectors * len(kept) else None

    def build(self, kept: Sequence[Kept]) -> list[Kept]:
        sources = [batch for k in kept for batch in k.sources]
        size, data = sum(k.size for k in kept), sum(batch.size for batch in sources)
        groups, left = [], iter(sources)
        for joined in joined_batches(sources, max(1, data * JOINED_BYTES // max(size, 1))):
            groups.append([next(left)])
            while sum(batch.size for batch in groups[-1]) < joined.size:
                groups[-1].append(next(left))
        self.form = f"{len(sources)} batches joined to {len(groups)}"
        return [self._kept(group) for group in groups]


class LinearizedForward(Relinearized):
    """Forward mode by a program of its own, from which everything that does not depend on the vector is gone."""

    form = "forward mode linearized"

    def due(self, kept: Sequence[Kept], vectors: int, seconds: float) -> bool | None:
        if 3 * sum(k.size for k in kept) > self._budget():
            return None
        # making and trying it takes the time of several products of a large model too
        return vectors > 4 * WORTH and seconds >= TRACING

    def build(self, kept: Sequence[Kept]) -> list[Kept]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tracing warns of its own doings
            found = [self._kept(k.sources) for k in kept]
        for k in found:
            k.graph *= 2  # the program holds about what the graph does
        return found


class BatchSum:
    """Σ over batches of their products with vectors.

    Args:
        kept: The linearizations.
        upgrades: What may replace them, in the order in which it is tried, anew whenever something has changed.
        account: Where choices are recorded.
        title: For the progress bar.
    """

    def __init__(
        self, kept: KeptLinearizations, upgrades: Callable[[], list[Upgrade]], account: Account, title: str
    ) -> None:
        self._kept, self._upgrades, self._account, self._title = kept, upgrades, account, title
        self._left: list[Upgrade] = []
        self._vectors, self._seconds = 0, 0.0

    def __call__(self, columns: Tensor) -> Tensor:
        """The product with columns ``[D, K]``, without the constant c; call within the risk's evaluation."""
        if self._kept.refresh():
            self._left = self._upgrades()
            self._vectors, self._seconds = 0, 0.0
        self._vectors += columns.shape[1]
        if self._kept.all is None and columns.shape[1] >= WORTH and self._left:
            # one column first, so that there is something to upgrade for the others
            first, columns = self._sum(columns[:, :1]), columns[:, 1:]
            return torch.cat([first, self._upgraded(columns)], 1)
        return self._upgraded(columns)

    def _upgraded(self, columns: Tensor) -> Tensor:
        """The product, after the upgrades that are due."""
        while (upgrade := self._due()) is not None:
            self._try(upgrade, columns)
        return self._sum(columns)

    def _due(self) -> Upgrade | None:
        """The first upgrade that is due, which is tried once; those that never will be are dropped."""
        kept = self._kept.all
        for upgrade in list(self._left) if kept is not None else []:
            due = upgrade.due(kept or [], self._vectors, self._seconds)
            if due is not False:
                self._left.remove(upgrade)
            if due:
                return upgrade
        return None

    def _try(self, upgrade: Upgrade, like: Tensor) -> None:
        """Take the upgrade if it gives the same product with a random vector, and faster."""
        generator = torch.Generator().manual_seed(0)
        v = torch.randn(len(like), 1, generator=generator, dtype=torch.promote_types(like.dtype, torch.float32)).to(
            like
        )
        expected, slow = timed(lambda: self._sum(v), v.device)
        work = "batches"
        try:
            kept = upgrade.build(self._kept.all or [])
            found, fast = timed(lambda: added((k.product for k in kept), v), v.device)
        except Exception as error:  # any failure of an optimisation means that the reference serves
            self._account.note(work, "as given", f"{upgrade.form} is unsupported here: {reason(error)}")
            return
        difference = relative_difference(found, expected)
        times = f"{1e3 * fast:.1f} ms, {1e3 * slow:.1f} ms before"
        if not difference <= tolerance(v.dtype):
            self._account.note(work, "as given", f"{upgrade.form}: differ by {difference:.1e}")
        elif fast < CLEARLY * slow:
            self._kept.replace(kept, upgrade.form)
            upgrade.accept()
            self._left = [] if upgrade.final else self._left
            self._account.note(work, upgrade.form, times)
        else:
            self._account.note(work, "as given", f"{upgrade.form}: {times}")

    def _sum(self, columns: Tensor) -> Tensor:
        start = time.perf_counter()
        with closing(self._kept.each(self._title)) as products:
            total = added(products, columns)
        self._seconds += time.perf_counter() - start
        return total


def added(products: Iterable[BatchProduct], columns: Tensor) -> Tensor:
    """Σ of products with columns ``[D, K]``, in at least single precision."""
    one = columns.shape[1] == 1
    total: Tensor | None = None
    for product in products:
        product.once = product.once and one
        if one:
            total = product.add_to(total, columns[:, 0])
        else:
            part = product.products(columns).to(torch.promote_types(columns.dtype, torch.float32))
            total = part if total is None else total.add_(part)
    assert total is not None  # data are never empty
    return total.unsqueeze(1) if one else total
