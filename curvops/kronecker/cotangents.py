"""Which cotangents a batch's output factor is pulled back by, and how many backward passes that takes."""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor

from curvops.losses import Factor, Noise, OutputCurvature


class Cotangents:
    """Columns of S as output-shaped cotangents, at most one loss term a datum in each, or signed sums.

    Terms are squared separately. Where that takes more than ``most`` backward passes, the terms of a datum
    share one with independent random signs, so that cross terms vanish in expectation. Monte-Carlo samples
    are independent and have mean zero, so they share one anyway.

    Terms are divided among ``size`` data; one where a batch is seen as one datum.
    """

    def __init__(
        self, curvature: OutputCurvature, factor: Factor, kind: str, noise: Noise, size: int, most: int
    ) -> None:
        self._curvature, self._factor, self._size = curvature, factor, size
        self.terms = factor.num_terms // size
        self.shared = kind == "mc" or self.terms == 1
        self.signed = not self.shared and self.terms * factor.num_columns > most
        self._signs: Tensor | None = None
        self._datum: int | None = None
        if self.signed:
            self._signs = noise.signs(
                factor.num_terms, curvature.terms_per_datum, factor.num_columns, device=curvature.z.device
            )

    def of_datum(self, n: int) -> Cotangents:
        """The same for a pass of one datum."""
        one = copy(self)
        one._datum = n
        return one

    def __len__(self) -> int:
        return self._factor.num_columns * (1 if self.shared or self.signed else self.terms)

    def __getitem__(self, position: int) -> Tensor:
        """One cotangent, of the output's shape."""
        if self.shared or self._signs is not None:
            rows = self._factor.column(position)
            rows = rows if self._signs is None else rows * self._signs[:, position, None].to(rows)
        else:
            k, r = divmod(position, self.terms)
            column = self._factor.column(k).unflatten(0, (self._size, self.terms))
            rows = torch.zeros_like(column)
            rows[:, r] = column[:, r]
            rows = rows.flatten(0, 1)
        u = self._curvature.outputs(rows)
        n = self._datum
        return u if n is None else u.unflatten(0, (self._size, -1))[n]
