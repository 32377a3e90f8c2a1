"""Least squares and non-symmetric equations."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from curvops.lengths import lengths
from curvops.solvers.solution import Solution
from curvops.solvers.system import System


def lsmr(
    matrix: Any,
    b: Any,
    *,
    damping: float = 0.0,
    tolerance: float | None = None,
    max_iterations: int | None = None,
    progressbar: bool = False,
) -> Solution:
    """Minimise ‖A x − b‖² + δ ‖x‖² for any A: LSMR (Fong & Saunders 2011, arXiv 1006.0758).

    That is (AᵀA + δI) x = Aᵀ b, where δ is the square of SciPy's ``damp``. Of several solutions it finds the shortest.
    Columns are iterated together and leave as they converge. Memory: about eight blocks of the size of x and
    ten of the size of b.

    Args:
        matrix: A ``[m, n]``: anything with a shape, products and an adjoint (``adjoint()``, ``mT`` or ``T``).
        b: Right-hand sides, in any format of what the matrix gives.
        damping: δ ≥ 0, in units of A².
        tolerance: As of `cg`. A column is solved once ‖b − A x‖ ≤ tolerance · ‖b‖, or once the gradient of what is minimised is at
            most tolerance · ‖A‖ times the root of its value. `Solution.residual` is ‖b − A x‖ / ‖b‖ without the damping.
        max_iterations: Most iterations; ten times the larger side and at most 1000 if not given.
        progressbar: Show a bar that counts products (needs ``tqdm``).

    Raises:
        ValueError: If an option or a format does not fit; if b or a product is not finite.

    Example:
        >>> import torch
        >>> from curvops.solvers.lsmr import lsmr
        >>> lsmr(torch.tensor([[1.0], [1.0]]), torch.tensor([1.0, 3.0])).x.round(decimals=4)
        tensor([2.])
    """
    system = System(
        "lsmr",
        matrix,
        b,
        damping=damping,
        tolerance=tolerance,
        max_iterations=max_iterations,
        square=False,
        progressbar=progressbar,
    )
    with system:
        x, residual = system.start()
        state, iterations = _first(system, residual), 0
        while True:
            state = _State(*(part[..., ~_solved(system, x, state)] for part in state))
            if not len(state.live) or iterations == system.max_iterations:
                break
            state, iterations = _step(system, x, state), iterations + 1
        residual = system.b - system.undamped(x)
        if len(state.live):
            reason = f"no convergence in {iterations} iterations: increase max_iterations, or add damping"
        elif (lengths(residual) <= system.tolerance).all():
            reason = f"each residual is at most {system.tolerance:g}"
        else:
            reason = "each column is a solution of the least-squares problem, to the tolerance"
        return system.solution(x, residual, iterations, not len(state.live), reason)


class _State(NamedTuple):
    """Of the columns still iterated: bidiagonalisation (u, v, α), directions h, h̄ with their images, rotations."""

    live: Tensor
    residual: Tensor
    u: Tensor
    v: Tensor
    h: Tensor
    h_bar: Tensor
    image: Tensor  # A h
    image_bar: Tensor  # A h̄
    alpha: Tensor
    alpha_bar: Tensor
    zeta_bar: Tensor  # length of the gradient, but for its sign
    rho: Tensor
    rho_bar: Tensor
    c_bar: Tensor
    s_bar: Tensor
    ratio: Tensor  # θ / ρ, by which the last h enters the next
    norm: Tensor  # ‖A‖ so far, in the Frobenius norm of the bidiagonal matrix


def _first(system: System, residual: Tensor) -> _State:
    beta, u = _unit(residual)
    alpha, v = _unit(system.adjoint(u))
    one, zero = torch.ones_like(beta), torch.zeros_like(beta)
    live, none, image = torch.arange(len(beta), device=beta.device), torch.zeros_like(v), torch.zeros_like(u)
    vectors = residual, u, v, none, none, image, image
    rotations = alpha, alpha * beta, one, one, one, zero, zero
    return _State(live, *vectors, alpha, *rotations, torch.hypot(alpha, torch.full_like(alpha, system.damping**0.5)))


def _solved(system: System, x: Tensor, t: _State) -> Tensor:
    residual = lengths(t.residual).to(x.dtype)
    value = torch.hypot(residual, system.damping**0.5 * lengths(x[:, t.live]).to(x.dtype))
    return (residual <= system.tolerance) | (t.zeta_bar.abs() <= system.tolerance * t.norm * value)


def _step(system: System, x: Tensor, t: _State) -> _State:
    product = system.undamped(t.v)
    h, image = t.v - t.ratio * t.h, product - t.ratio * t.image
    beta, u = _unit(product - t.alpha * t.u)
    alpha, v = _unit(system.adjoint(u) - beta * t.v)
    damped = torch.hypot(t.alpha_bar, torch.full_like(beta, system.damping**0.5))
    rho = torch.hypot(damped, beta)
    c, s = damped / rho, beta / rho
    theta = s * alpha
    rho_bar = torch.hypot(t.c_bar * rho, theta)
    c_bar, s_bar = t.c_bar * rho / rho_bar, theta / rho_bar
    zeta = c_bar * t.zeta_bar
    back = t.s_bar * (rho / t.rho) * (rho / t.rho_bar)
    h_bar, image_bar = h - back * t.h_bar, image - back * t.image_bar
    length = zeta / rho / rho_bar
    x[:, t.live] += length * h_bar
    residual = t.residual - length * image_bar
    norm = torch.hypot(t.norm, torch.hypot(alpha, beta))
    rotations = c * alpha, -s_bar * t.zeta_bar, rho, rho_bar, c_bar, s_bar, theta / rho
    return _State(t.live, residual, u, v, h, h_bar, image, image_bar, alpha, *rotations, norm)


def _unit(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Lengths, and the columns of length one; of a zero column zero."""
    found = lengths(columns).to(columns.dtype)
    return found, columns / torch.where(found > 0, found, 1.0)
