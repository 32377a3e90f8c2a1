"""Sums, multiples, products and adjoints of operators that have no structure in common."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce

import torch
from torch import Tensor

from curvops.operators.linear_operator import LinearOperator
from curvops.space import TensorSpace


class SumOperator(LinearOperator):
    """Numbers times operators, summed."""

    def __init__(self, *terms: tuple[float, LinearOperator]) -> None:
        _, first = terms[0]
        for _, other in terms[1:]:
            if (first.domain, first.codomain) != (other.domain, other.codomain):
                raise ValueError(
                    f"A + B: expected operators between the same spaces, got {first!r} on {first.domain} and {other!r} on {other.domain}. "
                    "One that is made of a flat vector takes the space as an argument: DiagonalOperator(d, A.domain)."
                )
        symmetric = all(a.symmetric for _, a in terms)
        psd = all(a.psd and scalar >= 0 for scalar, a in terms)
        name = " + ".join(a.name if scalar == 1 else f"{scalar:g} · {a.name}" for scalar, a in terms)
        super().__init__(first.domain, first.codomain, symmetric=symmetric, psd=psd)
        self._name = name if len(terms) == 1 else f"({name})"
        self._scalars, self._parts = zip(*terms, strict=True)

    def _summed(self, products: Iterable[Tensor]) -> Tensor:
        terms = zip(self._scalars, products, strict=True)
        return reduce(torch.add, (product if scalar == 1 else scalar * product for scalar, product in terms))

    def _scaled(self, factor: float) -> LinearOperator:
        if len(self._parts) > 1:
            return super()._scaled(factor)
        return self._parts[0]._scaled(factor * self._scalars[0])  # which may have structure of its own

    def _apply(self, columns: Tensor) -> Tensor:
        return self._summed(part._apply(columns) for part in self._parts)

    def _apply_adjoint(self, columns: Tensor) -> Tensor:
        return self._summed(part._apply_adjoint(columns) for part in self._parts)

    def _dense(self) -> Tensor:
        return self._summed(part._dense() for part in self._parts)

    def _restricted(self, rows: TensorSpace, columns: TensorSpace) -> LinearOperator:
        parts = (part._restricted(rows, columns) for part in self._parts)
        return SumOperator(*zip(self._scalars, parts, strict=True))


class ProductOperator(LinearOperator):
    """A after B; A Aᵀ, B A Bᵀ with a symmetric A, and so on are known to be symmetric."""

    def __init__(self, left: LinearOperator, right: LinearOperator) -> None:
        if left.domain != right.codomain:
            raise ValueError(
                f"A @ B: expected B to give what A takes, got A = {left!r} on {left.domain} and B = {right!r} into {right.codomain}."
            )
        factors = [*_factors(left), *_factors(right)]
        middle = factors[len(factors) // 2] if len(factors) % 2 else None
        symmetric = all(map(_adjoint_to_each_other, factors, reversed(factors)))
        psd = symmetric and (middle is None or middle.psd)
        super().__init__(right.domain, left.codomain, symmetric=symmetric, psd=psd)
        self.left, self.right = self._parts = left, right
        self._name = f"({left.name} @ {right.name})"

    def _apply(self, columns: Tensor) -> Tensor:
        return self.left._apply(self.right._apply(columns))

    def _apply_adjoint(self, columns: Tensor) -> Tensor:
        return self.right._apply_adjoint(self.left._apply_adjoint(columns))

    def _dense(self) -> Tensor:
        return self.left._apply(self.right._dense())

    def _restricted(self, rows: TensorSpace, columns: TensorSpace) -> LinearOperator:
        if self.symmetric and rows == columns:
            return super()._restricted(rows, columns)  # which knows that it is symmetric
        inner = self.left.domain
        return ProductOperator(self.left._restricted(rows, inner), self.right._restricted(inner, columns))


class AdjointOperator(LinearOperator):
    """Aᵀ."""

    def __init__(self, operator: LinearOperator) -> None:
        super().__init__(operator.codomain, operator.domain)
        self.operator, self._parts, self._name = operator, (operator,), f"{operator.name}.T"
        self._source, self._transposed = operator._source, not operator._transposed

    def _apply(self, columns: Tensor) -> Tensor:
        return self.operator._apply_adjoint(columns)

    def _apply_adjoint(self, columns: Tensor) -> Tensor:
        return self.operator._apply(columns)

    def adjoint(self) -> LinearOperator:
        return self.operator

    def _dense(self) -> Tensor:
        return self.operator._dense().T

    def _restricted(self, rows: TensorSpace, columns: TensorSpace) -> LinearOperator:
        part = self.operator._restricted(columns, rows)
        part._source, part._transposed = self._source, not self._transposed
        return part.adjoint()


def _factors(operator: LinearOperator) -> list[LinearOperator]:
    """What a product is made of, from left to right."""
    if isinstance(operator, ProductOperator):
        return [*_factors(operator.left), *_factors(operator.right)]
    return [operator]


def _adjoint_to_each_other(first: LinearOperator, second: LinearOperator) -> bool:
    if first.adjoint() is second or second.adjoint() is first:
        return True
    same = first._source is second._source and (first.codomain, first.domain) == (second.domain, second.codomain)
    return same and (first._source.symmetric or first._transposed != second._transposed)
