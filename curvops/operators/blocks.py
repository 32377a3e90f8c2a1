"""Symmetric blocks with structure: Kronecker products, and the same in an eigenbasis."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Block(ABC):
    """A symmetric matrix that is block-diagonal over ``groups`` blocks of size ``left · right`` each.

    Attributes:
        shape: ``(groups, left, right)``.
    """

    shape: tuple[int, int, int]

    @property
    def size(self) -> int:
        """Number of rows."""
        groups, left, right = self.shape
        return groups * left * right

    def matmul(self, columns: Tensor) -> Tensor:
        """Product with columns ``[size, K]``."""
        groups, left, right = self.shape
        return self._matmul(columns.reshape(groups, left, right, -1)).reshape(self.size, -1)

    @abstractmethod
    def _matmul(self, x: Tensor) -> Tensor:
        """Product with columns ``[groups, left, right, K]``."""

    @abstractmethod
    def diagonal(self) -> Tensor:
        """The diagonal, ``[size]``."""

    @abstractmethod
    def scaled(self, scalar: float) -> Block:
        """The block times a number."""

    def trace(self) -> Tensor:
        """The trace, a scalar."""
        return self.diagonal().sum()

    def dense(self) -> Tensor:
        """The matrix, ``[size, size]``."""
        like = self.diagonal()
        return self.matmul(torch.eye(self.size, dtype=like.dtype, device=like.device))


class KroneckerBlock(Block):
    """left ⊗ right for each group; a factor with two axes is the diagonal of a diagonal one.

    With ``right`` a one, this is a dense matrix or a diagonal.

    Args:
        left: ``[groups, l, l]``, or ``[groups, l]``.
        right: ``[groups, r, r]``, or ``[groups, r]``.
    """

    def __init__(self, left: Tensor, right: Tensor) -> None:
        self.left, self.right = left, right
        self.shape = (left.shape[0], left.shape[1], right.shape[1])

    def _matmul(self, x: Tensor) -> Tensor:
        groups, left, right, k = x.shape
        x = _times(self.left, x.reshape(groups, left, right * k)).view(groups, left, right, k)
        x = x.transpose(1, 2).reshape(groups, right, left * k)
        return _times(self.right, x).view(groups, right, left, k).transpose(1, 2)

    def diagonal(self) -> Tensor:
        left, right = _diagonal(self.left), _diagonal(self.right)
        return (left.unsqueeze(2) * right.unsqueeze(1)).flatten()

    def scaled(self, scalar: float) -> KroneckerBlock:
        return KroneckerBlock(self.left * scalar, self.right)

    def dense(self) -> Tensor:
        left, right = (torch.diag_embed(f) if f.ndim == 2 else f for f in (self.left, self.right))
        return torch.block_diag(*(torch.kron(a, b) for a, b in zip(left.contiguous(), right.contiguous(), strict=True)))

    def trace(self) -> Tensor:
        return (_diagonal(self.left).sum(1) * _diagonal(self.right).sum(1)).sum()


class EigenBlock(Block):
    """(U_left ⊗ U_right) diag(values) (U_left ⊗ U_right)ᵀ for each group.

    Args:
        left: Orthonormal columns ``[groups, l, l]``; ``None`` for the identity.
        right: Likewise.
        values: ``[groups, l, r]``.
    """

    def __init__(self, left: Tensor | None, right: Tensor | None, values: Tensor) -> None:
        self.left, self.right, self.values = left, right, values
        self.shape = (values.shape[0], values.shape[1], values.shape[2])

    def _matmul(self, x: Tensor) -> Tensor:
        x = self._rotate(x, transposed=True) * self.values.unsqueeze(-1)
        return self._rotate(x, transposed=False)

    def _rotate(self, x: Tensor, transposed: bool) -> Tensor:
        groups, left, right, k = x.shape
        if self.left is not None:
            basis = self.left.mT if transposed else self.left
            x = (basis @ x.reshape(groups, left, right * k)).view(groups, left, right, k)
        if self.right is not None:
            basis = self.right.mT if transposed else self.right
            x = (
                (basis @ x.transpose(1, 2).reshape(groups, right, left * k))
                .view(groups, right, left, k)
                .transpose(1, 2)
            )
        return x

    def diagonal(self) -> Tensor:
        values = self.values
        if self.left is not None:
            values = self.left.square() @ values
        if self.right is not None:
            values = values @ self.right.square().mT
        return values.flatten()

    def scaled(self, scalar: float) -> EigenBlock:
        return EigenBlock(self.left, self.right, self.values * scalar)

    def trace(self) -> Tensor:
        return self.values.sum()

    def dense(self) -> Tensor:
        bases = []
        for basis, size in zip((self.left, self.right), self.shape[1:], strict=True):
            eye = torch.eye(size, dtype=self.values.dtype, device=self.values.device)
            bases.append(eye.expand(self.shape[0], size, size) if basis is None else basis)
        both = [torch.kron(a.contiguous(), b.contiguous()) for a, b in zip(*bases, strict=True)]
        return torch.block_diag(*((u * v.flatten()) @ u.T for u, v in zip(both, self.values, strict=True)))


def _times(factor: Tensor, x: Tensor) -> Tensor:
    """Factor ``[groups, n, n]`` or diagonal ``[groups, n]`` times ``[groups, n, m]``."""
    return factor.unsqueeze(-1) * x if factor.ndim == 2 else factor @ x


def _diagonal(factor: Tensor) -> Tensor:
    return factor if factor.ndim == 2 else factor.diagonal(dim1=1, dim2=2)
