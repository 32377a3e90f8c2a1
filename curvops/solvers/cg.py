"""Conjugate gradients for many right-hand sides at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvops.lengths import lengths
from curvops.solvers.descent import solved
from curvops.solvers.solution import Solution
from curvops.solvers.system import System


def cg(
    matrix: Any,
    b: Any,
    *,
    damping: float = 0.0,
    preconditioner: Any = None,
    x0: Any = None,
    tolerance: float | None = None,
    max_iterations: int | None = None,
    progressbar: bool = False,
) -> Solution:
    """Solve (A + δI) x = b with A + δI symmetric positive definite.

    One column: Hestenes & Stiefel 1952. Several: the block method (O'Leary 1980) with orthonormal residuals (Dubrulle
    2001), in which all columns search the space of all; what depends linearly on other columns leaves it.

    Memory: about ten blocks of the size of b.

    Args:
        matrix: A: anything with a shape and products.
        b: Right-hand sides, in any format of the matrix.
        damping: δ ≥ 0.
        preconditioner: A symmetric positive definite matrix close to (A + δI)⁻¹, such as ``kfac.inverse(damping)``,
            or a tensor ``[D]``, the diagonal of one.
        x0: Where to start, in the format of b; at zero if not given.
        tolerance: Largest relative residual ‖b − (A + δI) x‖ / ‖b‖ of each column; 1e-6 if not given, or a hundred
            times the dtype's precision if that is more, and 1e-2 at most.
        max_iterations: Most iterations; ten times the dimension and at most 1000 if not given.
        progressbar: Show a bar that counts products (needs ``tqdm``).

    Raises:
        ValueError: If the matrix declares that it is not symmetric, or without damping not psd; if an option or a
            format does not fit; if b or a product is not finite.

    Example:
        >>> import torch
        >>> from curvops.solvers.cg import cg
        >>> solution = cg(torch.diag(torch.tensor([1.0, 2.0, 4.0])), torch.ones(3))
        >>> solution.iterations, solution.x
        (3, tensor([1.0000, 0.5000, 0.2500]))
    """
    system = System(
        "cg",
        matrix,
        b,
        damping=damping,
        preconditioner=preconditioner,
        x0=x0,
        tolerance=tolerance,
        max_iterations=max_iterations,
        symmetric=True,
        progressbar=progressbar,
    )
    if getattr(matrix, "psd", None) is False and not damping:
        raise ValueError(
            f"cg: expected a positive semi-definite matrix, got {system.products.name}, which does not declare itself psd. Use minres, "
            "or a damping that makes it positive definite."
        )
    with system:
        return solved(system, _descent)


def _descent(system: System, x: Tensor, residual: Tensor, limit: int) -> tuple[int, str]:
    """The residuals are Q S, with QᵀMQ = I; the directions P are conjugate from one iteration to the next."""
    q, s = residual, torch.diag(lengths(residual)).sign().to(x.dtype)  # a column that is solved stays as it is
    p = None
    for iteration in range(1, limit + 1):
        z = system.preconditioned(q)
        gram = q.mT @ z
        if not gram.isfinite().all():
            return iteration - 1, "squares of the residual overflow: leave x0 out, or scale the right side"
        values, vectors = _eigh(gram)
        if values[0] < -(system.eps**0.5) * values[-1] or not values[-1] > 0:
            return iteration - 1, "the preconditioner is not positive definite (rᵀMr ≤ 0): damp it more"
        values, vectors = (part[..., values > len(values) * system.eps * values[-1]] for part in (values, vectors))
        q, z = (part @ (vectors / values.sqrt()) for part in (q, z))
        change = (vectors * values.sqrt()).mT
        s, p = change @ s, z if p is None else z + p @ change.mT

        product = system(p)
        curvatures, vectors = _eigh(p.mT @ product)
        lowest, rounding = float(curvatures[0] / lengths(p @ vectors[:, :1]) ** 2), system.eps * float(system.largest)
        if lowest <= rounding:
            return iteration - 1, _why(lowest, rounding)
        step = (vectors / curvatures) @ vectors.mT
        x += p @ (step @ s)
        q = q - product @ step
        if (lengths(q @ s) <= system.within_reach(x)).all():
            return iteration, ""
    return limit, ""


def _eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh((gram + gram.mT) / 2)
    return values, vectors


def _why(curvature: float, rounding: float) -> str:
    if curvature < -10 * rounding:
        return f"the matrix is indefinite: pᵀAp / pᵀp = {curvature:.2e}. Use minres, or add more damping than that"
    return "the matrix is singular, but for rounding, where b is not zero: add damping"
