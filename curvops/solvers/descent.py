"""What iterations with a recurrence for the residual share: they end by the true one, and start again from it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from curvops.lengths import lengths
from curvops.solvers.solution import Solution
from curvops.solvers.system import System

#: Improves x in place from its residual by at most so many iterations; how many it took, and why it cannot go on.
Descent = Callable[[System, Tensor, Tensor, int], tuple[int, str]]


def solved(system: System, descent: Descent) -> Solution:
    """Descents until the true residuals are within the tolerance, each from where the one before ended.

    A recurrence drifts away from the true residual by rounding (Greenbaum 1997): another descent makes up for it
    while the true one still halves.
    """
    x, residual = system.start()
    iterations, before, reason = 0, math.inf, ""
    while not (worst := _worst(residual)) <= system.tolerance:
        reason = reason or _exhausted(system, x, residual, iterations, before)
        if reason:
            return system.solution(x, residual, iterations, False, reason)
        taken, reason = descent(system, x, residual, system.max_iterations - iterations)
        iterations, before, residual = iterations + taken, worst, system.residual(x)
    return system.solution(x, residual, iterations, True, f"each residual is at most {system.tolerance:g}")


def _exhausted(system: System, x: Tensor, residual: Tensor, iterations: int, before: float) -> str:
    """Why another descent would not help; empty if it may."""
    if not math.isfinite(_worst(residual)):
        return "squares of the residual overflow: leave x0 out, or scale the right side"
    remedy = "or add damping" if system.preconditioner is not None else "pass a preconditioner, or add damping"
    rounded = bool((lengths(residual) <= system.within_reach(x)).all())
    if iterations >= system.max_iterations and not rounded:
        return f"no convergence in {iterations} iterations: increase max_iterations, {remedy}"
    if rounded or _worst(residual) > before / 2:
        return (
            f"rounding in {system.products.dtype} keeps the residual at {_worst(residual):.1e}: ask for a larger "
            f"tolerance, a higher precision, {remedy}"
        )
    return ""


def _worst(residual: Tensor) -> float:
    # in its own precision, beside b of length one: from where that overflows there is no way back
    return float(torch.linalg.vector_norm(residual, dim=0).max()) if residual.shape[1] else 0.0
