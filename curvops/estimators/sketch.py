"""A basis of a matrix's range from products with random vectors, with any one of them left out."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from curvops.estimators.probes import Probes


class LeaveOneOut(NamedTuple):
    """The projections QQᵀ − Q s sᵀ Qᵀ onto the range of all products but one (Epperly, Tropp & Webber 2023).

    Attributes:
        basis: Q ``[D, r]``, orthonormal columns.
        product: AQ, or AᵀQ, ``[D, r]``.
        images: Qᵀ of the products ``[r, m]``.
        left_out: s ``[r, m]``: the unit vector that is only in the range with the product itself, or zero where the
            others span it too, as they do where m is more than the rank.
    """

    basis: Tensor
    product: Tensor
    images: Tensor
    left_out: Tensor


class Sketch:
    """Test vectors Ω, their products Y = AΩ, a basis Q of Y's range, and AQ (or AᵀQ); two products a vector.

    Vectors that are added extend the basis, so that no product is taken twice.
    """

    def __init__(self, probes: Probes, *, adjoint: bool = False) -> None:
        self.probes, self._adjoint = probes, adjoint
        self.tests, self.images, self.basis, self.product = (probes.empty() for _ in range(4))

    def add(self, count: int) -> None:
        """Extend by new test vectors."""
        tests = self.probes.draw(count)
        images = self.probes.times(tests)
        # Householder's QR keeps the old columns (but for signs), and makes orthogonal ones even where rank is lacking
        new = torch.linalg.qr(torch.cat([self.basis, images], 1)).Q[:, self.basis.shape[1] :]
        self.product = torch.cat([self.product, self.probes.times(new, adjoint=self._adjoint)], 1)
        self.tests = torch.cat([self.tests, tests], 1)
        self.images = torch.cat([self.images, images], 1)
        self.basis = torch.cat([self.basis, new], 1)

    def leave_one_out(self) -> LeaveOneOut:
        """The projections; directions that the products span only by rounding are dropped."""
        left, values, right = torch.linalg.svd(self.basis.mT @ self.images, full_matrices=False)
        eps = torch.finfo(values.dtype).eps
        kept = values > values.max() * eps * len(self.basis) ** 0.5
        left, values, right = left[:, kept], values[kept], right[kept]
        only = 1 - right.square().sum(0) < eps**0.5  # the vector's leverage is one
        left_out = torch.nn.functional.normalize(right / values[:, None], dim=0) * only
        return LeaveOneOut(self.basis @ left, self.product @ left, values[:, None] * right, left_out)
