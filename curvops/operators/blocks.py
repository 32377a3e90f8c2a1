"""Symmetric blocks with structure: Kronecker products, and the same in an eigenbasis."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from curvops.operators.eigen import check_finite, eigh, within_rounding


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

    @abstractmethod
    def trace(self) -> Tensor:
        """The trace, a scalar."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The matrix, ``[size, size]``."""

    @abstractmethod
    def frobenius_norm(self) -> Tensor:
        """The Frobenius norm, a scalar."""

    @abstractmethod
    def eigen(self, label: str) -> EigenBlock:
        """The block in its eigenbasis, decomposed once; ``label`` names it in errors."""

    @property
    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What the block is made of."""

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the block."""
        return next(iter(self.tensors.values())).dtype

    @property
    def memory(self) -> int:
        """Bytes that the block takes."""
        return sum(t.numel() * t.itemsize for t in self.tensors.values())


class KroneckerBlock(Block):
    """left ⊗ right for each group; a factor with two axes is the diagonal of a diagonal one.

    With ``right`` a one, this is a dense matrix or a diagonal.

    Args:
        left: ``[groups, l, l]``, or ``[groups, l]``.
        right: ``[groups, r, r]``, or ``[groups, r]``.
        scales: Numbers that left and right are to be multiplied by; the factors themselves may be large and are not
            copied for it.
    """

    def __init__(self, left: Tensor, right: Tensor, scales: tuple[float, float] = (1.0, 1.0)) -> None:
        self._left, self._right, self._scales = left, right, scales
        self.shape = (left.shape[0], left.shape[1], right.shape[1])
        self._eigen: EigenBlock | None = None

    @property
    def left(self) -> Tensor:
        """The left factor, a copy where it has a scale."""
        return self._left if self._scales[0] == 1.0 else self._left * self._scales[0]

    @property
    def right(self) -> Tensor:
        """The right factor, likewise."""
        return self._right if self._scales[1] == 1.0 else self._right * self._scales[1]

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"left": self._left, "right": self._right}

    def frobenius_norm(self) -> Tensor:
        # a factor's norm is the root of the sum of its squares, dense or diagonal
        left, right = (
            torch.linalg.vector_norm(factor.flatten(1), dim=1) * scale
            for factor, scale in zip((self._left, self._right), self._scales, strict=True)
        )
        return torch.linalg.vector_norm(left * right)

    def eigen(self, label: str) -> EigenBlock:
        if self._eigen is None:
            left, left_basis = eigh(self.left, label)
            right, right_basis = eigh(self.right, label)
            zero = within_rounding(left, left_basis).any() | within_rounding(right, right_basis).any()
            values = left.unsqueeze(2) * right.unsqueeze(1)
            self._eigen = EigenBlock(left_basis, right_basis, values, singular=bool(zero))
        return self._eigen

    def damped_inverse(self, damping: float, min_damping: float, label: str) -> KroneckerBlock:
        """Inverse of (left + π√δ I) ⊗ (right + √δ/π I), π² the ratio of the factors' mean eigenvalues.

        Martens & Grosse 2015 (1503.05671), section 6.3.
        """
        means = [diagonal.mean(1) for diagonal in self._diagonals()]
        ratio = (means[0] / means[1]).sqrt()
        # a factor of zeros has no scale to share
        ratio = torch.where(torch.isfinite(ratio) & (ratio > 0), ratio, torch.ones_like(ratio))
        root = math.sqrt(damping)
        shifts = (root * ratio).clamp(min=min_damping), (root / ratio).clamp(min=min_damping)
        left, right = (_inverse(f, shift, label) for f, shift in zip((self.left, self.right), shifts, strict=True))
        return KroneckerBlock(left, right)

    def _matmul(self, x: Tensor) -> Tensor:
        groups, left, right, k = x.shape
        x = _times(self._left, x.reshape(groups, left, right * k)).mul_(self._scales[0]).view(groups, left, right, k)
        x = x.transpose(1, 2).reshape(groups, right, left * k)
        x = _times(self._right, x).mul_(self._scales[1])
        return x.view(groups, right, left, k).transpose(1, 2)

    def diagonal(self) -> Tensor:
        left, right = self._diagonals()
        return (left.unsqueeze(2) * right.unsqueeze(1)).flatten()

    def scaled(self, scalar: float) -> KroneckerBlock:
        return KroneckerBlock(self._left, self._right, (self._scales[0] * scalar, self._scales[1]))

    def dense(self) -> Tensor:
        left, right = (torch.diag_embed(f) if f.ndim == 2 else f for f in (self.left, self.right))
        return torch.block_diag(*(torch.kron(a, b) for a, b in zip(left.contiguous(), right.contiguous(), strict=True)))

    def trace(self) -> Tensor:
        left, right = self._diagonals()
        return (left.sum(1) * right.sum(1)).sum()

    def _diagonals(self) -> tuple[Tensor, Tensor]:
        return _diagonal(self._left) * self._scales[0], _diagonal(self._right) * self._scales[1]


class EigenBlock(Block):
    """(U_left ⊗ U_right) diag(values) (U_left ⊗ U_right)ᵀ for each group.

    Args:
        left: Orthonormal columns ``[groups, l, l]``; ``None`` for the identity.
        right: Likewise.
        values: ``[groups, l, r]``.
        singular: Whether an eigenvalue is known to be zero but for rounding.
    """

    def __init__(self, left: Tensor | None, right: Tensor | None, values: Tensor, singular: bool = False) -> None:
        self.left, self.right, self.values = left, right, values
        self._singular = singular
        self.shape = (values.shape[0], values.shape[1], values.shape[2])

    @property
    def tensors(self) -> dict[str, Tensor]:
        bases = {"left": self.left, "right": self.right}
        return {"values": self.values, **{name: basis for name, basis in bases.items() if basis is not None}}

    def frobenius_norm(self) -> Tensor:
        return torch.linalg.vector_norm(self.values)

    def eigen(self, label: str) -> EigenBlock:
        check_finite(self.values, label)
        return self

    @property
    def singular(self) -> bool:
        """Whether an eigenvalue is zero, or would be but for rounding."""
        if self.left is None and self.right is None:
            return not self.values.amin() > 0
        # in a basis with rounding errors, a zero shows as their square
        least = torch.finfo(self.dtype).eps ** 1.5 * self.values.amax()
        return self._singular or not self.values.amin() > least

    def with_values(self, values: Tensor) -> EigenBlock:
        """The same eigenvectors with other eigenvalues."""
        return EigenBlock(self.left, self.right, values)

    def eigenvectors(self, places: Tensor) -> Tensor:
        """Columns ``[size, K]``: the eigenvectors of the flattened eigenvalues at ``places``."""
        units = torch.zeros(self.size, len(places), dtype=self.dtype, device=self.values.device)
        units[places, torch.arange(len(places), device=places.device)] = 1.0
        return self.rotate(units)

    def rotate(self, columns: Tensor) -> Tensor:
        """The eigenbasis times columns ``[size, K]``."""
        groups, left, right = self.shape
        return self._rotate(columns.view(groups, left, right, -1), transposed=False).reshape(self.size, -1)

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


def _inverse(factor: Tensor, shift: Tensor, label: str) -> Tensor:
    """Inverse of a factor plus a multiple of the identity for each group."""
    values, vectors = eigh(factor, label)
    damped = values + shift[:, None]
    return 1.0 / damped if vectors is None else (vectors / damped.unsqueeze(1)) @ vectors.mT
