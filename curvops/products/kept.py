"""What is kept from product to product inside `linearized`: graphs of batches, within a memory budget."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from curvops.memory import byte_size
from curvops.products.account import Account
from curvops.products.batch import BatchProduct
from curvops.risk.data import Batch
from curvops.risk.empirical_risk import EmpiricalRisk, Walk
from curvops.sharding import local
from curvops.tree import tensors_of

State = list[tuple[str, int, int]]


class Kept:
    """The products of the batches, kept as far as they fit.

    Args:
        risk: The empirical risk.
        title: For the progress bar.
        by_place: What belongs to the data's places, as of the risk's `walk`.
        linearize: Makes the products of a batch.
        hold: Gives what is kept of them for many products: themselves, or something smaller.
        budget: Gives the bytes that may be kept.
        account: Where it is recorded what is kept.
    """

    def __init__(
        self,
        risk: EmpiricalRisk,
        title: str,
        by_place: str,
        linearize: Callable[[Batch, Walk], BatchProduct],
        hold: Callable[[BatchProduct], BatchProduct],
        budget: Callable[[], int],
        account: Account,
    ) -> None:
        self._risk, self._title, self._by_place, self._linearize, self._hold = risk, title, by_place, linearize, hold
        self._budget, self._account = budget, account
        self._products: dict[int, BatchProduct] = {}
        self._size = 0
        self._number: int | None = None  # of batches, once they were counted
        self._first: Walk | None = None  # the walk that counted them
        self._state: State = []

    def add_to(self, total: Tensor, rows: Tensor) -> Tensor:
        """Add products with vectors ``[K, D]`` to zeros ``[K, D]``.

        Raises:
            RuntimeError: If a parameter, a buffer or a mode has changed since the first product.
        """
        with self._risk.ranks.together():
            if self._number is not None:
                self._check()
            if self._first is not None and len(self._products) == self._number:
                with self._risk.evaluation():
                    for product in self._products.values():
                        product.add_to(total, rows)
                total = self._first.summed(total, rows).mul_(self._first.constant)
            else:
                total = self._walk(rows, total)
            self._state = self._look()  # a model that changes its own buffers has had them put back
            return total

    def __str__(self) -> str:
        return f"{len(self._products)} of {self._number} batches kept, {byte_size(self._size)}"

    def _walk(self, rows: Tensor, total: Tensor) -> Tensor:
        budget = self._budget()
        if self._number is None:
            self._products, self._size = {}, 0  # of a walk that did not reach its end
        with self._risk.walk(self._title, self._by_place) as walk:
            for place, batch in enumerate(walk):
                if place in self._products:
                    self._check_same(self._products[place].batch, batch)
                    self._products[place].add_to(total, rows)
                    continue
                product, size = self._counted(batch, walk, total, rows, budget - self._size)
                if size is not None and self._size + size <= budget:
                    self._products[place], self._size = product, self._size + size
            # a kept batch's loss is not asked again, so that only the first walk knows the constant
            counted = self._first or walk
            total = counted.summed(total, rows).mul_(counted.constant)
            if self._first is None:
                self._number, self._first = walk.batches, walk
        self._account.note("linearized", str(self), "what does not fit the memory budget is computed anew")
        return total

    def _check_same(self, kept: Batch, batch: Batch) -> None:
        pairs = zip(tensors_of((kept.X, kept.y)), tensors_of((batch.X, batch.y)), strict=False)
        if not all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs):
            raise RuntimeError(
                f"{self._title}: inside linearized() the loader yields other batches than before, or in another order. Pass a "
                "DataLoader with shuffle=False, or more memory_budget, so that all batches are kept."
            )

    def _counted(
        self, batch: Batch, walk: Walk, total: Tensor, rows: Tensor, room: int
    ) -> tuple[BatchProduct, int | None]:
        """A batch's products, added to ``total``, and the bytes that they hold if these can be counted."""
        sizes: dict[int, int] = {}

        def count(tensor: Tensor) -> Tensor:
            storage = local(tensor).untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()  # the same memory, without the cycle of an output that saves itself

        hooks = partial(saved_tensors_hooks, count, lambda tensor: tensor)
        try:
            with hooks():
                product = self._linearize(batch, walk)
        except RuntimeError as error:
            if "saved tensor hooks" not in str(error) and "saved_tensors_hooks" not in str(error):
                raise
            # a model that uses `torch.func` inside refuses the hooks that count
            product = self._linearize(batch, walk)
            product.add_to(total, rows)
            return product, None
        # made outside the hooks, which refuse `torch.func`; for what will not be kept it would be made in each product
        fits = 2 * sum(sizes.values()) <= room
        if fits and (held := self._hold(product)) is not product:
            held.add_to(total, rows)
            return held, held.held_bytes
        with hooks():  # products build what they need besides
            product.add_to(total, rows)
        return product, product.copies * sum(sizes.values())

    def _look(self) -> State:
        model = self._risk.model
        model.check_current()
        modes = [("the mode of " + type(m).__name__, id(m), 0) for m in model.training_modules]
        return [*((name, id(t), t._version) for name, t in model.tensors.items() if not t.is_inference()), *modes]

    def _check(self) -> None:
        if (now := self._look()) != self._state:
            changed = [a[0] for a, b in zip(self._state, now, strict=False) if a != b]
            raise RuntimeError(
                f"{changed[0] if changed else 'a mode'!r} has changed inside linearized(), which keeps what was computed before. "
                "Leave the context and enter it again, or take products without it: they mean the model as it is."
            )
