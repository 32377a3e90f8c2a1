"""The output factor S of a batch: the one thing that tells GGN and Fishers apart."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Factor(ABC):
    """Columns s of the output factor: for each loss term t a matrix S_t of shape `[C, K]`.

    What a Gauss-Newton or Fisher matrix needs of the loss is `S_t S_tᵀ` (weights included, the constant of the
    reduction not).

    Attributes:
        num_terms: T.
        width: Entries of a term's vector, C.
        num_columns: K.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from curvops.losses import output_loss
        >>> z, y = torch.zeros(4, 2), torch.tensor([0, 1, 1, 0])
        >>> S = output_loss(nn.CrossEntropyLoss()).curvature(z, y, 4).factor("type-2")
        >>> S.num_columns, S.column(0).shape
        (2, torch.Size([4, 2]))
        >>> S.product(torch.tensor([[1.0, 0.0]]).expand(4, 2))[0]
        tensor([ 0.2500, -0.2500])
    """

    def __init__(self, num_terms: int, width: int, num_columns: int) -> None:
        self.num_terms = num_terms
        self.width = width
        self.num_columns = num_columns

    def column(self, k: int) -> Tensor:
        """Column k of every term's factor, `[T, C]`; an IndexError if there is none."""
        if not 0 <= k < self.num_columns:
            raise IndexError(f"'Factor.column': expected 0 <= k < {self.num_columns}, got {k}.")
        return self._column(k)

    def product(self, rows: Tensor) -> Tensor:
        """Each term's vector, rows `[T, C]`, times `S_t S_tᵀ`; a ValueError for any other shape."""
        expected = (self.num_terms, self.width)
        if rows.shape != expected:
            raise ValueError(
                f"'Factor.product': expected rows of shape {expected}, got {tuple(rows.shape)}. "
                "Bring an output-shaped tensor into rows with 'OutputCurvature.rows'."
            )
        return self._product(rows)

    def dense(self) -> Tensor:
        """All columns as one tensor `[T, C, K]`, however large."""
        return torch.stack([self._column(k) for k in range(self.num_columns)], -1)

    @abstractmethod
    def _column(self, k: int) -> Tensor: ...

    @abstractmethod
    def _product(self, rows: Tensor) -> Tensor: ...


class StackedFactor(Factor):
    """A factor whose columns are held in one tensor `[T, C, K]`."""

    def __init__(self, columns: Tensor) -> None:
        super().__init__(*columns.shape)
        self._columns = columns

    def dense(self) -> Tensor:
        return self._columns

    def _column(self, k: int) -> Tensor:
        return self._columns[..., k]

    def _product(self, rows: Tensor) -> Tensor:
        result = torch.zeros_like(rows)
        for column in self._columns.unbind(-1):
            result = result + column * (column * rows).sum(-1, keepdim=True)
        return result


class DiagonalFactor(Factor):
    """C columns with one entry each, √h_k e_k, for a diagonal output Hessian h, `[T, C]`."""

    def __init__(self, curvature: Tensor) -> None:
        super().__init__(len(curvature), curvature.shape[1], curvature.shape[1])
        self._curvature = curvature

    def _column(self, k: int) -> Tensor:
        column = self._curvature.new_zeros(self.num_terms, self.width)
        column[:, k] = self._curvature[:, k].sqrt()
        return column

    def _product(self, rows: Tensor) -> Tensor:
        return self._curvature * rows
