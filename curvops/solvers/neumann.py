"""The truncated Neumann series."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from curvops.lengths import lengths
from curvops.solvers.solution import Solution
from curvops.solvers.system import System

GROWTH = 10.0  # of the residual over its least so far, from which on the series is given up


def neumann(
    matrix: Any,
    b: Any,
    *,
    num_terms: int = 100,
    scale: float = 1.0,
    damping: float = 0.0,
    preconditioner: Any = None,
    tolerance: float | None = None,
    progressbar: bool = False,
) -> Solution:
    """x = s Σ_k (I − s M (A + δI))ᵏ M b, a truncated series for (A + δI)⁻¹ b (Lorraine et al. 2020, arXiv 1911.02590).

    It is linear in b, and shrinks x along small eigenvalues, as early stopping of gradient descent does. It converges
    for 0 < s < 2 / λ_max of a positive definite M (A + δI). Memory: five blocks of the size of b.

    Args:
        matrix: A: anything square with a shape and products.
        b: Right-hand sides, in any format of the matrix.
        num_terms: Terms, a product each.
        scale: s > 0.
        damping: δ ≥ 0.
        preconditioner: M, a matrix close to (A + δI)⁻¹, or a tensor ``[D]``, the diagonal of one; I if not given.
        tolerance: Relative residual ‖b − (A + δI) x‖ / ‖b‖ to reach, where the series ends early. Not given, the
            series is what was asked for, and `Solution.converged` tells whether its terms shrink.
        progressbar: Show a bar that counts products (needs ``tqdm``).

    Raises:
        ValueError: If an option or a format does not fit; if b or a product is not finite.

    Example:
        >>> import torch
        >>> from curvops.solvers.neumann import neumann
        >>> neumann(torch.eye(2), torch.ones(2), num_terms=3, scale=0.5).x
        tensor([0.8750, 0.8750])
    """
    if not 0 < scale < float("inf"):
        raise ValueError(f"neumann: scale: expected a finite number > 0, got {scale!r}.")
    if not isinstance(num_terms, int) or num_terms < 1:
        raise ValueError(f"neumann: num_terms: expected an integer ≥ 1, got {num_terms!r}.")
    system = System(
        "neumann",
        matrix,
        b,
        damping=damping,
        preconditioner=preconditioner,
        tolerance=tolerance or 0.0,
        max_iterations=num_terms,
        progressbar=progressbar,
    )
    with system:
        x, residual = system.start()
        before = least = current = lengths(residual)
        terms = 0
        while terms < system.max_iterations and (current > system.tolerance).any():
            term = scale * system.preconditioned(residual)
            x += term
            residual -= system(term)
            terms, before, current = terms + 1, current, lengths(residual)
            least = least.minimum(current)
            if (current > GROWTH * least.clamp(min=system.eps)).any():
                break
        rounding = 10 * system.eps
        grown = bool((current > before.clamp(min=rounding)).any())
        stays = bool((current > (before * (1 - rounding)).clamp(min=rounding)).any())
        within = bool((current <= system.tolerance).all())
        converged = not grown and (within or (tolerance is None and not stays))
        return system.solution(x, residual, terms, converged, _why(system, terms, current, (grown, stays, within)))


def _why(system: System, terms: int, residual: Tensor, state: tuple[bool, bool, bool]) -> str:
    grown, stays, within = state
    if grown:
        bound = "" if system.preconditioner is not None else f", which is below {2 / float(system.largest):.1e}"
        return f"the series diverges, its terms grow: take a smaller scale, below 2 / λ_max{bound}, or minres or cg"
    if within:
        return f"each residual is at most {system.tolerance:g}"
    if stays:
        return (
            "the terms do not shrink: the matrix is singular where b is not zero, or the scale is 2 / λ_max: take a smaller scale, or "
            "add damping"
        )
    most = float(residual.max()) if len(residual) else 0.0
    return f"all {terms} terms are summed, which leaves a residual of {most:.1e}: for less take more num_terms"
