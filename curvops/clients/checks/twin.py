"""The caller's model in double precision, asked for nothing but outputs and first-order gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from curvops.products.account import relative_difference
from curvops.products.judge import at_kink
from curvops.products.movable import Copied, Leaves, Movable, StandIns, apart, copied
from curvops.risk.empirical_risk import EmpiricalRisk
from curvops.risk.model import floating_to
from curvops.space import TensorSpace
from curvops.substitutions import gradients
from curvops.tree import map_tensors

Loss = Callable[[Any, Any], Tensor]
Scalar = Callable[[Tensor], Tensor]
STEPS = (1e-4, 1e-5, 1e-6, 1e-7, 1e-8)  # of central differences; small ones lie between the kinks of large models
STEADY = 1e-4  # relative difference between two steps up to which they agree
# what a model, a loss or a copy of them may raise in another precision
UNFIT = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)


class NotJudged(Exception):
    """Why there is no verdict."""


class Twin:
    """Model and loss in double precision on some data, on lines through the parameters.

    It is a copy of the module or, where a copy is another model (weights in closures) or cannot be made, the model with
    stand-ins for the parameters; one that has the gradient of the caller's own model and loss.

    Args:
        model: The model and its parameters.
        differentiate: `torch.autograd.grad`, or what serves in its place.
        loss, y: The loss, and its targets.
        theta: The parameters, ``[D]``.
        space: Their space.
    """

    def __init__(
        self, model: Movable, differentiate: Callable[..., Any], loss: Loss, y: Any, theta: Tensor, space: TensorSpace
    ) -> None:
        self._model, self._differentiate = model, differentiate
        self._loss, self.y, self.theta, self.space = loss, y, theta, space

    def loss(self, z: Tensor) -> Tensor:
        """The loss of an output."""
        return self._loss(z, self.y)

    def output(self, step: Tensor | float = 0.0) -> Tensor:
        """The output at θ + ``step``."""
        with self._model.at(self.theta + step) as (_, run):
            return run().detach()

    def value(self, step: Tensor | float = 0.0) -> Tensor:
        """The loss at θ + ``step``, which may read parameters itself."""
        with self._model.at(self.theta + step) as (_, run):
            return self.loss(run()).detach()

    def gradient(self, scalar: Scalar | None = None, step: Tensor | float = 0.0) -> Tensor:
        """The gradient of the loss, or of another function of the output, at θ + ``step``."""
        with self._model.at(self.theta + step) as (leaves, run):
            return self._pulled((scalar or self.loss)(run()), leaves)

    def squared_rows(self, cotangents: Iterable[Tensor]) -> Tensor:
        """Σ_k (Jᵀ s_k)², entry by entry, over cotangents of the output's shape."""
        total = torch.zeros_like(self.theta)
        with self._model.at(self.theta) as (leaves, run):
            z = run()
            for s in cotangents:
                total += self._pulled((z * s).sum(), leaves).square()
        return total

    def output_hessian(self) -> Tensor:
        """∇² of the loss in the output, ``[n, n]`` for n outputs."""
        with self._model.at(self.theta) as (_, run):
            z = run().detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.loss(z), z, create_graph=True)
            rows = [torch.autograd.grad(entry, z, retain_graph=True)[0].flatten() for entry in slope.flatten()]
        return torch.stack(rows)

    def _pulled(self, scalar: Tensor, leaves: Leaves) -> Tensor:
        if not scalar.requires_grad:
            return torch.zeros_like(self.theta)
        return self.space.join(self._differentiate(scalar, list(leaves.values()), retain_graph=True, allow_unused=True))


def twin_of(risk: EmpiricalRisk, loss_func: Loss, X: Any, y: Any, allowed: float) -> Twin:
    """The model on some data in double precision; NotJudged if it cannot be run there, or is another model there."""
    z = risk.forward(X)
    own = risk.space.join(gradients(loss_func(z, y), list(risk.params.values()), allow_unused=True)).double()
    X, y = (map_tensors(lambda t: floating_to(t, torch.float64), part) for part in (X, y))
    params = {name: p.detach().double() for name, p in risk.params.items()}
    space = TensorSpace(params)
    theta = space.join(params.values())
    kinds: list[tuple[Callable[[], Movable], Any]] = [
        (lambda: Copied(copied(risk), X, space), torch.autograd.grad),
        (lambda: StandIns(risk, X, space), gradients),
    ]
    for (make, differentiate), double in product(kinds, (True, False)):
        try:
            loss = apart(loss_func, {}).double() if double and isinstance(loss_func, nn.Module) else loss_func
            twin = Twin(make(), differentiate, loss, y, theta, space)
            if twin.output().dtype == torch.float64 and relative_difference(twin.gradient(), own) <= allowed:
                return twin
        except torch.OutOfMemoryError:
            raise
        except UNFIT:
            continue
    raise NotJudged("the model cannot be run in double precision on these data, or has another gradient there")


def slope(at: Callable[[float], Tensor]) -> Tensor:
    """The derivative at 0 of a function of the step, by central differences; NotJudged where steps or sides disagree."""
    wide: tuple[float, Tensor, Tensor] | None = None
    for step in STEPS:
        right, left = at(step), at(-step)
        found = (right - left) / (2 * step)
        if wide is not None and float((found - wide[1]).norm()) <= STEADY * float(wide[1].norm()):
            if at_kink(at(0.0), (wide[2], right + left), (wide[0], step), STEADY * float(found.norm())):
                break
            return found
        wide = step, found, right + left
    raise NotJudged("central differences disagree: at a kink, or where there is nothing but rounding")
