"""Rows and columns of an operator, by their numbers or by the parameters that they belong to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from curvops.operators.linear_operator import LinearOperator
from curvops.space import TensorSpace, describe

Index: TypeAlias = slice | Tensor | Sequence[int]


class SubmatrixLinearOperator(LinearOperator):
    """Some rows and columns of an operator, ``A[rows][:, columns]``, as an operator on plain vectors.

    A product pads the vector with zeros, takes one product with ``A`` and selects its rows. For the blocks of
    parameters, ``A["layer1.*"]`` computes less where it can.

    Args:
        operator: A.
        rows: Numbers of the rows (a list, a tensor, a slice or a mask), in any order, repeated or not.
        columns: Numbers of the columns; the rows' if not given.

    Raises:
        IndexError: If there is no row or column of a number.

    Example:
        >>> import torch
        >>> from curvops import DiagonalOperator, SubmatrixLinearOperator
        >>> SubmatrixLinearOperator(DiagonalOperator(torch.arange(4.0)), [3, 1], slice(1, 4)).to_dense()
        tensor([[0., 0., 3.],
                [1., 0., 0.]])
    """

    def __init__(self, operator: LinearOperator, rows: Index, columns: Index | None = None) -> None:
        if not isinstance(operator, LinearOperator):
            raise TypeError(f"SubmatrixLinearOperator: expected a LinearOperator, got {type(operator).__name__}.")
        row_places = _places(rows, operator.codomain, f"{operator.name}, rows")
        column_places = _places(rows if columns is None else columns, operator.domain, f"{operator.name}, columns")
        places = row_places, column_places
        codomain, domain = (
            TensorSpace.flat(len(some), space.dtype, space.device)
            for some, space in zip(places, (operator.codomain, operator.domain), strict=True)
        )
        self._set(operator, places, (domain, codomain), f"{operator.name}[{len(row_places)} rows]")

    @classmethod
    def of(cls, operator: LinearOperator, rows: TensorSpace, columns: TensorSpace) -> SubmatrixLinearOperator:
        """The rows and columns of some parameters: subspaces of the codomain and of the domain."""
        places = _range(operator.codomain, rows), _range(operator.domain, columns)
        submatrix = cls.__new__(cls)
        submatrix._set(operator, places, (columns, rows), restricted_name(operator, rows, columns))
        return submatrix

    def _set(
        self,
        operator: LinearOperator,
        places: tuple[slice | Tensor, slice | Tensor],
        spaces: tuple[TensorSpace, TensorSpace],
        name: str,
    ) -> None:
        principal = operator.domain == operator.codomain and _same(*places)
        super().__init__(*spaces, symmetric=operator.symmetric and principal, psd=operator.psd and principal)
        self.operator, self._parts, self._name = operator, (operator,), name
        self._rows, self._columns = places

    def _apply(self, columns: Tensor) -> Tensor:
        return self.operator._apply(_padded(columns, self._columns, self.operator.domain.dim))[self._rows].clone()

    def _apply_adjoint(self, columns: Tensor) -> Tensor:
        padded = _padded(columns, self._rows, self.operator.codomain.dim)
        return self.operator._apply_adjoint(padded)[self._columns].clone()

    def _dense(self) -> Tensor:
        if self.operator.symmetric and self.codomain.dim < self.domain.dim:
            return self._apply_adjoint(torch.eye(self.codomain.dim, dtype=self.dtype, device=self.device)).T
        return super()._dense()


def restricted_name(operator: LinearOperator, rows: TensorSpace, columns: TensorSpace) -> str:
    """What the rows and columns of some parameters are called in messages."""
    sides = [describe(rows.names)] if rows == columns else [describe(rows.names), describe(columns.names)]
    return f"{operator.name}[{'; '.join(sides)}]"


def _padded(columns: Tensor, places: slice | Tensor, dim: int) -> Tensor:
    result = columns.new_zeros(dim, columns.shape[1])
    if isinstance(places, slice):
        result[places] = columns
        return result
    return result.index_add_(0, places, columns)  # repeated columns add up


def _places(index: Index, space: TensorSpace, what: str) -> Tensor:
    dim = space.dim
    if isinstance(index, slice):
        found = range(dim)[index]
        return torch.arange(len(found), device=space.device) * found.step + found.start
    if isinstance(index, str) or (isinstance(index, (list, tuple)) and any(isinstance(each, str) for each in index)):
        raise TypeError(f"{what}: expected numbers, got {index!r}. For parameters by name take op[{index!r}].")
    places = torch.as_tensor(index, device=space.device)
    if places.dtype == torch.bool and places.shape == (dim,):
        return places.nonzero().squeeze(1)
    if places.ndim != 1 or places.is_floating_point() or places.is_complex() or places.dtype == torch.bool:
        if len(places.shape) == 1 and not len(places):
            return places.long()
        raise TypeError(
            f"{what}: expected numbers below {dim}, a slice or a mask of {dim} entries, got {places.dtype} of shape "
            f"{tuple(places.shape)}."
        )
    places = places.long()  # a narrow type may not hold the dimension
    if len(places) and not (-dim <= places.amin() and places.amax() < dim):
        raise IndexError(f"{what}: expected numbers below {dim}, got {int(places.amin())} to {int(places.amax())}.")
    return places % dim


def _range(space: TensorSpace, subspace: TensorSpace) -> slice | Tensor:
    """The places of a subspace; a range where it is one, which takes no index."""
    first, last = space.slice(subspace.names[0]), space.slice(subspace.names[-1])
    whole = last.stop - first.start == subspace.dim
    return slice(first.start, last.stop) if whole else space.positions(subspace.names)


def _same(rows: slice | Tensor, columns: slice | Tensor) -> bool:
    if isinstance(rows, Tensor) and isinstance(columns, Tensor):
        return torch.equal(rows, columns)
    return isinstance(rows, slice) and isinstance(columns, slice) and rows == columns
