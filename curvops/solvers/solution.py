"""What a linear solver answers: the solution, how good it is, what it took, and why it stopped."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from curvops.display import card


@dataclass(frozen=True)
class Solution:
    """A solution of A x = b with its evidence.

    Attributes:
        x: The solution, in the format of b.
        residual: ‖b − A x‖ / ‖b‖ of each column, ``[K]``, with the damped A, from a product with x; 0 where b is 0.
        products: Products with A and Aᵀ that were taken, one a column.
        iterations: Iterations of the column that took most.
        converged: Whether each column is what was asked for.
        reason: Why the solver stopped, and what helps if it did not converge.
    """

    x: Any = field(repr=False)
    residual: Tensor
    products: int
    iterations: int
    converged: bool
    reason: str

    def _repr_html_(self) -> str:
        residuals = ", ".join(f"{value:.1e}" for value in self.residual.flatten()[:8].tolist())
        more = f", … ({self.residual.numel()} columns)" if self.residual.numel() > 8 else ""
        took = f"{self.products} products, {self.iterations} iterations"
        facts = [("residual", residuals + more), ("took", took), ("stopped", self.reason)]
        return card("Solution" if self.converged else "Solution, not converged", facts)
