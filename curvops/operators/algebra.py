"""Sums, multiples, products and adjoints of linear operators."""

from __future__ import annotations

from numbers import Real
from typing import Any

from torch import Tensor

from curvops.operators.linear_operator import LinearOperator


class SumOperator(LinearOperator):
    """A + B."""

    def __init__(self, left: LinearOperator, right: LinearOperator) -> None:
        if (left.domain, left.codomain) != (right.domain, right.codomain):
            raise ValueError(
                f"A + B: expected operators between the same spaces, got {left!r} on {left.domain} and {right!r} on {right.domain}."
            )
        super().__init__(
            left.domain, left.codomain, symmetric=left.symmetric and right.symmetric, psd=left.psd and right.psd
        )
        self.left, self.right = left, right

    @property
    def name(self) -> str:
        return f"({self.left.name} + {self.right.name})"

    def _apply(self, columns: Tensor) -> Tensor:
        return self.left._apply(columns) + self.right._apply(columns)

    def _dense(self) -> Tensor:
        return self.left._dense() + self.right._dense()

    def _adjoint(self) -> LinearOperator:
        return SumOperator(self.left.adjoint(), self.right.adjoint())


class ScaledOperator(LinearOperator):
    """A times a number."""

    def __init__(self, operator: LinearOperator, scalar: float) -> None:
        super().__init__(
            operator.domain, operator.codomain, symmetric=operator.symmetric, psd=operator.psd and scalar >= 0
        )
        self.operator, self.scalar = operator, scalar

    @property
    def name(self) -> str:
        return f"{self.scalar:g} · {self.operator.name}"

    def _apply(self, columns: Tensor) -> Tensor:
        return self.scalar * self.operator._apply(columns)

    def _dense(self) -> Tensor:
        return self.scalar * self.operator._dense()

    def _adjoint(self) -> LinearOperator:
        return ScaledOperator(self.operator.adjoint(), self.scalar)


class ProductOperator(LinearOperator):
    """A after B."""

    def __init__(self, left: LinearOperator, right: LinearOperator) -> None:
        if left.domain != right.codomain:
            raise ValueError(
                f"A @ B: expected B to give what A takes, got A = {left!r} on {left.domain} and B = {right!r} into {right.codomain}."
            )
        super().__init__(right.domain, left.codomain)
        self.left, self.right = left, right

    @property
    def name(self) -> str:
        return f"({self.left.name} @ {self.right.name})"

    def _apply(self, columns: Tensor) -> Tensor:
        return self.left._apply(self.right._apply(columns))

    def _adjoint(self) -> LinearOperator:
        return ProductOperator(self.right.adjoint(), self.left.adjoint())


class AdjointOperator(LinearOperator):
    """Aᵀ, for an operator that gives the product with its adjoint."""

    def __init__(self, operator: LinearOperator, apply_adjoint: Any) -> None:
        super().__init__(operator.codomain, operator.domain)
        self.operator, self._apply_adjoint = operator, apply_adjoint

    @property
    def name(self) -> str:
        return f"{self.operator.name}.T"

    def _apply(self, columns: Tensor) -> Tensor:
        result: Tensor = self._apply_adjoint(columns)
        return result

    def _adjoint(self) -> LinearOperator:
        return self.operator


def as_scalar(value: Any) -> float | None:
    """A number from a Python number or a tensor with one entry, else None."""
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        return float(value.detach())
    return float(value) if isinstance(value, Real) else None
