"""Minimal residuals for symmetric matrices that may be indefinite."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from curvops.lengths import dots, lengths, power_of_two
from curvops.solvers.descent import solved
from curvops.solvers.solution import Solution
from curvops.solvers.system import System

_INDEFINITE = "the preconditioner is not positive definite (rᵀMr ≤ 0): damp it more"
_SINGULAR = "the matrix is singular, but for rounding, where b is not zero: x minimises the residual{norm}; add damping"


def minres(
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
    """Solve (A + δI) x = b with A symmetric (Paige & Saunders 1975; preconditioned: Elman, Silvester & Wathen 2014).

    Columns are iterated together and leave as they converge. Memory: about twenty blocks of the size of b.

    Args:
        matrix: A: anything with a shape and products.
        b: Right-hand sides, in any format of the matrix.
        damping: δ ≥ 0.
        preconditioner: A symmetric positive definite matrix, close to (A + δI)⁻¹ or that of its absolute value, or a
            tensor ``[D]``, the diagonal of one.
        x0: Where to start, in the format of b; at zero if not given.
        tolerance: Largest relative residual ‖b − (A + δI) x‖ / ‖b‖ of each column; 1e-6 if not given, or a hundred
            times the dtype's precision if that is more, and 1e-2 at most.
        max_iterations: Most iterations; ten times the dimension and at most 1000 if not given.
        progressbar: Show a bar that counts products (needs ``tqdm``).

    Raises:
        ValueError: If the matrix declares that it is not symmetric; if an option or a format does not fit; if b or a
            product is not finite.

    Example:
        >>> import torch
        >>> from curvops.solvers.minres import minres
        >>> minres(torch.diag(torch.tensor([1.0, -2.0])), torch.ones(2)).x
        tensor([ 1.0000, -0.5000])
    """
    system = System(
        "minres",
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
    with system:
        return solved(system, _descent)


class _State(NamedTuple):
    """Of the columns still iterated: Lanczos vectors v and z = M v, directions w, residual r, rotations c and s."""

    live: Tensor
    r: Tensor
    v: Tensor
    v_old: Tensor
    z: Tensor
    w: Tensor
    w_old: Tensor
    gamma: Tensor  # the last off-diagonal entry
    eta: Tensor  # what is left of the residual, in M's norm
    c: Tensor
    c_old: Tensor
    s: Tensor
    s_old: Tensor
    singular: Tensor  # whether A w vanishes, but for rounding


def _descent(system: System, x: Tensor, residual: Tensor, limit: int) -> tuple[int, str]:
    z = system.preconditioned(residual)
    square, none, one = dots(residual, z), torch.zeros_like(residual), torch.ones_like(residual[0])
    if ((square < 0) | (square == 0) & (lengths(residual) > system.within_reach(x))).any():
        return 0, _INDEFINITE
    gamma, zero = square.sqrt().to(x.dtype), torch.zeros_like(one)
    unit, live = _inverse(gamma), torch.arange(x.shape[1], device=x.device)
    vectors = residual, residual * unit, none, z * unit, none, none
    state = _State(live, *vectors, gamma, gamma, one, one, zero, zero, zero > 0)
    reason = ""
    for iteration in range(limit + 1):
        going = lengths(state.r) > system.within_reach(x[:, state.live])
        if (going & state.singular).any():
            reason = _SINGULAR.format(norm="" if system.preconditioner is None else " in the preconditioner's norm")
        state = _State(*(part[..., going & ~state.singular] for part in state))
        if not len(state.live) or iteration == limit:
            break
        following = _step(system, x, state)
        if following is None:
            return iteration, _INDEFINITE
        state = following
    return iteration, reason


def _step(system: System, x: Tensor, t: _State) -> _State | None:
    product = system(t.z)
    delta = dots(t.z, product).to(x.dtype)
    v = product - delta * t.v - t.gamma * t.v_old
    z = system.preconditioned(v)
    scale = power_of_two(v, 0)
    square = dots(v / scale, z / scale)
    if (square < 0).any():
        return None
    gamma = square.sqrt().to(x.dtype) * scale
    v, z = v * _inverse(gamma), z * _inverse(gamma)
    # the tridiagonal matrix's new column under the two rotations before, and the one that clears γ
    first, second, third = (
        t.c * delta - t.c_old * t.s * t.gamma,
        t.s * delta + t.c_old * t.c * t.gamma,
        t.s_old * t.gamma,
    )
    diagonal = torch.hypot(first, gamma)
    c, s = first * _inverse(diagonal), gamma * _inverse(diagonal)
    w = (t.z - third * t.w_old - second * t.w) * _inverse(diagonal)
    # r − c η A w is the next residual
    singular = lengths(c / t.eta * t.r + s * v) <= 100 * system.eps * system.largest * lengths(w)
    x[:, t.live] += torch.where(singular, 0.0, c * t.eta) * w
    eta = -s * t.eta
    # where A w is zero the rotation is none, and the residual stays
    r = torch.where(diagonal == 0, t.r, s * s * t.r + c * eta * v)
    return _State(t.live, r, v, t.v, z, w, t.w, gamma, eta, c, t.c, s, t.s, singular)


def _inverse(numbers: Tensor) -> Tensor:
    """Reciprocals, of zeros zero: the Krylov space ends there."""
    return torch.where(numbers == 0, 0.0, 1 / numbers)
