"""Monte-Carlo and Kronecker operators against what they approximate."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from curvops.clients.checks.problem import Problem
from curvops.clients.checks.products import DENSE, Outcome, definition, worst
from curvops.clients.checks.twin import NotJudged
from curvops.kronecker.diagonal import GGNDiagonalLinearOperator
from curvops.kronecker.kfac import EKFACLinearOperator, KFACLinearOperator
from curvops.kronecker.operator import KroneckerOperator
from curvops.losses.cross_entropy import CrossEntropyCurvature
from curvops.losses.entries import BinaryCrossEntropyCurvature
from curvops.matrix import seeded
from curvops.products.account import relative_difference
from curvops.products.ggn import GGNLinearOperator
from curvops.space import TensorSpace

SEEDS = 16  # of Monte-Carlo operators
SAMPLES = 2**22  # entries of a Monte-Carlo factor
SCORE = 5.0  # standard errors that a mean may be off
EVENTS = 25  # samples of another label than the likeliest, on average, that a mean asks for
SCALE = 300.0  # factor that a trace of KFAC may be off


def monte_carlo(p: Problem) -> Outcome:
    """The mean over seeds of vᵀ F v is vᵀ G v, in standard errors."""
    v = p.vectors[0]
    _expect_factor(p)
    samples = max(1, min(1024, SAMPLES // max(1, p.z.numel())))
    _expect_samples(p, SEEDS * samples)
    expected = float(v @ (GGNLinearOperator.of(p.risk) @ v))
    found = [float(v @ (GGNLinearOperator.of(p.risk, mc_samples=samples, seed=p.seed + k) @ v)) for k in range(SEEDS)]
    return _scored(p, found, expected, f"{SEEDS} seeds of {samples} samples")


def diagonal(p: Problem) -> Outcome:
    """Each entry, against the rows Sᵀ J of the twin."""
    exact = p.diagonal
    operator = GGNDiagonalLinearOperator.of(p.risk)
    _expect_consistent(p, operator)
    return Outcome(relative_difference(operator.diagonal().double(), exact), definition(p))


def traces(p: Problem) -> Outcome:
    """Type-2 EKFAC keeps the GGN's trace of each parameter's block."""
    exact, (operator, chosen, why) = _by_parameter(p.diagonal, p.risk.space), _of_small(p, EKFACLinearOperator)
    _expect_consistent(p, operator)
    g = exact[chosen]
    error = (_by_parameter(operator.diagonal(), operator.domain) - g).abs() / (g + 1e-9 * exact.sum()).clamp(min=1e-30)
    return Outcome(float(error.max()), definition(p), why)


def scaled(cls: type[KroneckerOperator]) -> Callable[[Problem], Outcome]:
    """Each block is positive semi-definite, and its trace within a factor of the GGN's."""

    def judged(p: Problem) -> Outcome:
        exact, (operator, chosen, why) = _by_parameter(p.diagonal, p.risk.space), _of_small(p, cls)
        _expect_consistent(p, operator)
        v = operator.domain.random(seeded(p.seed))
        blocks, traces = (_by_parameter(t, operator.domain) for t in (v * (operator @ v), operator.diagonal()))
        if bool((blocks < -p.allowed * traces).any()):
            raise RuntimeError("a block is not positive semi-definite")
        seen = exact[chosen] > 1e-9 * exact.sum()
        ratio = traces[seen] / exact[chosen][seen]
        return Outcome(float(torch.maximum(ratio, 1 / ratio).max()) if seen.any() else 1.0, SCALE, why)

    return judged


def monte_carlo_kfac(p: Problem) -> Outcome:
    """The mean over seeds of vᵀ K v is that of type-2 KFAC, in standard errors."""
    _ = p.diagonal  # there is a factor
    samples = 8 if p.risk.space.dim <= 100_000 else 1
    _expect_samples(p, SEEDS * samples)
    operator, _, why = _of_small(p, KFACLinearOperator)
    kfac = KFACLinearOperator.of(operator.risk, mc_samples=samples, seed=p.seed)
    v = operator.domain.random(seeded(p.seed))
    expected = float(v @ (operator @ v))
    found = [float(v @ (kfac.refresh(seed=p.seed + k) @ v)) for k in range(SEEDS)]
    why = "; ".join(filter(None, (f"{SEEDS} seeds of {samples} samples", why)))
    return _scored(p, found, expected, why)


def _of_small(p: Problem, cls: type[KroneckerOperator]) -> tuple[KroneckerOperator, list[int], str]:
    """A type-2 operator of the parameters that it can decompose in seconds, their places, and how many."""
    names, chosen = p.risk.space.names, set(p.small())
    places = [k for k, name in enumerate(names) if name in chosen]
    if not places:
        raise NotJudged("eigendecompositions of the layers' factors would take long")
    risk = p.risk if len(places) == len(names) else p.risk.restricted([names[k] for k in places])
    why = "" if risk is p.risk else f"{len(places)} of {len(names)} parameters: the rest's factors take long"
    return cls.of(risk, fisher_type="type-2"), places, why


def _by_parameter(flat: Tensor, space: TensorSpace) -> Tensor:
    """Sums of a vector's entries by parameter."""
    return torch.stack([part.sum() for part in flat.double().split(space.sizes)])


def _expect_consistent(p: Problem, operator: KroneckerOperator) -> None:
    """A RuntimeError where products, dense matrix and diagonal are not those of one symmetric matrix."""
    dim, generator = operator.domain.dim, seeded(p.seed)
    v, u = (operator.domain.random(generator) for _ in range(2))
    few = torch.randperm(dim, generator=generator, device="cpu")[:4].to(v.device)
    units = torch.zeros(dim, len(few), dtype=v.dtype, device=v.device)
    units[few, range(len(few))] = 1.0
    a, b = operator @ v, operator @ torch.stack([u, v], 1)
    scale = float(torch.maximum(a.norm() * u.norm(), b[:, 0].norm() * v.norm()).clamp(min=1e-30))
    found = {
        "columns": relative_difference(b[:, 1], a),
        "transpose": abs(float(torch.dot(u, a) - torch.dot(v, b[:, 0]))) / scale,
        "diagonal()": relative_difference((operator @ units)[few, range(len(few))], operator.diagonal()[few]),
    }
    if dim <= DENSE:
        found["to_dense()"] = relative_difference(operator.to_dense() @ v, a)
    if wrong := worst(found, p.allowed):
        raise RuntimeError(f"its products do not agree: {wrong}")


def _expect_factor(p: Problem) -> None:
    try:
        p.curvature.factor("type-2")
    except (ValueError, NotImplementedError) as error:
        raise NotJudged(str(error)) from error


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
