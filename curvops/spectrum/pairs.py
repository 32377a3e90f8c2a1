"""Eigenvalues with their eigenvectors, residuals, and what they took."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from curvops.display import card, table

CONVERGED = "converged"
SHOWN = 8  # values in print


@dataclass(frozen=True)
class EigenPairs:
    """Some eigenpairs A v = λ v of a symmetric matrix, or A v = λ B v; unpacks to ``values, vectors``.

    Attributes:
        values: Ascending, ``[k]``.
        vectors: Orthonormal columns (B-orthonormal where there is a metric B), ``[D, k]``.
        residuals: ‖A v − λ v‖ of each, absolute, ``[k]``. With a metric ‖B⁻¹ A v − λ v‖ in its norm. An eigenvalue lies
            no farther than this from λ, and much closer where others are far away; one that is no larger than this may have another sign.
        products: Products with the matrix that were taken, one a column.
        converged: Whether each residual is at most ``tolerance`` times the largest ``|eigenvalue|`` that was seen.
        reason: Why the computation ended, and what helps if that was too early.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    products: int
    converged: bool
    reason: str
    domain: Any = field(default=None, repr=False)

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.values, self.vectors))

    def __repr__(self) -> str:
        shown = [f"{value:.6g}" for value in self.values.tolist()]
        values = ", ".join(shown if len(shown) <= SHOWN else [*shown[: SHOWN // 2], "…", *shown[-SHOWN // 2 :]])
        count = f" ({len(shown)})" if len(shown) > SHOWN else ""
        residual = f"{float(self.residuals.max()):.1e}" if len(shown) else "none"
        took = f"products={self.products}, converged={self.converged}, reason={self.reason + self._signs()!r}"
        return f"EigenPairs(values=[{values}]{count}, residual={residual}, {took})"

    def _signs(self) -> str:
        """What is said of values that residuals do not tell from zero."""
        small = int(((self.values.abs() <= self.residuals) & (self.residuals > 0)).sum())
        return f"; the sign is not told of {small} of {len(self)}, no larger than their residuals" if small else ""

    def _repr_html_(self) -> str:
        rows = [
            (f"{value:.6g}", f"{residual:.1e}")
            for value, residual in zip(self.values.tolist(), self.residuals.tolist(), strict=True)
        ]
        facts = [("vectors", " × ".join(map(str, self.vectors.shape))), ("took", f"{self.products} products")]
        title = f"{len(self)} eigenpairs{'' if self.converged else ', not converged'}"
        return card(
            title, [*facts, ("stopped", self.reason + self._signs())], more=table(("eigenvalue", "residual"), rows)
        )

    def __len__(self) -> int:
        return len(self.values)

    def named(self, index: int) -> dict[str, Tensor]:
        """An eigenvector as tensors by name, where the matrix is one of named tensors.

        Args:
            index: Which, as in ``values``.

        Raises:
            TypeError: If the matrix knows no names.
        """
        if not hasattr(self.domain, "split"):
            raise TypeError("named: the matrix has no 'domain' that names tensors. Use the columns of 'vectors'.")
        return dict(zip(self.domain.names, self.domain.split(self.vectors[:, index].clone()), strict=True))
