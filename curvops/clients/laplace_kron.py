"""Kronecker blocks as laplace-torch holds them: for each parameter, factors that are added up over batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from curvops.extras import extra
from curvops.kronecker.operator import KroneckerOperator
from curvops.operators.block_diagonal import Placed
from curvops.operators.blocks import KroneckerBlock

_matrix = extra("laplace.utils.matrix", "curvops.clients.laplace", "laplace-torch")
Kron: Any = _matrix.Kron
KronDecomposed: Any = _matrix.KronDecomposed


class BlockKron(Kron):
    """laplace-torch's `Kron` with any number of blocks a parameter, and factors that are diagonal.

    It takes the place of the zeros that laplace-torch begins with, which have one dense block for each parameter.

    Args:
        kfacs: For each block, in the order of the parameters, one or two factors: dense, or the diagonal of a diagonal one.
        owners: For each block the number of its parameter.
    """

    def __init__(self, kfacs: list[list[Tensor]], owners: Tensor) -> None:
        super().__init__(kfacs)
        self.owners = owners

    def __add__(self, other: Any) -> BlockKron:
        if list(map(_shapes, self.kfacs)) == list(map(_shapes, other.kfacs)):
            pairs = zip(self.kfacs, other.kfacs, strict=True)
            return BlockKron([[a + b for a, b in zip(*pair, strict=True)] for pair in pairs], self.owners)
        if not isinstance(other, BlockKron) and not any(bool(f.any()) for factors in other.kfacs for f in factors):
            return self
        raise ValueError(
            "expected batches that use the parameters in the same way, got blocks of two forms. Use the structure 'diag' "
            "or 'full', or batches that each reach all parameters."
        )

    # laplace-torch adds to its zeros from the right
    __radd__ = __add__

    def __mul__(self, scalar: Any) -> BlockKron:
        return BlockKron(super().__mul__(scalar).kfacs, self.owners)

    __rmul__ = __mul__

    def decompose(self, damping: bool = False) -> BlockKronDecomposed:
        """Eigendecompositions of the factors."""
        found = super().decompose(damping)
        return BlockKronDecomposed(found.eigenvectors, found.eigenvalues, found.deltas, damping, owners=self.owners)


class BlockKronDecomposed(KronDecomposed):
    """laplace-torch's `KronDecomposed`, to whose blocks one number a parameter can be added."""

    def __init__(self, *parts: Any, owners: Tensor) -> None:
        super().__init__(*parts)
        self.owners = owners

    def __add__(self, deltas: Tensor) -> BlockKronDecomposed:
        if deltas.ndim and len(deltas) == int(self.owners[-1]) + 1:
            deltas = deltas[self.owners]
        return self._like(super().__add__(deltas))

    __radd__ = __add__

    def __mul__(self, scalar: Any) -> BlockKronDecomposed:
        return self._like(super().__mul__(scalar))

    __rmul__ = __mul__

    def _like(self, found: Any) -> BlockKronDecomposed:
        parts = found.eigenvectors, found.eigenvalues, found.deltas, found.damping
        return BlockKronDecomposed(*parts, owners=self.owners)


def entries(operator: KroneckerOperator, share: float, factor: float) -> tuple[list[list[Tensor]], Tensor]:
    """Factors of an operator's blocks and the parameters that they belong to, in the order of the flat vector.

    Args:
        operator: KFAC of a batch, with separate weights and biases.
        share: The batch's share of all data, which A is multiplied by: sums over batches are then means.
        factor: What the matrix is multiplied by.

    Raises:
        ValueError: If a block's rows are not consecutive.
    """
    numbers = {name: k for k, name in enumerate(operator.domain.names)}
    kfacs: list[list[Tensor]] = []
    owners: list[int] = []
    for placed in sorted(operator.blocks, key=lambda one: int(one.positions[0])):
        found = _factors(placed, share, factor, vector=len(operator.domain.shapes[placed.names[0]]) == 1)
        kfacs += found
        owners += [numbers[placed.names[0]]] * len(found)
    return kfacs, torch.tensor(owners, device=operator.device)


def _factors(placed: Placed, share: float, factor: float, vector: bool) -> Sequence[list[Tensor]]:
    """One block for each group: [B, A], or a vector's own block."""
    block, positions = placed.block, placed.positions
    if not isinstance(block, KroneckerBlock) or not bool((positions.diff() == 1).all()):
        raise ValueError(
            f"{placed.label}: laplace-torch's Kronecker structure holds blocks of consecutive entries, and this one's are "
            "scattered over its parameters. Use the structure 'diag' or 'full', or leave these parameters out by "
            "requires_grad_(False)."
        )
    if vector and block.shape[2] == 1:
        return [[factor * left * right.squeeze()] for left, right in zip(block.left, block.right, strict=True)]
    root = factor**0.5
    return [[root * left, root * share * right] for left, right in zip(block.left, block.right, strict=True)]


def _shapes(factors: list[Tensor]) -> list[torch.Size]:
    return [f.shape for f in factors]
