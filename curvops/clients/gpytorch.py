"""Our operators as matrices of `linear_operator`, the library that GPyTorch computes with. Needs the extra `gpytorch`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvops.extras import extra
from curvops.operators.linear_operator import LinearOperator

Matrix: Any = extra("linear_operator", "curvops.clients.gpytorch").LinearOperator


class CurvopsLinearOperator(Matrix):
    """A batch of copies of an operator, as a ``linear_operator.LinearOperator``; `to_linear_operator` makes one.

    Args:
        operator: The operator, of which products, the diagonal and the matrix are taken.
        batch: Axes of the batch, which that library gives a matrix to combine it with others.
    """

    def __init__(self, *, operator: LinearOperator, batch: tuple[int, ...] = ()) -> None:
        super().__init__(operator=operator, batch=batch)
        self._operator, self._batch = operator, batch

    dtype = property(lambda self: self._operator.dtype)
    device = property(lambda self: self._operator.device)

    def _size(self) -> torch.Size:
        return torch.Size((*self._batch, *self._operator.shape))

    def _matmul(self, rhs: Tensor) -> Tensor:
        """Products with ``[columns]`` or ``[*batch, columns, K]``, each taken once, as the copies are equal."""
        if rhs.ndim == 1:
            return self._copies(self._operator @ rhs, 1)
        columns = rhs.movedim(-2, 0)
        product = self._operator @ columns.reshape(len(columns), -1)
        return self._copies(product.reshape(-1, *columns.shape[1:]).movedim(0, -2), 2)

    def _copies(self, one: Tensor, own: int) -> Tensor:
        axes = one.ndim - own
        return one.expand(*torch.broadcast_shapes(one.shape[:axes], self._batch), *one.shape[axes:])

    def _transpose_nonbatch(self) -> CurvopsLinearOperator:
        return CurvopsLinearOperator(operator=self._operator.adjoint(), batch=self._batch)

    def _unsqueeze_batch(self, dim: int) -> CurvopsLinearOperator:
        return self._expand_batch((*self._batch[:dim], 1, *self._batch[dim:]))

    def _permute_batch(self, *dims: int) -> CurvopsLinearOperator:
        return self._expand_batch([self._batch[dim] for dim in dims])

    def _expand_batch(self, batch_shape: Any) -> CurvopsLinearOperator:
        return CurvopsLinearOperator(operator=self._operator, batch=tuple(batch_shape))

    def _getitem(self, row_index: Any, col_index: Any, *batch_indices: Any) -> Any:
        chosen = torch.empty(self._batch, device="meta")[batch_indices]
        part = self._expand_batch(chosen.shape)
        return Matrix._getitem(part, row_index, col_index, *[slice(None)] * chosen.ndim)

    def _diagonal(self) -> Tensor:
        """Exact: from the structure, or from as many products as there are columns."""
        exact = self._operator.diagonal(num_products=self._operator.shape[1])
        return self._copies(exact.as_subclass(Tensor), 1)

    def to_dense(self) -> Tensor:
        """The matrix ``[*batch, rows, columns]``."""
        return self._copies(self._operator.to_dense(), 2)


def to_linear_operator(operator: LinearOperator) -> CurvopsLinearOperator:
    """An operator as a matrix of ``linear_operator``: for its sums and products with others, solutions, samples, ….

    They are that library's algorithms, on our products and with its settings: Cholesky up to 800 rows, beyond it conjugate
    gradients to a loose tolerance and an estimate of the log-determinant. Many take the matrix to be positive definite
    without a check. It keeps what it has computed of a matrix: make a new one when the model has changed. Derivatives are those in the
    vectors, not in the model's parameters; dtype and device stay the model's, whatever ``to()`` or ``float()`` is asked.

    Args:
        operator: Any operator of ours; where many products are taken, within ``with operator.linearized():``.

    Raises:
        TypeError: If it is none.

    Example:
        >>> import torch
        >>> from curvops import DiagonalOperator
        >>> from curvops.clients.gpytorch import to_linear_operator
        >>> matrix = to_linear_operator(DiagonalOperator(torch.tensor([1.0, 4.0])))
        >>> matrix.solve(torch.ones(2)), matrix.add_jitter(1.0).to_dense().diagonal()
        (tensor([1.0000, 0.2500]), tensor([2., 5.]))
    """
    if not isinstance(operator, LinearOperator):
        raise TypeError(f"to_linear_operator: expected an operator of curvops, got {type(operator).__name__}.")
    return CurvopsLinearOperator(operator=operator)
