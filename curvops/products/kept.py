"""What is kept from product to product inside `linearized`: graphs of batches, within a memory budget."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from curvops.products.account import Account
from curvops.products.batch import BatchProduct
from curvops.risk.data import Batch
from curvops.risk.empirical_risk import EmpiricalRisk, Walk

T = TypeVar("T")
State = list[tuple[str, Any, Any]]


class Kept:
    """The products of the batches, kept as far as they fit.

    Args:
        risk: The empirical risk.
        title: For the progress bar.
        linearize: Makes the products of a batch.
        budget: Gives the bytes that may be kept.
        account: Where it is recorded what is kept.
    """

    def __init__(
        self,
        risk: EmpiricalRisk,
        title: str,
        linearize: Callable[[Batch, Walk], BatchProduct],
        budget: Callable[[], int],
        account: Account,
    ) -> None:
        self._risk, self._title, self._linearize = risk, title, linearize
        self._budget, self._account = budget, account
        self._products: dict[int, BatchProduct] = {}
        self._size = 0
        self._number: int | None = None  # of batches, once they were counted
        self._constant = 0.0
        self._state: State = []

    def add_to(self, total: Tensor, rows: Tensor) -> Tensor:
        """Add products with vectors ``[K, D]`` to zeros ``[K, D]``.

        Raises:
            RuntimeError: If a parameter, a buffer or a mode has changed since the first product.
        """
        if self._number is not None:
            self._check()
        if len(self._products) == self._number:
            with self._risk.evaluation():
                for product in self._products.values():
                    product.add_to(total, rows)
            total.mul_(self._constant)
        else:
            total = self._walk(rows, total)
        self._state = self._look()  # a model that changes its own buffers has had them put back
        return total

    def __str__(self) -> str:
        return f"{len(self._products)} of {self._number} batches kept, {self._size / 2**20:.1f} MiB"

    def _walk(self, rows: Tensor, total: Tensor) -> Tensor:
        budget = self._budget()
        with self._risk.walk(self._title) as walk:
            for place, batch in enumerate(walk):
                if place in self._products:
                    self._products[place].add_to(total, rows)
                    continue

                def begun() -> BatchProduct:
                    product = self._linearize(batch, walk)  # noqa: B023 (used at once)
                    product.add_to(total, rows)  # which builds what products need besides
                    return product

                before = total.clone()
                product, size = counted(begun, lambda: total.copy_(before))  # noqa: B023
                size = None if size is None else product.held_bytes or size
                if size is not None and self._size + size <= budget:
                    self._products[place], self._size = product, self._size + size
            self._number, self._constant = walk.batches, walk.constant
        self._account.note("linearized", str(self), "what does not fit the memory budget is computed anew")
        return total.mul_(self._constant)

    def _look(self) -> State:
        model = self._risk.model
        model.check_current()
        modes = [("the mode of " + type(m).__name__, id(m), None) for m in model.training_modules]
        return [*((name, id(t), t._version) for name, t in model.tensors.items() if not t.is_inference()), *modes]

    def _check(self) -> None:
        now = self._look()
        changed = [
            name for (name, a, m), (_, b, n) in zip(self._state, now, strict=False) if (a is not b and a != b) or m != n
        ]
        if changed or len(now) != len(self._state):
            what = changed[0] if changed else "a mode"
            raise RuntimeError(
                f"{what!r} has changed inside linearized(), which keeps what was computed before. Leave the context and enter "
                "it again, or take products without it: they mean the model as it is."
            )


def counted(work: Callable[[], T], undo: Callable[[], Any]) -> tuple[T, int | None]:
    """What some work gives, and the bytes that its graphs hold if they can be counted."""
    sizes: dict[int, int] = {}

    def add(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the same memory, without the cycle of an output that saves itself

    try:
        with saved_tensors_hooks(add, lambda tensor: tensor):
            return work(), sum(sizes.values())
    except RuntimeError as error:
        # a model that uses `torch.func` inside refuses the hooks that count
        if "saved tensor hooks" not in str(error) and "saved_tensors_hooks" not in str(error):
            raise
        undo()
        return work(), None
