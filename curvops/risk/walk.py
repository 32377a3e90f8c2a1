"""The walk over the data, and where the processes that share it meet."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from typing import Protocol

import torch
from torch import Tensor

from curvops.digest import digest
from curvops.divided import Silent, expect_summed
from curvops.extras import extra
from curvops.losses import OutputCurvature, OutputLoss
from curvops.ranks import Ranks, RanksError
from curvops.risk.data import EMPTY, Batch, Data, moved
from curvops.risk.model import Model
from curvops.sharding import alike
from curvops.space import TensorSpace
from curvops.tree import tensors_of


class Risk(Protocol):
    """What a walk asks of a risk."""

    ranks: Ranks
    model: Model
    loss: OutputLoss
    space: TensorSpace
    data: Data
    num_data: int | None
    progressbar: bool
    divided: bool

    @property
    def state(self) -> dict[str, Tensor]:
        """The tensors of model and loss that all processes have alike."""


class Walk:
    """One pass of a risk and its `loss` over the data: numbers of data (`size`) and `batches` so far, the constant c.

    Once the batches are through, those of all shares are known by `join`.
    """

    def __init__(self, risk: Risk, batches: Iterator[Batch], title: str, by_place: str = "") -> None:
        self._risk, self._batches, self.loss = risk, batches, risk.loss.walk()
        self._title, self._by_place = title, by_place
        if risk.progressbar:
            self._batches = extra("tqdm", "progressbar=True").tqdm(batches, desc=title, total=len(risk.data) or None)
        self.size = self.batches = 0
        self._count: float | None = None

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._in_step() if self._risk.divided else self._alike():
            self.size, self.batches = self.size + batch.size * (not batch.silent), self.batches + 1
            yield batch
        self._share = self.size
        if self._risk.ranks.alone:
            self._expect_number()

    def summed(self, total: Tensor, vectors: Tensor | None = None, space: TensorSpace | None = None) -> Tensor:
        """A sum over the batches, summed over the shares of the data too; each process multiplied the same vectors.

        Of parameters that are cut over the processes, gradients are sums already, in rows ``[…, D]`` of their space.
        """
        if not self._risk.divided:
            self.join(f"{self._title}, {' × '.join(map(str, total.shape))} numbers of {total.dtype}", vectors)
            return self._risk.ranks.add(total)
        left = (space or self._risk.space).uncut
        left = torch.cat([left.new_ones(total.shape[-1] - len(left)), left])
        part = total[..., left]
        own = vectors[..., left] if vectors is not None and space is None else None
        self.join(f"{self._title}, {' × '.join(map(str, part.shape))} numbers of {total.dtype}", own)
        total[..., left] = self._risk.ranks.add(part)
        return total

    def join(self, what: str = "", vectors: Tensor | None = None) -> None:
        """Meet the other processes of a group after the last batch; again for further work on the same batches.

        Raises:
            ValueError: If there are no data at all, or not as many as the caller said.
            RanksError: See `Ranks.meet`.
        """
        ranks, what = self._risk.ranks, ", ".join(filter(None, (what or self._title, self._by_place)))
        if ranks.alone:
            return
        state, compares = self._risk.state, self.loss.first[0] > 0
        sizes, self._count, compares = ranks.meet(what, state, vectors, self._share, self.loss.count, compares)
        if compares:
            self.loss.compare(ranks.gather(self.loss.first))
            ranks.meet(what)
        known, ranks.sizes = ranks.sizes, sizes
        if self._by_place and sizes != known:
            raise RuntimeError(
                f"{self._title}: the processes have {sizes} data, and had {known} before, so that random numbers would "
                "belong to other data. Make the operator anew."
            )
        self.size = sum(sizes)
        if not self.size:
            raise ValueError(EMPTY)
        self._expect_number()

    def _in_step(self) -> Iterator[Batch]:
        """As many batches as the process with the most has, as all of them gather parameters: silent ones after the last."""
        ranks, batches = self._risk.ranks, iter(self._batches)
        last: Batch | None = None
        for place in count():
            own = next(batches, None)
            # its number, lest one that was interrupted and began anew goes on with the others
            sizes, *_ = ranks.meet(f"{self._title}: batch {place}", size=0 if own is None else own.size)
            if not any(sizes):
                return
            if last is None and 0 in sizes:
                last = self._lent(own, sizes.index(max(sizes)))
            if own is None:
                assert last is not None
                own = replace(last, silent=True)
            last = own
            yield own

    def _lent(self, own: Batch | None, lender: int) -> Batch:
        """A batch of one process for those without data."""
        ranks, lent = self._risk.ranks, b""
        if own is not None and ranks.rank == lender:
            try:
                lent = pickle.dumps(moved(own, torch.device("cpu")))
            except Exception as error:
                raise TypeError(
                    f"data: a process without data borrows a batch of another, which cannot be sent ({type(error).__name__}: {error}). Give "
                    "each process at least one batch."
                ) from error
        ranks.meet(f"{self._title}: a batch that is lent")
        found: Batch = pickle.loads(ranks.gather(lent)[lender])
        return moved(found, self._risk.space.device)

    def _alike(self) -> Iterator[Batch]:
        """The batches, which must be the same in all processes that have parts of the parameters."""
        for batch in self._told(self._batches):
            self._expect_alike(batch)
            yield batch
        self._expect_alike(None)

    def _told(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches; where there is an error instead, the other processes that have parts of the parameters learn it."""
        try:
            yield from batches
        except Exception:
            if self._risk.model.fully_sharded:
                alike(-1, self._risk.model.shards)
            raise

    def _expect_alike(self, batch: Batch | None) -> None:
        """A RanksError in all processes that have parts of the parameters, where they have other batches, or no more."""
        shards = self._risk.model.shards if self._risk.model.fully_sharded else {}
        tensors = tensors_of((batch.X, batch.y)) if batch is not None else []
        if shards and not alike(digest({str(k): tensor for k, tensor in enumerate(tensors)}), shards):
            raise RanksError(
                f"{self._title}: the processes that have parts of the parameters have different batches, or one failed as it loaded its data. With fully_shard each of "
                "them passes the whole data, in the same order; to divide the data, pass the group of these processes as process_group=."
            )

    def _expect_number(self) -> None:
        expected = self._risk.num_data
        if expected is not None and self.size != expected:
            raise ValueError(
                f"num_data: expected {expected} data, the loader yields {self.size}. Leave num_data out, or correct it."
            )

    def curvature(self, z: Tensor, batch: Batch) -> OutputCurvature:
        """The loss as it is now at the outputs ``z`` of a batch, without c; to be asked once for each batch."""
        if z.ndim == 0 and batch.size > 1:
            raise ValueError(
                f"model_func: expected an output of {batch.size} data, got one number. A model that returns its own loss has no GGN, and "
                "how it weighs the data is not seen: let it return what the loss takes (logits), and pass the loss as loss_func. (With "
                "batch_size_fn=lambda X: 1 each batch is one datum, and a Hessian of their mean or sum.)"
            )
        # what `batch_size_fn` says of data whose first axis says something else
        tensors = tensors_of(batch.X) if batch.size == 1 else []
        whole = bool(tensors) and all(t.shape[:1] != (1,) for t in tensors)
        if self._risk.model.cut:
            found = self._risk.loss.curvature(z, batch.y, batch.size, checked=False)  # which counts nothing
            if not found.closed_form:
                expect_summed(found.value(), self._risk.model.cut)
            if batch.silent:
                return silenced(found)
        return self.loss.curvature(z, batch.y, batch.size, whole)

    @property
    def constant(self) -> float:
        """The factor c in front of the sum over loss terms, once all batches were seen; a ValueError where it is 1/0."""
        return self.loss.constant(self._count)


def silenced(curvature: OutputCurvature) -> OutputCurvature:
    """A loss without gradients, as it may read parameters besides the output."""
    value = curvature.value
    curvature.value = lambda: Silent.apply(value())  # type: ignore[method-assign, no-untyped-call]
    return curvature
