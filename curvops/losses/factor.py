"""The output factor S of a batch: the one thing that tells GGN and Fishers apart."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factor:
    """The output factor: for each of T loss terms a matrix S_t of shape `[C, K]`.

    What a Gauss-Newton or Fisher matrix needs of the loss is `S_t S_tᵀ` (weights included, the constant of the
    reduction not).
    """

    num_terms: int  # T
    width: int  # entries of a term's vector, C
    num_columns: int  # K
    _column: Callable[[int], Tensor]
    _product: Callable[[Tensor], Tensor]
    _columns: Tensor | None = None

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
        if self._columns is not None:
            return self._columns
        return torch.stack([self._column(k) for k in range(self.num_columns)], -1)


def stacked(columns: Tensor) -> Factor:
    """The factor of columns that are held in one tensor `[T, C, K]`."""

    def product(rows: Tensor) -> Tensor:
        result = torch.zeros_like(rows)
        for column in columns.unbind(-1):
            result = result + column * (column * rows).sum(-1, keepdim=True)
        return result

    num_terms, width, num_columns = columns.shape
    return Factor(num_terms, width, num_columns, lambda k: columns[..., k], product, columns)
