"""The loss on a line or a plane through the parameters, and its quadratic model there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from curvops.context import own_precision
from curvops.operators.linear_operator import LinearOperator
from curvops.risk.empirical_risk import EmpiricalRisk
from curvops.space import Vector


class Landscape:
    """L(θ + Σ_k t_k v_k), and L + tᵀ Vᵀ g + tᵀ Vᵀ A V t / 2, with the gradient g and the operator A at θ.

    The parameters are moved in place while the loss is evaluated, and are afterwards what they were, to the bit.

    Args:
        operator: A, a Hessian, GGN, KFAC, … of a model, with its ``risk``.
        directions: v_k, in any format, which are not rescaled.
        title: For errors.

    Attributes:
        value: L(θ).
        slope: Vᵀ g, ``[K]``.
        curvature: Vᵀ A V, ``[K, K]``.

    Raises:
        TypeError: If the operator has no risk.

    Example:
        >>> import torch
        >>> from curvops import HessianLinearOperator
        >>> model, data = torch.nn.Linear(3, 2).double(), [(torch.rand(5, 3).double(), torch.rand(5, 2).double())]
        >>> hessian = HessianLinearOperator(model, torch.nn.MSELoss(), dict(model.named_parameters()), data)
        >>> line = Landscape(hessian, [torch.ones(8).double()])
        >>> steps = torch.tensor([[-1.0], [0.0], [2.0]])
        >>> torch.allclose(line.losses(steps), line.model(steps))  # the loss is quadratic
        True
    """

    def __init__(self, operator: LinearOperator, directions: Sequence[Vector], title: str = "Landscape") -> None:
        risk = getattr(operator, "risk", None)
        if not isinstance(risk, EmpiricalRisk):
            raise TypeError(
                f"{title}: expected an operator of a model, with its risk, such as a HessianLinearOperator, "
                f"got {getattr(operator, 'name', type(operator).__name__)}."
            )
        self.risk = risk
        self.directions = torch.stack([risk.vector(v, title).detach() for v in directions], 1)
        self.value, gradient = risk.value_and_gradient()
        with own_precision(risk.space.device):
            self.slope = self.directions.T @ gradient
            self.curvature = self.directions.T @ (operator @ self.directions)

    def losses(self, steps: Tensor) -> Tensor:
        """The loss at steps ``[N, K]``, ``[N]``: a walk over the data for each."""
        with own_precision(self.risk.space.device), displaced(list(self.risk.params.values())) as move:
            found = []
            for step in steps.to(self.directions):
                move(self.risk.space.split(self.directions @ step))
                found.append(self.risk.value())
        return torch.stack(found)

    def model(self, steps: Tensor) -> Tensor:
        """The quadratic model at steps ``[N, K]``, ``[N]``."""
        steps = steps.to(self.directions)
        with own_precision(self.risk.space.device):
            return self.value + steps @ self.slope + ((steps @ self.curvature) * steps).sum(1) / 2


@contextmanager
def displaced(params: Sequence[Tensor]) -> Iterator[Callable[[Sequence[Tensor]], None]]:
    """A context that yields a function ``move(steps)``, which sets the tensors to where they began plus the steps.

    When it ends, also by an error, they are what they were, to the bit. So their versions do not count it (``data``):
    a graph of the caller's and an open `linearized` context stay good.
    """
    start = [p.detach().clone() for p in params]

    def set_to(values: Any) -> None:
        for p, value in zip(params, values, strict=True):
            p.data.copy_(value)

    try:
        yield lambda steps: set_to(before + step for before, step in zip(start, steps, strict=True))
    finally:
        set_to(start)
