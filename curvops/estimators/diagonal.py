"""The diagonal of a matrix, or of each of its diagonal blocks, from products with random signs."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from curvops.checkpoint import Checkpoint
from curvops.estimators.groups import Groups, resolve
from curvops.estimators.probes import Probes, error_of_leave_one_out
from curvops.estimators.rounds import Budget, Sampler, run
from curvops.estimators.sketch import SKETCH, LeaveOut, Sketch
from curvops.lengths import PART, lengths, power_of_two
from curvops.matrix import Matrix, Products


def diagonal(
    matrix: Matrix,
    *,
    method: Literal["xdiag", "hutchinson"] = "xdiag",
    num_products: int = 60,
    tolerance: float | None = None,
    max_products: int = 1000,
    seed: int = 0,
    groups: Groups = None,
    checkpoint: Checkpoint | None = None,
    progressbar: bool = False,
) -> Any:
    """Estimate the diagonal; exact from as many products as the matrix has columns.

    An unbiased estimate at any number of products, from random signs, whose squares are one. ``"hutchinson"`` averages
    v ⊙ Av (Bekas, Kokiopoulou & Saad 2007) and keeps two vectors; the error of an entry falls as 1/√m times the norm of
    the rest of its row. ``"xdiag"`` (Epperly, Tropp & Webber 2023) spends half of the products on a basis of A's range,
    with each vector left out in turn; it is better where the spectrum decays, keeps two vectors a product, and takes about
    six.

    Args:
        matrix: Square, and for ``"xdiag"`` symmetric or with products from the left (``adjoint()``, ``mT`` or ``T``).
        method: See above.
        num_products: Products with the matrix, one a column; with a tolerance those of the first
            round, of ten samples at least.
        tolerance: Wanted norm of the standard errors relative to that of the diagonal: rounds double the products
            until it is reached.
        max_products: Products after which a warning says that it was not.
        seed: Seed of the random signs. The global random state is neither used nor changed.
        groups: Give the diagonal by these rows, as a dict: ``"tensors"``, ``"modules"`` or a dict of them, see `trace`.
        checkpoint: Where the state is kept, to go on from after the process was killed: see `curvops.Checkpoint`.
        progressbar: Show products as they are taken (needs ``tqdm``).

    Returns:
        An `Estimate` ``[D]``, or with groups a dict of such.

    Raises:
        TypeError, ValueError: If an argument is not as described.
        FloatingPointError: If a product is not finite.

    Example:
        >>> import torch
        >>> found = diagonal(torch.diag(torch.arange(100.0)), method="hutchinson", num_products=4)
        >>> found, found[:3], found.standard_error.max()  # signs are exact for a diagonal matrix
        (Estimate(100 entries, ‖standard error‖ / ‖·‖ 0, Hutchinson, 4 products), tensor([0., 1., 2.]), tensor(0.))
    """
    samplers = {"xdiag": _XDiag, "hutchinson": _Hutchinson}
    if method not in samplers:
        raise ValueError(f"method: expected one of {', '.join(map(repr, samplers))}, got {method!r}.")
    with Products(matrix, "diagonal", progressbar=progressbar) as products:
        rows = resolve(groups, products)
        sampler = samplers[method](Probes(products, seed))
        budget = Budget(num_products, tolerance, max_products)
        found = run(sampler, budget, each=False, checkpoint=checkpoint, seed=seed)
        return found if groups is None else {name: found.part(index) for name, index in rows.items()}


class _Hutchinson(Sampler):
    method, cost, least, apart = "Hutchinson", 1, 2, 1
    known: tuple[str, ...] = ("mean", "spread")

    def __init__(self, probes: Probes) -> None:
        self.probes = probes
        self.mean = probes.empty().new_zeros(probes.size)
        self.spread = self.mean.double()  # roots of sums of squares

    @property
    def count(self) -> int:
        """Samples, as many as products."""
        return self.probes.products.count

    def add(self, count: int) -> None:
        """Of means and sums of squared deviations, so that no sample is kept (Chan, Golub & LeVeque 1979)."""
        for columns, product in self.probes.pairs(count):
            samples = columns * product
            new, mean = samples.shape[1], samples.mean(1)
            step, old = mean - self.mean, self.count - new
            self.mean = self.mean + step * (new / self.count)
            spread = lengths((samples - mean[:, None]).mT).double()
            between = step.double().abs() * (old * new / self.count) ** 0.5
            self.spread = torch.hypot(torch.hypot(self.spread, spread), between)

    def result(self) -> tuple[Tensor, Tensor]:
        return self.mean, (self.spread / (self.count * (self.count - 1)) ** 0.5).to(self.mean.dtype)

    def exact(self) -> Tensor:
        return torch.cat([(columns * product).sum(0) for columns, product in self.probes.identity()])


class _XDiag(_Hutchinson):
    method, cost, least, known, apart = "XDiag", 2, 3, SKETCH, 0

    def __init__(self, probes: Probes) -> None:
        super().__init__(probes)
        self.sketch = Sketch(probes, adjoint=not getattr(probes.products.matrix, "symmetric", False))

    def add(self, count: int) -> None:
        self.sketch.add(self.probes.draw(count))

    def result(self) -> tuple[Tensor, Tensor]:
        tests, out = self.sketch.tests, self.sketch.leave_out()
        scale, count = power_of_two(out.product), tests.shape[1]  # the covariance takes squares
        own, found = (out.only * out.images).sum(0) / scale, []
        for rows in zip(*(t.split(max(1, PART // count)) for t in (tests, out.basis, out.product)), strict=True):
            test, Q, AQ = rows[0], rows[1], rows[2] / scale
            Qs, AQs = Q @ out.only, AQ @ out.only
            less = AQs - test * own  # without what the others' range lacks of each product
            samples = (Q * AQ).sum(1, keepdim=True) - Qs * less
            independent = samples.detach().var(-1) / count
            found.append((samples.mean(1), independent, _covariance(out, Qs, AQs, less)))
        mean, *errors = (torch.cat(part) for part in zip(*found, strict=True))
        return mean * scale, error_of_leave_one_out(*errors, pooled=True) * scale


def _covariance(out: LeaveOut, q: Tensor, z: Tensor, y: Tensor) -> Tensor:
    """Mean over pairs of d_ij d_ji, d_ij = (q_i − c q_j)(z_i − c y_j) / (1 − c²), as sums of matrix products."""
    count = q.shape[1]
    c, weights = out.cosines, out.sines.reciprocal().square().fill_diagonal_(0)

    def pairs(left: Tensor, factor: Tensor, right: Tensor) -> Tensor:
        return ((left @ (factor * weights)) * right).sum(1)

    square, both, ones = q.square(), z * y, torch.ones_like(q)
    alone = pairs(q * z, 1 + c**2, q * z) + pairs(q * y, c**2 + c**4, q * y)
    crossed = pairs(q * both, c + c**3, q) + pairs(square * z, c, z) + pairs(square * y, c**3, y)
    own = pairs(square * both, c**2, ones) + pairs(square, c**2, both)
    return (alone - 2 * crossed + 2 * own) / (count * (count - 1))
