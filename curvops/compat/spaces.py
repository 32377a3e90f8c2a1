"""Operators without parameters' names, as the peer makes them from shapes and tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from curvops.operators.linear_operator import LinearOperator
from curvops.space import TensorSpace


class UnnamedSpace(TensorSpace):
    """A space of tensors without names: it equals any of the same shapes, dtypes and device."""

    def __init__(self, shapes: Sequence[Sequence[int]], device: torch.device, dtype: torch.dtype) -> None:
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

    def trace(self) -> Tensor:
        """The trace, a scalar tensor."""
        return self.matrix.trace()

    def det(self) -> Tensor:
        """The determinant, a scalar tensor."""
        return self.matrix.det()

    def logdet(self) -> Tensor:
        """The logarithm of the determinant, a scalar tensor."""
        return self.matrix.logdet()

    def frobenius_norm(self) -> Tensor:
        """The Frobenius norm, a scalar tensor."""
        return torch.linalg.matrix_norm(self.matrix)


class Reordered(LinearOperator):
    """Entries of a vector in another order."""

    def __init__(self, space: TensorSpace, places: Tensor) -> None:
        super().__init__(space, UnnamedSpace([(space.dim,)], space.device, space.dtype))
        self.places = places

    def _apply(self, columns: Tensor) -> Tensor:
        return columns[self.places]

    def _apply_adjoint(self, columns: Tensor) -> Tensor:
        return columns[self.places.argsort()]
