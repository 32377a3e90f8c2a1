"""Block-diagonal operators whose blocks sit at given places of the parameter vector."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvops.operators.blocks import Block
from curvops.operators.linear_operator import LinearOperator


@dataclass(frozen=True)
class Placed:
    """A block and where it sits.

    Attributes:
        names: Its parameters.
        positions: Place of each of its rows in the flat vector.
        block: The block.
    """

    names: tuple[str, ...]
    positions: Tensor
    block: Block


class BlockDiagonalOperator(LinearOperator):
    """A symmetric operator of blocks; entries of no block are zero rows and columns."""

    @property
    @abstractmethod
    def blocks(self) -> Sequence[Placed]:
        """The blocks."""

    def _apply(self, columns: Tensor) -> Tensor:
        result = torch.zeros_like(columns)
        for placed in self.blocks:
            block = placed.block.matmul(columns[placed.positions].to(placed.block.diagonal().dtype))
            result[placed.positions] = block.to(columns.dtype)
        return result

    def _dense(self) -> Tensor:
        result = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        for placed in self.blocks:
            where = placed.positions
            result[where[:, None], where] = placed.block.dense().to(self.dtype)
        return result

    def trace(self) -> Tensor:
        """The trace, a scalar tensor."""
        total = torch.zeros((), dtype=self.dtype, device=self.device)
        for placed in self.blocks:
            total += placed.block.trace().to(self.dtype)
        return total

    def diagonal(self) -> Tensor:
        """The diagonal, ``[D]``."""
        result = torch.zeros(self.domain.dim, dtype=self.dtype, device=self.device)
        for placed in self.blocks:
            result[placed.positions] = placed.block.diagonal().to(self.dtype)
        return result
