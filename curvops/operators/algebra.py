"""Which sums, products and shifts of operators keep their structure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

from curvops.operators.block_diagonal import BlockDiagonalOperator
from curvops.operators.composite import AdjointOperator, ProductOperator, SumOperator
from curvops.operators.damping import Damping, spread
from curvops.operators.diagonal import DiagonalOperator, IdentityOperator
from curvops.operators.inverse import InverseOperator
from curvops.operators.linear_operator import LinearOperator
from curvops.operators.low_rank import LowRankPlusDiagonalOperator, OuterProductOperator
from curvops.operators.submatrix import SubmatrixLinearOperator
from curvops.space import TensorSpace


class StructuredAlgebra:
    """The rules by which operators are combined."""

    def add(self, first: LinearOperator, second: LinearOperator) -> LinearOperator:
        """A + B: what is diagonal, or low rank plus diagonal, stays so, and a shift keeps its operator's structure."""
        if (first.domain, first.codomain) == (second.domain, second.codomain):
            for a, b in ((first, second), (second, first)):
                if isinstance(b, IdentityOperator) and b.factor >= 0:
                    return a._shifted(dict.fromkeys(a.domain.names, b.factor))
                if is_diagonal(b) and is_diagonal(a):
                    return DiagonalOperator(a.diagonal() + b.diagonal(), a.domain)
                if is_diagonal(b) and isinstance(a, LowRankPlusDiagonalOperator):
                    diagonal = a._diagonal + b.diagonal()
                    psd = (a.psd and b.psd) or None
                    return LowRankPlusDiagonalOperator._of(a.columns, diagonal, a.weights, a.domain, psd)
                if is_diagonal(b) and isinstance(a, OuterProductOperator) and a.psd:
                    ones = a.left.new_ones(a.left.shape[1])
                    return LowRankPlusDiagonalOperator._of(a.left, b.diagonal() + 0.0, ones, a.domain, None)
        return SumOperator((1.0, first), (1.0, second))

    def scale(self, factor: float, operator: LinearOperator) -> LinearOperator:
        """c A."""
        return SumOperator((factor, operator))

    def multiply(self, left: LinearOperator, right: LinearOperator) -> LinearOperator:
        """A B: diagonals stay diagonal, and multiples of the identity are numbers."""
        if left.domain == right.codomain:
            if is_diagonal(left) and is_diagonal(right):
                return DiagonalOperator(left.diagonal() * right.diagonal(), left.domain)
            for a, b in ((left, right), (right, left)):
                if isinstance(b, IdentityOperator):
                    return a if b.factor == 1 else b.factor * a
        return ProductOperator(left, right)

    def transpose(self, operator: LinearOperator) -> LinearOperator:
        """Aᵀ."""
        return AdjointOperator(operator)

    def shift(self, operator: LinearOperator, damping: Mapping[str, float]) -> LinearOperator:
        """A + diag(δ), as a sum."""
        if len(shifts := set(damping.values())) == 1:
            return SumOperator((1.0, operator), (1.0, IdentityOperator(operator.domain, shifts.pop())))
        added = DiagonalOperator(spread(damping, operator.domain), operator.domain)
        return SumOperator((1.0, operator), (1.0, added))

    def invert(self, operator: LinearOperator, damping: Damping, options: Mapping[str, Any]) -> LinearOperator:
        """(A + δI)⁻¹, by solving."""
        if operator.domain != operator.codomain:
            raise ValueError(
                f"{operator.name}.inverse(): expected a square operator, got {operator!r}. Its pseudo-inverse is InverseOperator(op, 'lsmr')."
            )
        given = dict(options)
        matrix, solver, shift = operator._to_solve(damping, given.pop("solver", None))
        return InverseOperator(matrix, solver, **shift, **given)

    def restrict(self, operator: LinearOperator, rows: TensorSpace, columns: TensorSpace) -> LinearOperator:
        """Rows and columns of A, of padded vectors."""
        if (rows, columns) == (operator.codomain, operator.domain):
            return operator
        return SubmatrixLinearOperator.of(operator, rows, columns)


def is_diagonal(operator: LinearOperator) -> TypeGuard[BlockDiagonalOperator]:
    """Whether an operator is known to be diagonal."""
    return isinstance(operator, BlockDiagonalOperator) and operator.is_diagonal
