"""Operators without parameters' names, as the peer makes them from shapes and tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from curvops.operators import submatrix
from curvops.operators.damping import Damping
from curvops.operators.diagonal import DiagonalOperator, IdentityOperator
from curvops.operators.linear_operator import LinearOperator
from curvops.operators.low_rank import LowRankPlusDiagonalOperator
from curvops.space import TensorSpace

Shapes = Sequence[Sequence[int]]


class UnnamedSpace(TensorSpace):
    """A space of tensors without names: it equals any of the same shapes, dtypes and device."""

    def __init__(self, shapes: Shapes, device: torch.device, dtype: torch.dtype) -> None:
        scalar = torch.empty((), device=device, dtype=dtype)
        super().__init__({f"tensor {k}": scalar.expand(*shape) for k, shape in enumerate(shapes)})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TensorSpace) and _signature(self) == _signature(other)

    def __hash__(self) -> int:
        return hash(_signature(self))


def _signature(space: TensorSpace) -> tuple[object, ...]:
    return tuple(space.shapes.values()), tuple(space.dtypes.values()), space.device


class TensorLinearOperator(LinearOperator):
    """A dense matrix."""

    def __init__(self, A: Tensor) -> None:
        if A.ndim != 2:
            raise ValueError(f"expected a matrix, got shape {tuple(A.shape)}.")
        spaces = [UnnamedSpace([(size,)], A.device, A.dtype) for size in A.shape]
        symmetric = A.shape[0] == A.shape[1] and torch.allclose(A, A.T)
        super().__init__(spaces[1], spaces[0], symmetric=symmetric)
        self.matrix = A

    def _apply(self, columns: Tensor) -> Tensor:
        return self.matrix @ columns

    def _apply_adjoint(self, columns: Tensor) -> Tensor:
        return self.matrix.T @ columns

    def _dense(self) -> Tensor:
        return self.matrix

    def _exact_diagonal(self) -> Tensor:
        return self.matrix.diagonal()

    def _exact_norm(self) -> Tensor:
        return torch.linalg.matrix_norm(self.matrix)

    def _exact_logdet(self, damping: Damping) -> Tensor | None:
        return self.matrix.logdet() if isinstance(damping, float) and damping == 0 else None

    def det(self) -> Tensor:
        """The determinant, a scalar tensor."""
        return self.matrix.det()


class IdentityLinearOperator(IdentityOperator):
    """The identity on tensors of some shapes."""

    def __init__(self, shape: Shapes, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(UnnamedSpace(shape, device, dtype))


class DiagonalLinearOperator(DiagonalOperator):
    """A diagonal matrix, given as a list of tensors."""

    def __init__(self, diagonal: Sequence[Tensor]) -> None:
        space = UnnamedSpace([d.shape for d in diagonal], diagonal[0].device, diagonal[0].dtype)
        super().__init__(list(diagonal), space)


class OuterProductLinearOperator(LowRankPlusDiagonalOperator):
    """Σ_k c_k a_k a_kᵀ, the a_k columns of a matrix ``[D, K]``."""

    def __init__(self, c: Any, A: Any) -> None:
        columns = torch.as_tensor(A, device=getattr(A, "device", "cpu"))
        space = UnnamedSpace([(len(columns),)], columns.device, columns.dtype)
        super().__init__(columns, 0.0, torch.as_tensor(c, device=columns.device), space)


class SubmatrixLinearOperator(submatrix.SubmatrixLinearOperator):
    """`curvops.SubmatrixLinearOperator` with rows and columns that can be set anew."""

    def __init__(self, A: LinearOperator, row_idxs: Sequence[int], col_idxs: Sequence[int]) -> None:
        self._choose(A, row_idxs, col_idxs)

    def set_submatrix(self, row_idxs: Sequence[int], col_idxs: Sequence[int]) -> None:
        """Choose other rows and columns."""
        self._choose(self.operator, row_idxs, col_idxs)

    def _choose(self, A: LinearOperator, *chosen: Sequence[int]) -> None:
        for places, dim in zip(chosen, A.shape, strict=True):
            if not all(isinstance(k, int) and 0 <= k < dim for k in places) or len(set(places)) < len(places):
                raise ValueError(f"expected different numbers from 0 to {dim - 1}, got {list(places)[:10]}.")
        super().__init__(A, *chosen)
