"""Risk, gradient, Hessian, GGN, empirical Fisher and Jacobians against their definitions."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import closing
from typing import Any, NamedTuple

import torch
from torch import Tensor

from curvops.clients.checks.problem import MANY, Problem
from curvops.clients.checks.twin import NotJudged, slope
from curvops.matrix import seeded
from curvops.products.account import relative_difference
from curvops.products.ggn import EFLinearOperator, GGNLinearOperator
from curvops.products.hessian import HessianLinearOperator
from curvops.products.jacobian import JacobianLinearOperator
from curvops.products.risk_operator import RiskOperator
from curvops.risk.determinism import check_deterministic, fingerprint

DEFINITION = 1e-4  # relative error up to which a product fits its central differences
DENSE = 1_000  # parameters up to which the dense matrix is formed


class Outcome(NamedTuple):
    """A difference, what is allowed, and a remark."""

    difference: float | None
    allowed: float | None = None
    why: str = ""


def deterministic(p: Problem, remarks: list[str], data: Any) -> Outcome:
    """Two passes agree; the warnings of the determinism check become remarks."""
    firsts = []
    for _ in range(2):
        with closing(data.walk()) as walk:
            firsts.append(fingerprint(next(walk)))
    if firsts[0] != firsts[1]:
        raise RuntimeError("the loader's first batch is another one each time: it shuffles, or changes the data")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            check_deterministic(p.risk)
        except ValueError as error:
            raise NotJudged("the risk cannot be computed") from error
    remarks += [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]
    return Outcome(None)


def value(p: Problem) -> Outcome:
    """The risk of the batches is PyTorch's loss of all data in one batch."""
    found = float(p.risk.value())
    return Outcome(abs(found - p.value) / max(abs(p.value), 1e-12), p.allowed)


def gradient(p: Problem) -> Outcome:
    """Slopes along random vectors are those of the loss's values."""
    twin, vectors = p.twin, torch.stack(p.vectors[: 1 if p.risk.space.dim > MANY else 2]).double()
    found = vectors @ p.risk.value_and_gradient()[1].double()
    allowed = _of_slopes(p)
    expected = slope(lambda step: torch.stack([twin.value(step * v) for v in vectors]))
    return Outcome(relative_difference(found, expected), allowed)


def hessian(p: Problem) -> Outcome:
    """H v is the derivative of the gradient along v."""
    twin, v = p.twin, p.vectors[0]
    found = HessianLinearOperator.of(p.risk) @ v
    return _against(p, found.double(), lambda step: twin.gradient(step=step * v.double()))


def ggn(p: Problem) -> Outcome:
    """G v is Jᵀ times the derivative of the loss's gradient in the output along J v."""
    twin, v = p.twin, p.vectors[0]
    w, z = slope(lambda step: twin.output(step * v.double())), twin.output()

    def at(step: float) -> Tensor:
        moved = (z + step * w).requires_grad_()
        u = torch.autograd.grad(twin.loss(moved), moved, materialize_grads=True)[0]
        return twin.gradient(lambda z: (z * u).sum())

    return _against(p, (GGNLinearOperator.of(p.risk) @ v).double(), at)


def empirical(p: Problem) -> Outcome:
    """F v is c Σ_t g_t (g_tᵀ v) over the loss terms' gradients."""
    twin, v = p.twin, p.vectors[0]
    w, z = slope(lambda step: twin.output(step * v.double())), twin.output().requires_grad_()
    allowed, (terms, c) = _of_slopes(p), p.terms(z)
    along = slope(lambda step: p.terms((z + step * w).detach())[0].detach())
    (u,) = torch.autograd.grad(c * (along * terms).sum(), z)
    found = EFLinearOperator.of(p.risk) @ v
    return Outcome(relative_difference(found.double(), twin.gradient(lambda z: (z * u).sum())), allowed)


def jacobian(p: Problem) -> Outcome:
    """J v is the derivative of the output along v."""
    twin, v = p.twin, p.vectors[0]
    found = (_jacobian(p) @ v).double()
    return _against(p, found, lambda step: twin.output(step * v.double()).flatten())


def adjoint(p: Problem) -> Outcome:
    """⟨Jᵀ u, v⟩ = ⟨u, J v⟩."""
    J, v = _jacobian(p), p.vectors[0]
    pushed = J @ v
    u = J.codomain.random(seeded(p.seed))
    difference = float(torch.dot(u, pushed) - torch.dot(J.T @ u, v).to(u.dtype))
    return Outcome(abs(difference) / max(float(u.norm() * pushed.norm()), 1e-30), p.allowed)


def consistent(cls: type[RiskOperator]) -> Callable[[Problem], Outcome]:
    """The operator is symmetric, and its columns, kept graphs and dense matrix give its single products."""

    def judged(p: Problem) -> Outcome:
        operator, (v, u) = cls.of(p.risk), p.vectors
        a, b = operator @ v, operator @ u
        weights = torch.tensor([[1.0, 0.0, 1.0, 1.0], [0.0, 1.0, 1.0, -1.0]], device="cpu").to(a)
        if p.risk.space.dim > MANY:
            weights = weights[:, 2:]  # each column takes its time
        V, expected = torch.stack([v, u], 1) @ weights, torch.stack([a, b], 1) @ weights
        found = {"columns": relative_difference(operator @ V, expected)}
        with operator.linearized():
            found["linearized()"] = max(
                relative_difference(operator @ v, a), relative_difference(operator @ V, expected)
            )
        if p.risk.space.dim <= DENSE:
            found["to_dense()"] = relative_difference(operator.to_dense() @ V, expected)
        scale = float(torch.maximum(a.norm() * u.norm(), b.norm() * v.norm()).clamp(min=1e-30))
        found["transpose"] = abs(float(torch.dot(u, a) - torch.dot(v, b))) / scale
        return Outcome(max(found.values()), p.allowed, worst(found, p.allowed))

    return judged


def _against(p: Problem, found: Tensor, at: Callable[[float], Tensor]) -> Outcome:
    """A directional derivative, against central differences of a function of the step."""
    return Outcome(relative_difference(found, slope(at)), definition(p))


def _of_slopes(p: Problem) -> float:
    """What is allowed where the loss's gradient enters: rounding of the output, where the fit is almost perfect."""
    both = [z.detach().double().requires_grad_() for z in (p.z, p.twin.output())]
    own, exact = (torch.autograd.grad(p.twin.loss(z), z, materialize_grads=True)[0] for z in both)
    allowed = max(definition(p), 10 * relative_difference(own, exact))
    if allowed > 0.5 > definition(p):
        raise NotJudged(f"the loss's gradient has no digits in {p.z.dtype}: the fit is almost perfect")
    return allowed


def definition(p: Problem) -> float:
    """Relative error up to which a product fits its definition."""
    return max(DEFINITION, p.allowed)


def _jacobian(p: Problem) -> JacobianLinearOperator:
    if p.z.ndim == 0 or len(p.z) != p.size:
        raise NotJudged("the output has no row for each datum")
    model = p.risk.model.module or p.risk.model.function
    assert model is not None
    size = p.risk.data.batch_size_fn
    return JacobianLinearOperator(model, p.risk.params, p.batches, check_deterministic=False, batch_size_fn=size)


def worst(found: dict[str, float], allowed: float) -> str:
    return ", ".join(f"{name} {error:.1e}" for name, error in found.items() if not error <= allowed)
