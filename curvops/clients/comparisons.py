"""The comparisons of a check: each gives a difference and what is allowed, or says why it cannot."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import closing
from typing import Any, NamedTuple

import torch
from torch import Tensor

from curvops.clients.problem import Problem
from curvops.clients.twin import NotJudged, kinked, slope
from curvops.kronecker.diagonal import GGNDiagonalLinearOperator
from curvops.kronecker.kfac import EKFACLinearOperator, KFACLinearOperator
from curvops.kronecker.kfoc import KFOCLinearOperator
from curvops.kronecker.operator import KroneckerOperator
from curvops.losses.cross_entropy import CrossEntropyCurvature
from curvops.losses.entries import BinaryCrossEntropyCurvature
from curvops.matrix import seeded
from curvops.products.account import relative_difference
from curvops.products.ggn import EFLinearOperator, GGNLinearOperator
from curvops.products.hessian import HessianLinearOperator
from curvops.products.jacobian import JacobianLinearOperator
from curvops.products.judge import compare
from curvops.products.risk_operator import RiskOperator
from curvops.risk.determinism import check_deterministic, fingerprint

DEFINITION = 1e-4  # relative error up to which a product fits its central differences
DENSE = 1_000  # parameters up to which the dense matrix is formed
SEEDS = 16  # of Monte-Carlo operators
SAMPLES = 2**22  # entries of a Monte-Carlo factor
SCORE = 5.0  # standard errors that a mean may be off
EVENTS = 25  # samples of another label than the likeliest, on average, that a mean asks for
SCALE = 300.0  # factor that a trace of KFAC may be off


class Outcome(NamedTuple):
    """A difference, what is allowed, and a remark."""

    difference: float | None
    allowed: float | None = None
    why: str = ""


def deterministic(p: Problem, remarks: list[str], data: Any) -> Outcome:
    """Two passes agree; the warnings of the determinism check become remarks."""
    with closing(data.walk()) as walk:
        if fingerprint(next(walk)) != p.first:
            raise RuntimeError("the loader's first batch is another one each time: it shuffles, or changes the data")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_deterministic(p.risk)
    remarks += [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]
    return Outcome(None)


def value(p: Problem) -> Outcome:
    """The risk of the batches is PyTorch's loss of all data in one batch."""
    found = float(p.risk.value())
    return Outcome(abs(found - p.value) / max(abs(p.value), 1e-12), p.allowed)


def gradient(p: Problem) -> Outcome:
    """Slopes along random vectors are those of the loss's values."""
    twin, vectors = p.twin, torch.stack(p.vectors).double()
    found = vectors @ p.risk.value_and_gradient()[1].double()
    return _against(p, found, lambda step: torch.stack([twin.value(step * v) for v in vectors]))


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
    along = slope(lambda step: p.terms(twin.output(step * v.double()))[0].detach())

    def weighed(z: Tensor) -> Tensor:
        rows, c = p.terms(z)
        return c * (along * rows).sum()

    found = EFLinearOperator.of(p.risk) @ v
    return Outcome(relative_difference(found.double(), twin.gradient(weighed)), _definition(p))


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
        V, expected = (torch.stack([x, y, x + y, x - y], 1) for x, y in ((v, u), (a, b)))
        found = {"columns": relative_difference(operator @ V, expected)}
        with operator.linearized():
            found["linearized()"] = max(
                relative_difference(operator @ v, a), relative_difference(operator @ V, expected)
            )
        if p.risk.space.dim <= DENSE:
            found["to_dense()"] = relative_difference(operator.to_dense() @ V, expected)
        scale = float(torch.maximum(a.norm() * u.norm(), b.norm() * v.norm()).clamp(min=1e-30))
        found["transpose"] = abs(float(torch.dot(u, a) - torch.dot(v, b))) / scale
        return Outcome(max(found.values()), p.allowed, _worst(found, p.allowed))

    return judged


def monte_carlo(p: Problem) -> Outcome:
    """The mean over seeds of vᵀ F v is vᵀ G v, in standard errors."""
    v = p.vectors[0]
    samples = max(1, min(1024, SAMPLES // max(1, p.z.numel())))
    _expect_samples(p, SEEDS * samples)
    expected = float(v @ (GGNLinearOperator.of(p.risk) @ v))
    found = [
        float(v @ (GGNLinearOperator.of(p.risk, mc_samples=samples, seed=p.seed + k) @ v)) for k in range(SEEDS)
    ]
    return _scored(p, found, expected, f"{SEEDS} seeds of {samples} samples")


def diagonal(p: Problem) -> Outcome:
    """Each entry, against the rows Sᵀ J of the twin."""
    exact = p.diagonal
    found = GGNDiagonalLinearOperator.of(p.risk).diagonal()
    return Outcome(relative_difference(found.double(), exact), _definition(p))


def traces(p: Problem) -> Outcome:
    """Type-2 EKFAC keeps the GGN's trace of each parameter's block."""
    exact, (operator, chosen, why) = p.traces(p.diagonal), _of_small(p, EKFACLinearOperator)
    g = exact[chosen]
    error = (_traces(operator) - g).abs() / (g + 1e-9 * exact.sum())
    return Outcome(float(error.max()), _definition(p), why)


def scaled(cls: type[KroneckerOperator]) -> Callable[[Problem], Outcome]:
    """Each block is positive semi-definite, and its trace within a factor of the GGN's."""

    def judged(p: Problem) -> Outcome:
        exact, (operator, chosen, why) = p.traces(p.diagonal), _of_small(p, cls)
        v = operator.domain.random(seeded(p.seed))
        blocks = torch.stack([part.sum() for part in (v * (operator @ v)).double().split(operator.domain.sizes)])
        if bool((blocks < -p.allowed * _traces(operator)).any()):
            raise RuntimeError("a block is not positive semi-definite")
        seen = exact[chosen] > 1e-9 * exact.sum()
        ratio = _traces(operator)[seen] / exact[chosen][seen]
        return Outcome(float(torch.maximum(ratio, 1 / ratio).max()) if seen.any() else 1.0, SCALE, why)

    return judged


def monte_carlo_kfac(p: Problem) -> Outcome:
    """The mean over seeds of vᵀ K v is that of type-2 KFAC, in standard errors."""
    _ = p.diagonal  # there is a factor
    samples = 8 if p.risk.space.dim <= 100_000 else 1
    _expect_samples(p, SEEDS * samples)
    v = p.vectors[0]
    expected = float(v @ (KFACLinearOperator.of(p.risk, fisher_type="type-2") @ v))
    kfac = KFACLinearOperator.of(p.risk, mc_samples=samples, seed=p.seed)
    found = [float(v @ (kfac.refresh(seed=p.seed + k) @ v)) for k in range(SEEDS)]
    return _scored(p, found, expected, f"{SEEDS} seeds of {samples} samples")


def _against(p: Problem, found: Tensor, at: Callable[[float], Tensor]) -> Outcome:
    """A directional derivative, against central differences of a function of the step."""
    verdict, allowed = compare(found, at), _definition(p)
    if verdict.error is None or (verdict.error > allowed and kinked(at, allowed)):
        raise NotJudged("central differences disagree: a kink is near")
    return Outcome(verdict.error, allowed)


def _definition(p: Problem) -> float:
    return max(DEFINITION, p.allowed)


def _jacobian(p: Problem) -> JacobianLinearOperator:
    if p.z.ndim == 0 or len(p.z) != p.size:
        raise NotJudged("the output has no row for each datum")
    model = p.risk.model.module or p.risk.model.function
    assert model is not None
    sized = {"batch_size_fn": p.risk.data.batch_size_fn}
    return JacobianLinearOperator(model, p.risk.params, p.batches, check_deterministic=False, **sized)


def _of_small(p: Problem, cls: type[KroneckerOperator]) -> tuple[KroneckerOperator, list[int], str]:
    """A type-2 operator of the parameters that it can decompose in seconds, their places, and how many."""
    names, chosen = p.risk.space.names, set(p.small())
    places = [k for k, name in enumerate(names) if name in chosen]
    if not places:
        raise NotJudged("eigendecompositions of the layers' factors would take long")
    risk = p.risk if len(places) == len(names) else p.risk.restricted([names[k] for k in places])
    why = "" if risk is p.risk else f"{len(places)} of {len(names)} parameters: the rest's factors take long"
    return cls.of(risk, fisher_type="type-2"), places, why


def _traces(operator: KroneckerOperator) -> Tensor:
    return torch.stack([part.sum() for part in operator.diagonal().double().split(operator.domain.sizes)])


def _expect_samples(p: Problem, samples: int) -> None:
    """NotJudged where hardly any sampled label is another one than the likeliest."""
    curvature, rare = p.curvature, None
    if isinstance(curvature, CrossEntropyCurvature):
        rare = (1 - curvature.rows(p.z.double()).softmax(1).amax(1)).sum()
    elif isinstance(curvature, BinaryCrossEntropyCurvature):
        rare = torch.sigmoid(-p.z.double().abs()).sum()
    if rare is not None and float(rare) * samples < EVENTS:
        raise NotJudged("the model is so sure of its labels that sampled ones seldom differ")


def _scored(p: Problem, found: list[float], expected: float, why: str) -> Outcome:
    mean = sum(found) / len(found)
    error = (sum((x - mean) ** 2 for x in found) / (len(found) - 1) / len(found)) ** 0.5
    return Outcome(abs(mean - expected) / max(error + p.allowed * abs(expected), 1e-30), SCORE, why)


def _worst(found: dict[str, float], allowed: float) -> str:
    return ", ".join(f"{name} {error:.1e}" for name, error in found.items() if not error <= allowed)
