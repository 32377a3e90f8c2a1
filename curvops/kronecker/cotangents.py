"""Which cotangents a batch's output factor is pulled back by, and how many backward passes that takes."""

from __future__ import annotations

import torch
from torch import Tensor

from curvops.losses import Factor, Noise, OutputCurvature

LIMIT = 1024  # backward passes a batch up to which terms are squared separately


class Cotangents:
    """Columns of S as output-shaped cotangents, at most one loss term a datum in each, or signed sums.

    Terms are squared separately. Where that takes more than `LIMIT` backward passes, the terms of a datum
    share one with independent random signs, so that cross terms vanish in expectation. Monte-Carlo samples
    are independent and have mean zero, so they share one anyway.

    Args:
        curvature: The loss at the batch's output.
        factor: Its output factor.
        kind: The factor's kind.
        noise: Randomness of the signs.
        size: Number of data that the terms are divided among; 1 where a batch is seen as one datum.
    """

    def __init__(self, curvature: OutputCurvature, factor: Factor, kind: str, noise: Noise, size: int) -> None:
        self._curvature, self._factor, self._size = curvature, factor, size
        self.terms = factor.num_terms // size
        self.shared = kind == "mc" or self.terms == 1
        self.signed = not self.shared and self.terms * factor.num_columns > LIMIT
        self._signs: Tensor | None = None
        if self.signed:
            self._signs = noise.signs(
                factor.num_terms, curvature.terms_per_datum, factor.num_columns, device=curvature.z.device
            )

    def __len__(self) -> int:
        return self._factor.num_columns * (1 if self.shared or self.signed else self.terms)

    def __getitem__(self, position: int) -> Tensor:
        """One cotangent, of the output's shape."""
        if self.shared:
            return self._curvature.outputs(self._factor.column(position))
        if self._signs is not None:
            column = self._factor.column(position)
            return self._curvature.outputs(column * self._signs[:, position, None].to(column))
        k, r = divmod(position, self.terms)
        rows = self._factor.column(k).unflatten(0, (self._size, self.terms))
        alone = torch.zeros_like(rows)
        alone[:, r] = rows[:, r]
        return self._curvature.outputs(alone.flatten(0, 1))
