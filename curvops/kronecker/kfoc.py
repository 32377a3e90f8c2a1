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

STEPS = 50  # alternating steps at most
CONVERGED = 10  # times the precision: relative change of ‖left‖ ‖right‖ in two steps below which they stop


class KFOCLinearOperator(KroneckerOperator):
    """Kronecker-factored optimal curvature (Koroko et al. 2023, arXiv 2201.10285).

    Each weight's block is the single Kronecker product nearest, in Frobenius norm, to the block Σ vec(G) vec(G)ᵀ of
    whole per-datum gradients, by alternating least squares (a power iteration on the rearranged block) that starts at
    KFAC's factors, so that it is never farther from the block than KFAC.

    Args:
        model_func, loss_func, params, data: Model, loss, parameters by name and batches, as of `KFACLinearOperator`.
        check_deterministic: As there.
        options: ``fisher_type``, ``mc_samples``, ``kfac_approx`` (of the start only), ``separate_weight_and_bias``,
            ``num_per_example_loss_terms``, ``seed``, ``rule``, ``memory_budget``, ``reduction``, ``progressbar``,
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
        factors, wholes = collection.first(lambda: self._factors(collection), keep=True, together=True)
        entries = collection.summed({**factors.entries(collection.sweep.data), **wholes})
        groups = collection.sweep.grouping.groups
        blocks = {key: entries.pop(key).block(1.0) for key in list(entries) if groups[key].kind == "linear"}
        products = {
            key: NearestProduct(block, collection.budget)
            for key, block in blocks.items()
            if isinstance(block, KroneckerBlock)
        }
        for step in range(0 if collection.planned else STEPS):
            for key, uses in collection.again(f"step {step + 1}"):
                if key in products and not products[key].converged:
                    products[key].add(uses)
            collection.add_all([product.sum for product in products.values() if not product.converged])
            for product in products.values():
                product.step()
            if all(product.converged for product in products.values()):
                break
        return {**entries, **{key: Entry("product", {"left": p.left, "right": p.right}) for key, p in products.items()}}


class NearestProduct:
    """Alternating least squares for one group; a factor that is diagonal at the start stays diagonal."""

    def __init__(self, start: KroneckerBlock, budget: int) -> None:
        self.shape, self.left, self.right = start.shape, start.left, start.right
        self.converged = False
        self._update_left = True
        self._sizes: list[Tensor] = []
        self._bytes = budget // 4
        self.sum = torch.zeros_like(self.left)

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
        setattr(self, "left" if self._update_left else "right", self.sum / scale.view(-1, *[1] * (self.sum.ndim - 1)))
        self._update_left = not self._update_left
        self.sum = torch.zeros_like(other)
        self._sizes.append((self.left.flatten(1).norm(dim=1) * self.right.flatten(1).norm(dim=1)).norm())
        if len(self._sizes) > 2:
            least = CONVERGED * torch.finfo(self._sizes[-1].dtype).eps * self._sizes[-1]
            self.converged = bool(abs(self._sizes[-1] - self._sizes[-3]) <= least)
