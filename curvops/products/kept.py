"""What is kept from product to product inside `linearized`: graphs of batches, within a memory budget."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from threading import RLock

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import Module

from curvops.memory import byte_size
from curvops.products.account import Account
from curvops.products.batch import BatchProduct
from curvops.risk.data import Batch
from curvops.risk.determinism import fingerprint
from curvops.risk.empirical_risk import EmpiricalRisk
from curvops.risk.walk import Walk
from curvops.sharding import local
from curvops.tree import strided

# what stands under a name of a module (held, as an id is used again once its object is gone), with its version or value
State = dict[tuple[str, int], tuple[object, object]]
SETTINGS = (bool, int, float, complex, str, type(None))


class Kept:
    """The products of the batches, kept as far as they fit.

    Args:
        risk: The empirical risk.
        title: For the progress bar.
        by_place: What belongs to the data's places, as of the risk's `walk`.
        linearize: Makes the products of a batch.
        hold: Gives what is kept of them for many products: themselves, or something smaller, or that is quicker and takes a
            few times as much memory as their graph, of which there is room for the number of times that it is told.
        budget: Gives the bytes that may be kept.
        account: Where it is recorded what is kept.
    """

    def __init__(
        self,
        risk: EmpiricalRisk,
        title: str,
        by_place: str,
        linearize: Callable[[Batch, Walk], BatchProduct],
        hold: Callable[[BatchProduct, float], BatchProduct],
        budget: Callable[[], int],
        account: Account,
    ) -> None:
        self._risk, self._title, self._by_place, self._linearize, self._hold = risk, title, by_place, linearize, hold
        self._budget, self._account = budget, account
        self._turn = RLock()  # threads that share an operator take products one after the other
        self._products: dict[int, BatchProduct] = {}
        self._size = 0
        self._number: int | None = None  # of batches, once they were counted
        self._marks: list[tuple[float, ...]] = []  # of the batches of the first walk
        self._first: Walk | None = None  # the walk that counted them
        self._state: State = {}
        self._own: set[tuple[str, int]] = set()  # what the model itself changes as it runs, as a counter of its calls

    def add_to(self, total: Tensor, rows: Tensor) -> Tensor:
        """Add products with vectors ``[K, D]`` to zeros ``[K, D]``.

        Raises:
            RuntimeError: If a parameter, a buffer or a mode has changed since the first product.
        """
        with self._turn, self._risk.ranks.together():
            state = self._check() if self._number is not None else {}
            if self._first is not None and len(self._products) == self._number:
                with self._risk.evaluation():
                    for product in self._products.values():
                        product.add_to(total, rows)
                total = self._first.summed(total, rows).mul_(self._first.constant)
                # what runs again as it is differentiated, and changes its own buffers, has had them put back
                self._state = {key: _versioned(a) if isinstance(a, Tensor) else (a, b) for key, (a, b) in state.items()}
            else:
                total = self._walk(rows, total)
                self._state = self._look()
            return total

    @property
    def size(self) -> int:
        """Bytes that are kept."""
        return self._size

    def __str__(self) -> str:
        return f"{len(self._products)} of {self._number} batches kept, {byte_size(self._size)}"

    def _walk(self, rows: Tensor, total: Tensor) -> Tensor:
        budget, before = self._budget(), self._look() if self._number is None else {}
        if self._number is None:
            self._products, self._size, self._marks = {}, 0, []  # of a walk that did not reach its end
        with self._risk.walk(self._title, self._by_place) as walk:
            for place, batch in enumerate(walk):
                self._expect_same(place, fingerprint(batch))
                if place in self._products:
                    self._products[place].add_to(total, rows)
                    continue
                product, size = self._counted(batch, walk, total, rows, budget - self._size)
                fits = size is not None and self._size + size <= budget
                if self._risk.least(fits):  # who keeps a graph takes no part in another forward pass
                    self._products[place], self._size = product, self._size + (size or 0)
            # a kept batch's loss is not asked again, so that only the first walk knows the constant
            counted = self._first or walk
            self._expect_same(walk.batches)
            total = counted.summed(total, rows).mul_(counted.constant)
            if self._first is None:
                self._number, self._first = walk.batches, walk
                self._own = {key for key in _changed(before, self._look()) if key[1]}
        self._account.note("linearized", str(self), "what does not fit the memory budget is computed anew")
        return total

    def _expect_same(self, place: int, mark: tuple[float, ...] | None = None) -> None:
        """Note a batch of the first walk; a RuntimeError where a later walk has another one, or (``None``) ends before."""
        if self._number is None:
            self._marks += [] if mark is None else [mark]
        elif self._marks[place : place + 1] != ([] if mark is None else [mark]):
            raise RuntimeError(
                f"{self._title}: inside linearized() the loader yields other batches than before, or in another order. Pass a "
                "DataLoader with shuffle=False, or more memory_budget, so that all batches are kept."
            )

    def _counted(
        self, batch: Batch, walk: Walk, total: Tensor, rows: Tensor, room: int
    ) -> tuple[BatchProduct, int | None]:
        """A batch's products, added to ``total``, and the bytes that they hold if these can be counted."""
        sizes: dict[int, int] = {}

        def count(tensor: Tensor) -> tuple[Tensor, int]:
            for storage in (part.untyped_storage() for part in strided(local(tensor))):
                sizes[storage.data_ptr()] = storage.nbytes()
            # the same memory, without the cycle of an output that saves itself
            return tensor.detach(), -1 if tensor.is_inference() else tensor._version

        hooks = partial(saved_tensors_hooks, count, _unchanged)
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
        times = room / max(1, sum(sizes.values()))
        if times >= 2 and (held := self._hold(product, times)) is not product:
            held.add_to(total, rows)
            return held, held.held_bytes
        with hooks():  # products build what they need besides
            product.add_to(total, rows)
        return product, product.copies * sum(sizes.values())

    def _look(self) -> State:
        model = self._risk.model
        model.check_current()
        found: State = {(name, 0): _versioned(t) for name, t in model.params.items()}
        for module in model.modules():
            for own in (module._parameters, module._buffers):
                found.update({(name, id(own)): _versioned(t) for name, t in own.items() if t is not None})
            found.update({(name, id(module)): (module, _setting(value)) for name, value in vars(module).items()})
        return found

    def _check(self) -> State:
        """The state as it is now, which must be what it was."""
        now = self._look()
        if changed := [key for key in _changed(self._state, now) if key not in self._own]:
            holder = (now.get(changed[0]) or self._state[changed[0]])[0]
            name = f"{type(holder).__name__}.{changed[0][0]}" if isinstance(holder, Module) else changed[0][0]
            raise RuntimeError(
                f"{name!r} has changed inside linearized(), which keeps what was computed before. "
                "Leave the context and enter it again, or take products without it: they mean the model as it is."
            )
        return now


def _versioned(tensor: Tensor) -> tuple[object, object]:
    return tensor, -1 if tensor.is_inference() else tensor._version


def _changed(before: State, now: State) -> list[tuple[str, int]]:
    """What is not as it was, what is gone, and what is new."""
    known = [key for key in before if key in now]
    other = [key for key in (*before, *now) if key not in now or key not in before]
    pairs = ((key, before[key], now[key]) for key in known)
    return [*(key for key, a, b in pairs if a[0] is not b[0] or not (a[1] is b[1] or a[1] == b[1])), *other]


def _unchanged(saved: tuple[Tensor, int]) -> Tensor:
    """A tensor of the graph, as PyTorch gives it back: an error if it was changed in place."""
    tensor, version = saved
    if version >= 0 and tensor._version != version:
        raise RuntimeError(
            f"one of the variables needed for gradient computation has been modified by an inplace operation: a {tensor.dtype} of shape "
            f"{tuple(tensor.shape)}, since the first product inside linearized(), or by the model itself. Leave the context and enter it again."
        )
    return tensor


def _setting(value: object) -> object:
    """What can be told at no cost of a module's attribute: a setting's value, a table's length (of hooks, submodules)."""
    return value if isinstance(value, SETTINGS) else len(value) if isinstance(value, dict) else None
