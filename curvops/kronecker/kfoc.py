"""KFOC: the best single Kronecker product, as a linear operator."""

from __future__ import annotations

import torch
from torch import Tensor

from curvops.kronecker.correction import cast, gradients
from curvops.kronecker.groups import Group, Key, Piece
from curvops.kronecker.operator import KroneckerOperator
from curvops.kronecker.replay import Replay
from curvops.kronecker.state import Entry, Product
from curvops.operators.blocks import KroneckerBlock

STEPS = 50  # alternating steps at most
CONVERGED = 10  # times the precision: relative change of ‖left‖ ‖right‖ in two steps below which they stop


class KFOCLinearOperator(KroneckerOperator):
    """Kronecker-factored optimal curvature (Koroko et al. 2023, arXiv 2201.10285).

    Each weight's block is the single Kronecker product nearest, in Frobenius norm, to the block Σ vec(G) vec(G)ᵀ of
    whole per-datum gradients, by alternating least squares (a power iteration on the rearranged block) that starts at
    KFAC's factors, so that it is never farther from the block than KFAC. Arguments as for `KFACLinearOperator`;
    ``kfac_approx`` decides the start only.

    Example:
        >>> import torch
        >>> from curvops import KFOCLinearOperator
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> data = [(torch.rand(5, 3), torch.randint(2, (5,)))]
        >>> kfoc = KFOCLinearOperator(model, torch.nn.CrossEntropyLoss(), dict(model.named_parameters()), data)
        >>> kfoc.psd, kfoc.shape
        (True, (26, 26))
    """

    _again = STEPS

    def _compute(self) -> dict[Key, Entry]:
        if self.fisher_type == "forward-only":
            raise ValueError(
                "fisher_type: 'forward-only' takes no gradients, so no product is nearest. Use KFACLinearOperator."
            )
        moments, wholes, replay = self._moments(), self._wholes(), Replay(self._sweep, self._budget())
        self._collect(moments, wholes, replay)
        self._kept_bytes = replay.kept_bytes
        problems = {}
        for key, entry in moments.entries().items():
            block = entry.block(1.0)
            if isinstance(block, KroneckerBlock):
                problems[key] = NearestProduct(self._sweep.groups[key], block, self._budget())
        for step in range(STEPS):
            for rows in replay.rows(f"{self.name} step {step + 1}"):
                for key, found in rows.items():
                    if key in problems and not problems[key].converged:
                        problems[key].add(found)
            for problem in problems.values():
                problem.step()
            if all(problem.converged for problem in problems.values()):
                break
        return {**{key: Product(p.left, p.right) for key, p in problems.items()}, **wholes.entries()}


class NearestProduct:
    """Alternating least squares for one group.

    Args:
        group: The group.
        start: Where to start; a factor that is diagonal there stays diagonal.
        budget: Bytes that the gradients of some units may take together.
    """

    def __init__(self, group: Group, start: KroneckerBlock, budget: int) -> None:
        self.group = group
        self.left, self.right = start.left, start.right
        self.converged = False
        self._update_left = True
        self._sizes: list[Tensor] = []
        self._chunk = max(1, budget // (4 * len(group.places) * start.dtype.itemsize))
        self._sum = torch.zeros_like(self.left)

    def add(self, found: list[Piece]) -> None:
        """Add Σ G R Gᵀ, or Σ Gᵀ L G, over the units of one backward pass."""
        if not found:
            return
        dtype = self.left.dtype
        sides = [(cast(piece.sides[0], dtype), cast(piece.sides[1], dtype)) for piece in found]
        like = torch.empty(self.group.shape, dtype=dtype, device=self._sum.device)
        for g in gradients(sides, like, self._chunk):
            inner, other = (g, self.right) if self._update_left else (g.mT, self.left)
            half = inner * other.unsqueeze(1) if other.ndim == 2 else inner @ other
            if self._sum.ndim == 2:
                self._sum += (half * inner).sum((0, 3))
            else:
                self._sum += torch.einsum("ngij,ngkj->gik", half, inner)

    def step(self) -> None:
        """Take the least-squares solution for one factor, and turn to the other."""
        if self.converged:
            return
        other = self.right if self._update_left else self.left
        scale = other.flatten(1).square().sum(1)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        solution = self._sum / scale.view(-1, *[1] * (self._sum.ndim - 1))
        if self._update_left:
            self.left = solution
        else:
            self.right = solution
        self._update_left = not self._update_left
        self._sum = torch.zeros_like(self.left if self._update_left else self.right)
        self._sizes.append((self.left.flatten(1).norm(dim=1) * self.right.flatten(1).norm(dim=1)).norm())
        if len(self._sizes) > 2:
            least = CONVERGED * torch.finfo(self._sizes[-1].dtype).eps * self._sizes[-1]
            self.converged = bool(abs(self._sizes[-1] - self._sizes[-3]) <= least)
