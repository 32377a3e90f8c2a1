"""Operators of low rank: outer products, and low rank plus diagonal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from curvops.context import in_own_precision
from curvops.lengths import dots, gram, power_of_two, size_of
from curvops.operators.damping import Damping, by_parameter, numbers, spread
from curvops.operators.diagonal import space_of
from curvops.operators.eigen import check_finite
from curvops.operators.linear_operator import LinearOperator
from curvops.operators.submatrix import restricted_name
from curvops.space import TensorSpace, Vector

LOST = 1e-3  # the largest relative error that rounding may leave in an inverse


class OuterProductOperator(LinearOperator):
    """Σ_k u_k v_kᵀ; with the u alone Σ_k u_k u_kᵀ, which is symmetric and positive semi-definite.

    Args:
        left: The u as one vector or columns, in any format of the space.
        right: The v; the u if not given.
        codomain: Space of the u; by default plain vectors, or a dict's own names.
        domain: Space of the v.

    Raises:
        TypeError, ValueError: If they do not fit their spaces or each other.

    Example:
        >>> import torch
        >>> from curvops import OuterProductOperator
        >>> OuterProductOperator(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0, -1.0])).to_dense()
        tensor([[ 1.,  0., -1.],
                [ 2.,  0., -2.]])
    """

    _at_hand = True

    def __init__(
        self,
        left: Vector,
        right: Vector | None = None,
        codomain: TensorSpace | None = None,
        domain: TensorSpace | None = None,
    ) -> None:
        codomain, self.left = _columns(left, codomain, "OuterProductOperator, left")
        if right is None:
            domain, self.right = codomain, self.left
        else:
            domain, self.right = _columns(right, domain, "OuterProductOperator, right")
        if self.left.shape[1] != self.right.shape[1]:
            raise ValueError(
                f"OuterProductOperator: expected as many vectors on both sides, got {self.left.shape[1]} and "
                f"{self.right.shape[1]}."
            )
        super().__init__(domain, codomain, psd=right is None)

    def _apply(self, columns: Tensor) -> Tensor:
        return self.left @ (self.right.T @ columns)

    def _apply_adjoint(self, columns: Tensor) -> Tensor:
        return self.right @ (self.left.T @ columns)

    def _exact_norm(self) -> Tensor:
        left, right = power_of_two(self.left), power_of_two(self.right)
        both = (gram(self.left / left) * gram(self.right / right)).sum().clamp(min=0).sqrt()
        return (both * left * right).to(self.dtype)

    def _exact_diagonal(self) -> Tensor:
        if self.shape[0] != self.shape[1]:
            raise ValueError(f"{self.name}: expected a square operator, got {self!r}.")
        return (self.left * self.right).sum(1)


class LowRankPlusDiagonalOperator(LinearOperator):
    """U diag(s) Uᵀ + diag(d), whose inverse and determinant take only matrices of U's number of columns (Woodbury).

    Args:
        columns: U, one vector or columns in any format of the space.
        diagonal: d, in the format of the space, or a number for all.
        weights: s ``[K]``; ones if not given.
        space: The space; by default plain vectors, or a dict's own names.
        psd: Whether the whole is known to be positive semi-definite; by default whether s and d have no negative entry.

    Raises:
        TypeError, ValueError: If the parts do not fit.

    Example:
        >>> import torch
        >>> from curvops import LowRankPlusDiagonalOperator
        >>> op = LowRankPlusDiagonalOperator(torch.ones(4, 1), 2.0)
        >>> op.trace(), op.inverse() @ torch.ones(4)  # 1 / 6
        (Estimate(12, exact), tensor([0.1667, 0.1667, 0.1667, 0.1667]))
    """

    _at_hand = True

    def __init__(
        self,
        columns: Vector,
        diagonal: Vector | float,
        weights: Tensor | None = None,
        space: TensorSpace | None = None,
        psd: bool | None = None,
    ) -> None:
        space, self.columns = _columns(columns, space, "LowRankPlusDiagonalOperator, columns")
        if isinstance(diagonal, (int, float)):
            d = torch.full((space.dim,), float(diagonal), dtype=space.dtype, device=space.device)
        else:
            d = _columns(diagonal, space, "LowRankPlusDiagonalOperator, diagonal")[1]
        rank = self.columns.shape[1]
        s = self.columns.new_ones(rank) if weights is None else weights.detach().clone()
        if d.numel() != space.dim or s.shape != (rank,) or s.dtype != space.dtype or s.device != space.device:
            raise ValueError(
                f"LowRankPlusDiagonalOperator: expected one diagonal and {rank} weights, {space.dtype} on {space.device}, "
                f"got a diagonal with {d.numel()} entries and weights {tuple(s.shape)}, {s.dtype} on {s.device}."
            )
        self._set(self.columns, d.reshape(-1), s, space, psd)

    @classmethod
    def _of(
        cls, columns: Tensor, diagonal: Tensor, weights: Tensor, space: TensorSpace, psd: bool | None
    ) -> LowRankPlusDiagonalOperator:
        """Of tensors that nobody changes; they may be of a higher precision than the space."""
        operator = cls.__new__(cls)
        operator._set(columns, diagonal, weights, space, psd)
        return operator

    def _set(self, columns: Tensor, diagonal: Tensor, weights: Tensor, space: TensorSpace, psd: bool | None) -> None:
        self.columns, self._diagonal, self.weights = columns, diagonal, weights
        positive = bool((weights >= 0).all() and (diagonal >= 0).all())
        super().__init__(space, symmetric=True, psd=positive if psd is None else psd)

    def _apply(self, columns: Tensor) -> Tensor:
        given = columns.to(self.columns.dtype)
        low = self.columns @ (self.weights[:, None] * (self.columns.T @ given))
        return (low + self._diagonal[:, None] * given).to(self.dtype)

    def _exact_diagonal(self) -> Tensor:
        return (self.columns.square() @ self.weights + self._diagonal).to(self.dtype)

    def _exact_norm(self) -> Tensor:
        # beside powers of two, for the squares of squares of small or large parts are no numbers
        c, w, d = (power_of_two(part.double()) for part in (self.columns, self.weights, self._diagonal))
        columns, weights, diagonal = self.columns / c, self.weights / w, self._diagonal / d
        scale = torch.maximum(c * w * c, d)
        low_scale, shift_scale = c / scale * w * c, d / scale
        low = (gram(columns).square() * weights.double()[:, None] * weights).sum()
        mixed = 2 * dots(columns.square() @ weights, diagonal)
        square = low_scale**2 * low + low_scale * shift_scale * mixed + (shift_scale * size_of(diagonal)).square()
        return (square.clamp(min=0).sqrt() * scale).to(self.dtype)

    def _exact_logdet(self, damping: Damping) -> Tensor:
        parts = self._capacitance(damping)
        if (parts.diagonal == 0).sum() > parts.columns.shape[1]:
            return self._diagonal.new_tensor(-math.inf, dtype=self.dtype)
        if parts.positive:
            stretch = torch.linalg.svdvals(parts.columns / parts.diagonal.sqrt()[:, None])
            return (parts.diagonal.log().sum() + stretch.square().log1p().sum()).to(self.dtype)
        inner, scales = parts.inner()
        values = torch.linalg.eigvalsh(inner.detach())
        zero = _zero(values)
        # Haynsworth 1968: the inertia of a matrix is that of a block and of its complement
        negative = (parts.diagonal < 0).sum() + (values[~zero] > 0).sum() - (parts.signs > 0).sum()
        if negative > 0:
            raise ValueError(f"{self.name}.logdet(): {int(negative)} eigenvalues are negative. Pass a larger damping.")
        if zero.any():
            self._expect_seen(scales.square(), "logdet")
            return self._diagonal.new_tensor(-math.inf, dtype=self.dtype)
        whole = parts.diagonal.abs().log().sum() + 2 * scales.log().sum()
        return (whole + torch.linalg.slogdet(inner)[1]).to(self.dtype)

    @in_own_precision
    def inverse(self, damping: Damping = 0.0) -> LowRankPlusDiagonalOperator:  # type: ignore[override]  # it has no options
        """The inverse of the matrix plus ``damping`` times the identity, of the same rank, its parts in double precision.

        Raises:
            TypeError: If a damping is no number, or requires a gradient.
            ValueError: If it is singular, or so nearly that rounding hides it; or if the diagonal with the damping has a zero.
        """
        parts = self._capacitance(numbers(damping, self.domain))
        if parts.positive:
            root = parts.diagonal.sqrt()[:, None]
            left, stretch, _ = torch.linalg.svd(parts.columns / root, full_matrices=False)
            columns = left / root
            values = 1 / (1 + stretch.square())
            if len(stretch) == len(root):
                # the columns span the space: as much of the diagonal is left as cancels nothing
                diagonal, weights = values.min() / parts.diagonal, values - values.min()
            else:
                self._expect_seen(stretch.square(), "inverse")
                diagonal, weights = 1 / parts.diagonal, -1 / (1 + stretch.square().reciprocal())
        else:
            inner, scales = parts.inner()
            values, basis = torch.linalg.eigh(inner)
            if _zero(values).any():
                raise ValueError(f"{self.name}.inverse(): the matrix is singular. Pass a positive damping.")
            columns, weights = (parts.columns / parts.diagonal[:, None] / scales) @ basis, -1 / values
            diagonal = 1 / parts.diagonal
            self._expect_exact(parts, columns, weights)
        # in a lower precision what cancels between them would be lost
        return self._of(columns, diagonal, weights, self.domain, self.psd)

    def _expect_exact(self, parts: _Capacitance, columns: Tensor, weights: Tensor) -> None:
        """A ValueError where the terms of the inverse cancel so much, or are so large, that rounding is seen in it."""
        sizes = parts.diagonal.abs()[:, None]
        growth = (1 + (parts.columns.square() / sizes).sum()) * (1 + (columns.square() * sizes * weights.abs()).sum())
        if not growth < LOST / torch.finfo(columns.dtype).eps:
            raise ValueError(
                f"{self.name}.inverse(): the matrix is singular but for rounding, or its parts cancel: errors grow {float(growth):.1e}-fold. "
                "Pass a damping that makes it positive definite, or take another solver, op.solve(b, solver='minres')."
            )

    def _expect_seen(self, ratios: Tensor, method: str) -> None:
        """A ValueError where the columns are so large beside the diagonal that it is lost in rounding."""
        if len(ratios) and not ratios.max() < min(
            0.1 / torch.finfo(self.dtype).eps, LOST / torch.finfo(ratios.dtype).eps
        ):
            raise ValueError(
                f"{self.name}.{method}(): the columns are {float(ratios.max()):.1e} times as large as the diagonal, which {self.dtype} "
                "does not hold. Pass a larger damping, or double precision."
            )

    def _exact_inverse(self, damping: Damping) -> LinearOperator:
        return self.inverse(damping)

    def _scaled(self, factor: float) -> LinearOperator:
        weights, diagonal = factor * self.weights, factor * self._diagonal
        psd = self.psd if factor >= 0 else None
        return self._of(self.columns, diagonal, weights, self.domain, psd)

    def _shifted(self, damping: Mapping[str, float]) -> LinearOperator:
        diagonal = self._diagonal + spread(damping, self.domain)
        psd = self.psd or None
        return self._of(self.columns, diagonal, self.weights, self.domain, psd)

    def _restricted(self, rows: TensorSpace, columns: TensorSpace) -> LinearOperator:
        if rows != columns:
            return super()._restricted(rows, columns)
        where = self.domain.positions(rows.names)
        part = self._of(self.columns[where], self._diagonal[where], self.weights, rows, self.psd or None)
        part._name = restricted_name(self, rows, columns)
        return part

    def _capacitance(self, damping: Damping) -> _Capacitance:
        wide = torch.float64  # the small matrix tells what is left of numbers that cancel
        diagonal = (self._diagonal + spread(by_parameter(damping, self.domain), self.domain)).to(wide)
        used = self.weights != 0
        weights = self.weights[used].to(wide)
        columns = self.columns[:, used].to(wide) * weights.abs().sqrt()
        for part in (columns, diagonal.detach()):
            check_finite(part, self.name)
        if (diagonal == 0).any() and (diagonal == 0).sum() <= columns.shape[1]:
            raise ValueError(
                f"{self.name}: expected a diagonal without zeros, where the rank reaches their number. "
                "Pass a positive damping."
            )
        return _Capacitance(columns, weights.sign(), diagonal)


class _Capacitance(NamedTuple):
    """V J Vᵀ + D with signs J, whose inverse and determinant are those of the small J + Vᵀ D⁻¹ V."""

    columns: Tensor
    signs: Tensor
    diagonal: Tensor

    @property
    def positive(self) -> bool:
        """Whether both are positive: then it has an inverse, however large one of them is beside the other."""
        return bool((self.diagonal > 0).all() and (self.signs > 0).all())

    def inner(self) -> tuple[Tensor, Tensor]:
        """The small matrix divided by scales on both sides, so that columns of all sizes count alike, and the scales."""
        product = self.columns.T @ (self.columns / self.diagonal[:, None])
        scales = (1 + product.detach().diagonal().abs()).sqrt()
        return (self.signs.diag() + product) / scales[:, None] / scales, scales


def _zero(values: Tensor) -> Tensor:
    """Which eigenvalues are zero, but for rounding, or no numbers."""
    return ~(values.abs() > torch.finfo(values.dtype).eps * values.abs().amax()) if len(values) else values > 0


def _columns(vector: Vector, space: TensorSpace | None, what: str) -> tuple[TensorSpace, Tensor]:
    if space is None:
        space = space_of(vector)
    # a copy: the caller may change the tensor, and what is known of the operator would not change with it
    return space, space.to_columns(vector, what)[0].detach().clone()
