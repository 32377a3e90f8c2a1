"""Equations whose matrix has an inverse at hand, which rounding makes inexact."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from curvops.solvers.descent import solved
from curvops.solvers.solution import Solution
from curvops.solvers.system import System


def direct(matrix: Any, b: Any, inverse: Any, *, tolerance: float | None = None) -> Solution:
    """Solve A x = b by its inverse, with refinement (Wilkinson 1963) while the residual exceeds the tolerance and halves.

    Args:
        matrix: A: anything square with a shape and products.
        b: Right-hand sides, in any format of the matrix.
        inverse: A⁻¹, likewise; its products are not counted.
        tolerance: As of `cg`.

    Raises:
        ValueError: If the tolerance or a format does not fit; if b or a product is not finite.

    Example:
        >>> import torch
        >>> from curvops.solvers.direct import direct
        >>> matrix = torch.diag(torch.tensor([1.0, 2.0, 4.0]))
        >>> direct(matrix, torch.ones(3), torch.linalg.inv(matrix)).x
        tensor([1.0000, 0.5000, 0.2500])
    """
    system = System("solve", matrix, b, damping=0.0, preconditioner=inverse, tolerance=tolerance, max_iterations=None)
    with system:
        return solved(system, _refined)


def _refined(system: System, x: Tensor, residual: Tensor, limit: int) -> tuple[int, str]:
    x += system.preconditioned(residual)
    return 1, ""
