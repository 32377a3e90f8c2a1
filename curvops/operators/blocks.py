"""Symmetric blocks with structure: Kronecker products, scaled and shifted ones, and the same in an eigenbasis."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from curvops.lengths import lengths, power_of_two, size_of
from curvops.operators.eigen import check_finite, eigh, within_rounding

Decomposed = tuple[Tensor, Tensor | None]  # eigenvalues and eigenvectors of a factor


class _Block:
    """A symmetric matrix of ``groups`` diagonal blocks of size ``left · right`` each, and the tensors that it is made of."""

    def __init__(self, shape: tuple[int, ...], tensors: dict[str, Tensor]) -> None:
        groups, left, right = shape
        self.shape, self.tensors = (groups, left, right), tensors
        self.size = groups * left * right
        self.dtype = next(iter(tensors.values())).dtype

    @property
    def memory(self) -> int:
        return sum(t.numel() * t.itemsize for t in self.tensors.values())


class KroneckerBlock(_Block):
    """left ⊗ right for each group, of factors ``[groups, n, n]``, or ``[groups, n]`` for the diagonal of a diagonal one.

    With ``right`` a one, this is a dense matrix or a diagonal. The factors are to be multiplied by ``scales``; they may
    be large and are not copied for it (but by `left` and `right`).
    """

    shift = 0.0

    def __init__(self, left: Tensor, right: Tensor, scales: tuple[float, float] = (1.0, 1.0)) -> None:
        super().__init__((*left.shape[:2], right.shape[1]), {"left": left, "right": right})
        self._left, self._right, self._scales = left, right, scales
        self._eigen: EigenBlock | None = None
        #: factors and their eigendecompositions; blocks that hold the same factors share them
        self.decomposed: list[tuple[Tensor, Decomposed]] = []

    @property
    def left(self) -> Tensor:
        return self._left if self._scales[0] == 1.0 else self._left * self._scales[0]

    @property
    def right(self) -> Tensor:
        return self._right if self._scales[1] == 1.0 else self._right * self._scales[1]

    def eigen(self, label: str) -> EigenBlock:
        """The block in its eigenbasis, decomposed once; ``label`` names it in errors."""
        if self._eigen is None:
            left, left_basis = self._decompose(self._left, label)
            right, right_basis = self._decompose(self._right, label)
            values = (left * self._scales[0]).unsqueeze(2) * (right * self._scales[1]).unsqueeze(1)
            factors = ((left, left_basis), (right, right_basis))
            self._eigen = EigenBlock(left_basis, right_basis, values, factors)
        return self._eigen

    def undecomposed(self) -> list[Tensor]:
        """The factors whose eigendecompositions are not known yet."""
        if self._eigen is not None:
            return []
        return [f for f in (self._left, self._right) if all(f is not own for own, _ in self.decomposed)]

    def _decompose(self, factor: Tensor, label: str) -> Decomposed:
        for known, found in self.decomposed:
            if known is factor:
                return found
        self.decomposed.append((factor, eigh(factor, label)))
        return self.decomposed[-1][1]

    def inverse(self, damping: float, min_damping: float, label: str) -> KroneckerBlock | None:
        """Inverse of (left + π√δ I) ⊗ (right + √δ/π I), π² the ratio of the factors' mean eigenvalues.

        Martens & Grosse 2015 (1503.05671), section 6.3. A single matrix (``right`` a number) gets + δ I. ``None`` where
        nothing is damped and it takes the eigenvalues to tell whether there is an inverse.
        """
        if self.shape[2] == 1:
            left = self._left * self._right.view(-1, *[1] * (self._left.ndim - 1))
            shifts = [max(damping, min_damping)] * len(left)
            found = _inverse(left, math.prod(self._scales), shifts, label)
            return None if found is None else KroneckerBlock(found, torch.ones_like(self._right))
        ratios, root = [], math.sqrt(damping)
        means = (_diagonal(factor).mean(1).tolist() for factor in (self._left, self._right))
        for left_mean, right_mean in zip(*means, strict=True):
            left_mean, right_mean = left_mean * self._scales[0], right_mean * self._scales[1]
            ratio = left_mean / right_mean if right_mean > 0 else 0.0
            # a factor of zeros has no scale to share
            ratios.append(math.sqrt(ratio) if 0 < ratio < math.inf else 1.0)
        first = _inverse(self._left, self._scales[0], [max(root * r, min_damping) for r in ratios], label)
        if first is None:
            return None
        second = _inverse(self._right, self._scales[1], [max(root / r, min_damping) for r in ratios], label)
        return None if second is None else KroneckerBlock(first, second)

    def matmul(self, columns: Tensor) -> Tensor:
        a, b = self._scales
        product = _kron(columns if a == 1.0 else columns * a, self.shape, self._left, self._right)
        return product if b == 1.0 else product.mul_(b)

    def diagonal(self) -> Tensor:
        left, right = self._diagonals()
        return (left.unsqueeze(2) * right.unsqueeze(1)).flatten()

    def dense(self) -> Tensor:
        left, right = (torch.diag_embed(f) if f.ndim == 2 else f for f in (self.left, self.right))
        return torch.block_diag(*(torch.kron(a, b) for a, b in zip(left.contiguous(), right.contiguous(), strict=True)))

    def frobenius_norm(self) -> Tensor:
        """In double precision."""
        left, right = (_norm(f) * scale for f, scale in zip((self._left, self._right), self._scales, strict=True))
        return size_of(left * right)

    def affine(self, factor: float, shift: float) -> AffineBlock:
        """``factor`` times the block plus ``shift`` times the identity."""
        return AffineBlock(self, factor, shift)

    @property
    def is_diagonal(self) -> bool:
        return self._left.ndim == 2 and (self._right.ndim == 2 or self._right.shape[1] == 1)

    def _diagonals(self) -> tuple[Tensor, Tensor]:
        return _diagonal(self._left) * self._scales[0], _diagonal(self._right) * self._scales[1]


class EigenBlock(_Block):
    """(U_left ⊗ U_right) diag(values) (U_left ⊗ U_right)ᵀ for each group.

    The bases ``left`` and ``right`` have orthonormal columns ``[groups, n, n]`` (``None`` for the identity), ``values``
    is ``[groups, l, r]``; where they are products of those of ``factors``, these tell which are zero but for rounding.
    """

    def __init__(
        self, left: Tensor | None, right: Tensor | None, values: Tensor, factors: tuple[Decomposed, ...] = ()
    ) -> None:
        tensors = {"values": values, "left": left, "right": right}
        super().__init__(values.shape, {name: t for name, t in tensors.items() if t is not None})
        self.left, self.right, self.values, self._factors = left, right, values, factors

    def eigen(self, label: str) -> EigenBlock:
        check_finite(self.values, label)
        return self

    def affine(self, factor: float, shift: float) -> EigenBlock:
        """``factor`` times the block plus ``shift`` times the identity."""
        return EigenBlock(self.left, self.right, self.values * factor + shift, self._factors if shift == 0 else ())

    @property
    def is_diagonal(self) -> bool:
        return self.left is None and self.right is None

    @property
    def singular(self) -> bool:
        """Whether an eigenvalue is zero, or would be but for rounding."""
        if self.is_diagonal:
            return not self.values.abs().amin() > 0
        # in a basis with rounding errors, a zero shows as their square
        least = torch.finfo(self.dtype).eps ** 1.5 * self.values.amax()
        zero = any(bool(within_rounding(values, basis).any()) for values, basis in self._factors)
        return zero or not self.values.amin() > least

    def rotate(self, columns: Tensor, transposed: bool = False) -> Tensor:
        """The eigenbasis (or its transpose) times columns ``[size, K]``."""
        left, right = (b if b is None or not transposed else b.mT for b in (self.left, self.right))
        return _kron(columns, self.shape, left, right)

    def matmul(self, columns: Tensor) -> Tensor:
        return self.rotate(self.rotate(columns, transposed=True) * self.values.reshape(-1, 1))

    def diagonal(self) -> Tensor:
        values = self.values if self.left is None else self.left.square() @ self.values
        return (values if self.right is None else values @ self.right.square().mT).flatten()

    def dense(self) -> Tensor:
        return self.matmul(torch.eye(self.size, dtype=self.dtype, device=self.values.device))

    def frobenius_norm(self) -> Tensor:
        return size_of(self.values)


class AffineBlock(_Block):
    """A Kronecker product times a number, ≥ 0 but for diagonal ones, plus a number ≥ 0 times the identity.

    It shares the product's eigenbasis.
    """

    def __init__(self, block: KroneckerBlock, factor: float, shift: float) -> None:
        super().__init__(block.shape, block.tensors)
        self._block, self._factor, self.shift = block, factor, shift

    def affine(self, factor: float, shift: float) -> AffineBlock:
        return AffineBlock(self._block, factor * self._factor, factor * self.shift + shift)

    @property
    def is_diagonal(self) -> bool:
        return self._block.is_diagonal

    def eigen(self, label: str) -> EigenBlock:
        return self._block.eigen(label).affine(self._factor, self.shift)

    def inverse(self, damping: float, min_damping: float, label: str) -> KroneckerBlock | None:
        """As of the product, whose left factor takes the number; the damping and the shift are one."""
        block = self._block
        scaled = KroneckerBlock(block._left, block._right, (self._factor * block._scales[0], block._scales[1]))
        return scaled.inverse(self.shift + damping, min_damping, label)

    def matmul(self, columns: Tensor) -> Tensor:
        return self._block.matmul(columns).mul_(self._factor).add_(columns, alpha=self.shift)

    def diagonal(self) -> Tensor:
        return self._block.diagonal() * self._factor + self.shift

    def dense(self) -> Tensor:
        dense = self._block.dense() * self._factor
        dense.diagonal().add_(self.shift)
        return dense

    def frobenius_norm(self) -> Tensor:
        if self.is_diagonal:
            return size_of(self.diagonal())
        norm, trace = (
            self._factor * each for each in (self._block.frobenius_norm(), self._block.diagonal().double().sum())
        )
        scale = power_of_two(
            torch.stack([norm, norm.new_tensor(self.shift)])
        )  # squares of small or large ones are no numbers
        shift = self.shift / scale
        return ((norm / scale).square() + 2 * shift * (trace / scale) + self.size * shift.square()).sqrt() * scale


Block = KroneckerBlock | EigenBlock | AffineBlock


def _kron(columns: Tensor, shape: tuple[int, int, int], left: Tensor | None, right: Tensor | None) -> Tensor:
    """left ⊗ right times columns ``[size, K]``; ``None`` for the identity."""
    (groups, a, b), k = shape, columns.shape[1]
    x = _times(left, columns.reshape(groups, a, b * k))
    if right is not None and b == 1:
        x = x * right.view(groups, 1, 1)
    elif right is not None:
        # the columns of one vector are there as they lie, those of several must be brought together
        x = x.view(groups, a, b, k).transpose(1, 2).reshape(groups, b, a * k) if k != 1 else x.view(groups, a, b).mT
        x = _times(right, x)
        x = x.view(groups, b, a, k).transpose(1, 2) if k != 1 else x.mT
    return x.reshape(columns.shape)


def _times(factor: Tensor | None, x: Tensor) -> Tensor:
    if factor is None:
        return x
    return factor.unsqueeze(-1) * x if factor.ndim == 2 else torch.bmm(factor, x)


def _diagonal(factor: Tensor) -> Tensor:
    return factor if factor.ndim == 2 else factor.diagonal(dim1=1, dim2=2)


def _norm(factor: Tensor) -> Tensor:
    return lengths(factor.flatten(1).mT)


def _inverse(factor: Tensor, scale: float, shifts: list[float], label: str) -> Tensor | None:
    """Inverse of ``scale`` times a psd factor, plus a shift of each group; ``None`` if not surely there without a shift."""
    damped, eps = factor * scale, torch.finfo(factor.dtype).eps
    shift = shifts[0] if len(shifts) == 1 else damped.new_tensor(shifts).unsqueeze(1)
    _diagonal(damped).add_(shift)
    if factor.ndim == 2:
        if damped.amin() > 0 and damped.isfinite().all() and factor.amin() * scale >= 0:
            return 1.0 / damped
    else:
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not any(failed.tolist()):
            inverse = torch.cholesky_inverse(lower)
            known = zip(shifts, _norm(factor).tolist(), _norm(inverse).tolist(), strict=True)
            # the root of n as in `within_rounding`, so that what has an inverse here has a determinant there
            if all(
                0 < size < math.inf and (added or 1.0 / (size * factor.shape[1] ** 0.5)) > 4 * eps * scale * norm
                for added, norm, size in known
            ):
                return inverse
    check_finite(factor, label)
    if not min(shifts) > 0:
        return None
    # as large as the shift is what rounding made of a zero: take it for one
    values, vectors = eigh(factor, label)
    inverted = 1.0 / (values * scale + shift)
    return inverted if vectors is None else (vectors * inverted.unsqueeze(1)) @ vectors.mT
