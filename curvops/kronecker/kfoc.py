"""KFOC: the best single Kronecker product, as a linear operator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from curvops.kronecker.collect import Collection
from curvops.kronecker.correction import merged, whole_gradients
from curvops.kronecker.groups import Key
from curvops.kronecker.operator import KroneckerOperator
from curvops.kronecker.rows import Rows
from curvops.kronecker.state import Entry
from curvops.operators.blocks import KroneckerBlock
from curvops.spill import Spill

STEPS = 50  # alternating steps at most
STATE = "steps"  # kind of an entry that more steps go on from
CONVERGED = 10  # times the precision: relative change of ‖left‖ ‖right‖ in two steps below which they stop


class KFOCLinearOperator(KroneckerOperator):
    """Kronecker-factored optimal curvature (Koroko et al. 2023, arXiv 2201.10285).

    Each weight's block is the single Kronecker product nearest, in Frobenius norm, to the block Σ vec(G) vec(G)ᵀ of
    whole per-datum gradients, by alternating least squares (a power iteration on the rearranged block) that starts at
    KFAC's factors, so that it is never farther from the block than KFAC.

    Args:
        model_func, loss_func, params, data: Model, loss, parameters by name and batches, as of `KFACLinearOperator`.
        check_deterministic, checkpoint: As there.
        options: ``fisher_type``, ``mc_samples``, ``kfac_approx`` (of the start only), ``separate_weight_and_bias``,
            ``num_per_example_loss_terms``, ``seed``, ``rule``, ``memory_budget``, ``spill``, ``reduction``, ``progressbar``,
            ``num_data``, ``batch_size_fn`` and ``process_group``, as there.

    Example:
        >>> import torch
        >>> from curvops import KFOCLinearOperator
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> data = [(torch.rand(5, 3), torch.randint(2, (5,)))]
        >>> kfoc = KFOCLinearOperator(model, torch.nn.CrossEntropyLoss(), dict(model.named_parameters()), data)
        >>> kfoc.psd, kfoc.shape
        (True, (26, 26))
    """

    further_walks = STEPS
    needs_gradients = "so no product is nearest. Use KFACLinearOperator."

    def _compute(self, collection: Collection) -> dict[Key, Entry]:
        entries = collection.second(lambda: self._kfac(collection, again=True))
        groups = collection.sweep.grouping.groups
        starts = {key: _start(entries.pop(key), collection) for key in list(entries) if groups[key].kind == "linear"}
        products = {
            key: NearestProduct(start, collection.budget, collection.spill)
            for key, start in starts.items()
            if start is not None
        }
        step = max((len(product.sizes) for product in products.values()), default=0)

        def through() -> bool:
            return step == STEPS or all(product.converged for product in products.values())

        if step and through():
            collection.compare()
        while not (collection.planned or through()):
            step += 1
            for key, uses in collection.again(f"step {step}"):
                if key in products and not products[key].converged:
                    products[key].add(uses)
            collection.add_all([product.sum for product in products.values() if not product.converged])
            for product in products.values():
                product.step()
            collection.keep({**entries, **{key: product.state() for key, product in products.items()}})
        return {**entries, **{key: Entry("product", {"left": p.left, "right": p.right}) for key, p in products.items()}}


def _start(entry: Entry, collection: Collection) -> Entry | None:
    """What steps start at: the state after earlier ones, or the factors; ``None`` if no row was seen."""
    if entry.kind == STATE:
        return entry
    block = entry.block(1.0)
    if not isinstance(block, KroneckerBlock):
        return None
    left, right = collection.scaled(block)
    return Entry(STATE, {"left": left, "right": right})


class NearestProduct:
    """Alternating least squares for one group; a factor that is diagonal at the start stays diagonal."""

    def __init__(self, start: Entry, budget: int, spill: Spill) -> None:
        t, self._spill = start.tensors, spill
        self.left, self.right = t["left"], t["right"]
        self.shape = (*self.left.shape[:2], self.right.shape[1])
        self.sizes: list[Tensor] = list(t["sizes"]) if "sizes" in t else []  # of the product, after each step
        self.converged = self._converged()
        self._bytes = budget // 4
        self.sum = self._zeros(self.left if self._update_left else self.right)

    @property
    def _update_left(self) -> bool:
        return len(self.sizes) % 2 == 0

    def state(self) -> Entry:
        """What goes on from here."""
        return Entry(STATE, {"left": self.left, "right": self.right, "sizes": torch.stack(self.sizes)})

    def add(self, uses: Sequence[Rows]) -> None:
        """Add Σ G R Gᵀ, or Σ Gᵀ L G, over the data of some backward passes."""
        if not (uses := [rows for rows in uses if rows.outputs]):
            return
        for found in whole_gradients(merged(uses, self.left.dtype), self.shape, self._bytes):
            g = found.flatten(0, 1)
            inner, other = (g, self.right) if self._update_left else (g.mT, self.left)
            half = inner * other.unsqueeze(1) if other.ndim == 2 else inner @ other
            if self.sum.ndim == 2:
                self.sum += (half * inner).sum((0, 3))
            else:
                self.sum += torch.einsum("ngij,ngkj->gik", half, inner)

    def step(self) -> None:
        """Take the least-squares solution for one factor, and turn to the other."""
        if self.converged:
            return
        other = self.right if self._update_left else self.left
        scale = other.flatten(1).square().sum(1)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        found = self.sum.div_(scale.view(-1, *[1] * (self.sum.ndim - 1)))
        setattr(self, "left" if self._update_left else "right", found)
        self.sum = self._zeros(other)
        self.sizes.append((self.left.flatten(1).norm(dim=1) * self.right.flatten(1).norm(dim=1)).norm())
        self.converged = self._converged()

    def _zeros(self, like: Tensor) -> Tensor:
        return self._spill.zeros(like.shape, like.dtype)

    def _converged(self) -> bool:
        if len(self.sizes) < 3:
            return False
        last = self.sizes[-1]
        return bool(abs(last - self.sizes[-3]) <= CONVERGED * torch.finfo(last.dtype).eps * last)
