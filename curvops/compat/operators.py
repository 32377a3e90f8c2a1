"""Operators of a risk under the peer's names and arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from curvops.compat import arguments
from curvops.products import ggn, hessian, jacobian
from curvops.products.risk_operator import RiskOperator

WITHOUT_LOSS = tuple(name for name in arguments.ORDER if name != "loss_func")


def translated(given: Sequence[Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of ours; how many loss terms a datum has is seen from the loss."""
    found = arguments.translated(given, named)
    found.pop("num_per_example_loss_terms", None)
    return found


def titled(operator: RiskOperator) -> str:
    """The name, where there is a progress bar with the word by which scripts count products in its title."""
    return f"{type(operator).__name__}._matmat" if operator.risk.progressbar else ""


class HessianLinearOperator(hessian.HessianLinearOperator):
    """`curvops.HessianLinearOperator` with the peer's arguments."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(**translated(given, named))
        self._name = titled(self)


class GGNLinearOperator(ggn.GGNLinearOperator):
    """`curvops.GGNLinearOperator` with the peer's arguments."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(**translated(given, named))
        self._name = titled(self)


class FisherMCLinearOperator(GGNLinearOperator):
    """`curvops.GGNLinearOperator` with sampled labels, one a loss term if not said otherwise."""

    def __init__(self, *given: Any, mc_samples: int = 1, **named: Any) -> None:
        super().__init__(*given, mc_samples=mc_samples, **named)


class EFLinearOperator(ggn.EFLinearOperator):
    """`curvops.EFLinearOperator` with the peer's arguments."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(**translated(given, named))
        self._name = titled(self)


class JacobianLinearOperator(jacobian.JacobianLinearOperator):
    """`curvops.JacobianLinearOperator` with the peer's arguments."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(**arguments.translated(given, named, WITHOUT_LOSS))


class TransposedJacobianLinearOperator(jacobian.TransposedJacobianLinearOperator):
    """`curvops.TransposedJacobianLinearOperator` with the peer's arguments."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(**arguments.translated(given, named, WITHOUT_LOSS))
