"""A basis of a matrix's range from products with random vectors, with any one of them left out."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from curvops.estimators.probes import Probes

SKETCH = ("sketch.tests", "sketch.images", "sketch.basis", "sketch.product")  # what is known where there is a sketch


class LeaveOut(NamedTuple):
    """Projections onto the range of all products but one or two, as downdates of that onto the range of all.

    Without product j it is QQᵀ − Qs_j s_jᵀQᵀ (Epperly, Tropp & Webber 2023); without i too it also loses the part of
    s_i that is orthogonal to s_j, u_ij = (s_i − c_ij s_j) / √(1 − c_ij²).

    Attributes:
        basis: Q ``[D, r]``, orthonormal columns.
        product: AQ, or AᵀQ, ``[D, r]``.
        images: Qᵀ of the products ``[r, m]``.
        only: s ``[r, m]``: the unit vector that is in the range by the product itself alone, or zero where the others
            span it too, as they do where m is more than the rank.
        cosines: c = sᵀs ``[m, m]``, with zeros on its diagonal.
        sines: 1 − c², squares of sines.
    """

    basis: Tensor
    product: Tensor
    images: Tensor
    only: Tensor
    cosines: Tensor
    sines: Tensor

    def of_second(self, values: Tensor) -> Tensor:
        """From values ``[m, m]`` that are linear in s_i, for each j, those in u_ij."""
        return (values - self.cosines * values.diagonal()) / self.sines.sqrt()

    def of_second_squared(self, values: Tensor) -> Tensor:
        """From values ``[m, m]`` of a form in s_i and s_j its values at u_ij, twice."""
        own = values.diagonal()
        crossed = self.cosines * (values + values.mT)
        return (own[:, None] - crossed + self.cosines.square() * own) / self.sines


class Sketch:
    """Test vectors Ω, their products Y = AΩ, a basis Q of Y's range, and AQ (or AᵀQ); two products a vector.

    Vectors that are added extend the basis, so that no product is taken twice.
    """

    def __init__(self, probes: Probes, *, adjoint: bool = False) -> None:
        self.probes, self._adjoint = probes, adjoint
        self.tests, self.images, self.basis, self.product = (probes.empty() for _ in range(4))

    def add(self, tests: Tensor) -> None:
        """Extend by test vectors ``[D, k]``."""
        images = self.probes.times(tests)
        # Householder's QR keeps the old columns (but for signs), and makes orthogonal ones even where rank is lacking
        new = torch.linalg.qr(torch.cat([self.basis, images], 1)).Q[:, self.basis.shape[1] :]
        self.product = torch.cat([self.product, self.probes.times(new, adjoint=self._adjoint)], 1)
        self.tests = torch.cat([self.tests, tests], 1)
        self.images = torch.cat([self.images, images], 1)
        self.basis = torch.cat([self.basis, new], 1)

    def leave_out(self) -> LeaveOut:
        """The projections; directions that the products span only by rounding are dropped."""
        left, values, right = torch.linalg.svd(self.basis.mT @ self.images, full_matrices=False)
        eps = torch.finfo(values.dtype).eps
        kept = values > values.max() * eps * len(self.basis) ** 0.5
        left, values, right = left[:, kept], values[kept], right[kept]
        needed = 1 - right.square().sum(0) < eps**0.5  # the vector's leverage is one
        # relative to the largest: the matrix may be of any scale
        s = torch.nn.functional.normalize(right / (values / values[:1])[:, None], dim=0) * needed
        cosines = (s.mT @ s).fill_diagonal_(0)
        sines = (1 - cosines.square()).clamp(min=eps)
        return LeaveOut(self.basis @ left, self.product @ left, values[:, None] * right, s, cosines, sines)
