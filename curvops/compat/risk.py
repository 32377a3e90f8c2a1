"""The loss and its gradient under the peer's name."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from curvops.compat.arguments import translated
from curvops.risk.empirical_risk import EmpiricalRisk


def gradient_and_loss(*given: Any, **named: Any) -> tuple[list[Tensor], Tensor]:
    """The gradient, a list of the parameters' shapes, and the loss; arguments as for an operator."""
    risk = EmpiricalRisk(**translated(given, named, ("model_func", "loss_func", "params", "data", "batch_size_fn")))
    value, gradient = risk.value_and_gradient()
    return risk.space.split(gradient), value
