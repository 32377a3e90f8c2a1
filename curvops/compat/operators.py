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


class _Peer(RiskOperator):
    """An operator with the peer's arguments, and under a progress bar the title by which scripts count products."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(**translated(given, named))
        self._name = f"{type(self).__name__}._matmat" if self.risk.progressbar else ""


class HessianLinearOperator(_Peer, hessian.HessianLinearOperator):
    """`curvops.HessianLinearOperator` with the peer's arguments."""


class GGNLinearOperator(_Peer, ggn.GGNLinearOperator):
    """`curvops.GGNLinearOperator` with the peer's arguments."""


class FisherMCLinearOperator(GGNLinearOperator):
    """`curvops.GGNLinearOperator` with sampled labels, one a loss term if not said otherwise."""

    def __init__(self, *given: Any, mc_samples: int = 1, **named: Any) -> None:
        super().__init__(*given, mc_samples=mc_samples, **named)


class EFLinearOperator(_Peer, ggn.EFLinearOperator):
    """`curvops.EFLinearOperator` with the peer's arguments."""


class JacobianLinearOperator(jacobian.JacobianLinearOperator):
    """`curvops.JacobianLinearOperator` with the peer's arguments."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(**arguments.translated(given, named, WITHOUT_LOSS))


class TransposedJacobianLinearOperator(jacobian.TransposedJacobianLinearOperator):
    """`curvops.TransposedJacobianLinearOperator` with the peer's arguments."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(**arguments.translated(given, named, WITHOUT_LOSS))
