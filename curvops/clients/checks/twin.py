"""The caller's model in double precision, asked for nothing but outputs and first-order gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from curvops.products.account import relative_difference
from curvops.risk.empirical_risk import EmpiricalRisk
from curvops.risk.model import Model, floating_to
from curvops.space import TensorSpace
from curvops.substitutions import gradients
from curvops.tree import map_tensors

Loss = Callable[[Any, Any], Tensor]
At = Callable[[Tensor], AbstractContextManager[tuple[Tensor, list[Tensor]]]]
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
        at: Gives the output at a parameter vector with its graph, and the leaves.
        differentiate: `torch.autograd.grad`, or what serves in its place.
        loss, y: The loss, and its targets.
        theta: The parameters, ``[D]``.
        space: Their space.
    """

    def __init__(
        self, at: At, differentiate: Callable[..., Any], loss: Loss, y: Any, theta: Tensor, space: TensorSpace
    ) -> None:
        self._at, self._differentiate = at, differentiate
        self._loss, self.y, self.theta, self.space = loss, y, theta, space

    def loss(self, z: Tensor) -> Tensor:
        """The loss of an output."""
        return self._loss(z, self.y)

    def output(self, step: Tensor | float = 0.0) -> Tensor:
        """The output at θ + ``step``."""
        with self._at(self.theta + step) as (z, _):
            return z.detach()

    def value(self, step: Tensor | float = 0.0) -> Tensor:
        """The loss at θ + ``step``, which may read parameters itself."""
        with self._at(self.theta + step) as (z, _):
            return self.loss(z).detach()

    def gradient(self, scalar: Scalar | None = None, step: Tensor | float = 0.0) -> Tensor:
        """The gradient of the loss, or of another function of the output, at θ + ``step``."""
        with self._at(self.theta + step) as (z, leaves):
            return self._pulled((scalar or self.loss)(z), leaves)

    def squared_rows(self, cotangents: Iterable[Tensor]) -> Tensor:
        """Σ_k (Jᵀ s_k)², entry by entry, over cotangents of the output's shape."""
        total = torch.zeros_like(self.theta)
        with self._at(self.theta) as (z, leaves):
            for s in cotangents:
                total += self._pulled((z * s).sum(), leaves).square()
        return total

    def output_hessian(self) -> Tensor:
        """∇² of the loss in the output, ``[n, n]`` for n outputs."""
        with self._at(self.theta) as (z, _):
            z = z.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.loss(z), z, create_graph=True)
            rows = [torch.autograd.grad(entry, z, retain_graph=True)[0].flatten() for entry in slope.flatten()]
        return torch.stack(rows)

    def _pulled(self, scalar: Tensor, leaves: list[Tensor]) -> Tensor:
        if not scalar.requires_grad:
            return torch.zeros_like(self.theta)
        return self.space.join(self._differentiate(scalar, leaves, retain_graph=True, allow_unused=True))


def twin_of(risk: EmpiricalRisk, loss_func: Loss, X: Any, y: Any, allowed: float) -> Twin:
    """The model on some data in double precision; NotJudged if it cannot be run there, or is another model there."""
    z = risk.forward(X)
    own = risk.space.join(gradients(loss_func(z, y), list(risk.params.values()), allow_unused=True)).double()
    X, y = (map_tensors(lambda t: floating_to(t, torch.float64), part) for part in (X, y))
    params = {name: p.detach().double() for name, p in risk.params.items()}
    space = TensorSpace(params)
    theta = space.join(params.values())
    for make, double in product((_copied, _standing_in), (True, False)):
        try:
            loss = copy.deepcopy(loss_func).double() if double and isinstance(loss_func, nn.Module) else loss_func
            at, differentiate = make(risk, X, space)
            twin = Twin(at, differentiate, loss, y, theta, space)
            if twin.output().dtype == torch.float64 and relative_difference(twin.gradient(), own) <= allowed:
                return twin
        except torch.OutOfMemoryError:
            raise
        except UNFIT:
            continue
    raise NotJudged("the model cannot be run in double precision on these data, or has another gradient there")


def _copied(risk: EmpiricalRisk, X: Any, space: TensorSpace) -> tuple[At, Callable[..., Any]]:
    if risk.model.module is None:
        raise TypeError("a function of the parameters is run with others")
    memo: dict[int, Any] = {}
    module = copy.deepcopy(risk.model.module, memo).double()
    leaves = {name: memo[id(p)] for name, p in risk.params.items()}
    for leaf in leaves.values():
        leaf.data = leaf.data.double()
        leaf.requires_grad_()
    model = Model(module, leaves)

    @contextmanager
    def at(flat: Tensor) -> Iterator[tuple[Tensor, list[Tensor]]]:
        with torch.no_grad():
            for leaf, value in zip(leaves.values(), space.split(flat), strict=True):
                leaf.copy_(value)
        yield model(X), list(leaves.values())

    return at, torch.autograd.grad


def _standing_in(risk: EmpiricalRisk, X: Any, space: TensorSpace) -> tuple[At, Callable[..., Any]]:
    @contextmanager
    def at(flat: Tensor) -> Iterator[tuple[Tensor, list[Tensor]]]:
        leaves = {n: t.detach().requires_grad_() for n, t in zip(risk.params, space.split(flat), strict=True)}
        # also for what the loss reads, and the backward pass runs again
        with risk.model.standing_in(leaves, torch.float64):
            yield risk.functional(leaves, X), list(leaves.values())

    return at, gradients


def slope(at: Callable[[float], Tensor]) -> Tensor:
    """The derivative at 0 of a function of the step, by central differences; NotJudged where steps or sides disagree."""
    wide: tuple[float, Tensor, Tensor] | None = None
    for step in STEPS:
        right, left = at(step), at(-step)
        found = (right - left) / (2 * step)
        if wide is not None and float((found - wide[1]).norm()) <= STEADY * float(wide[1].norm()):
            # at a kink the derivatives from both sides differ, and by as much for a narrower step
            middle = 2 * at(0.0)
            near, far = float((right + left - middle).norm()) / step, float((wide[2] - middle).norm()) / wide[0]
            if near > max(0.5 * far, STEADY * float(found.norm())):
                break
            return found
        wide = step, found, right + left
    raise NotJudged("central differences disagree: at a kink, or where there is nothing but rounding")
