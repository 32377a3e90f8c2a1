"""The diagonal of a matrix, or of each of its diagonal blocks, from products with random signs."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from curvops.estimators.groups import Groups, resolve
from curvops.estimators.probes import Probes, mean_and_error
from curvops.estimators.rounds import Budget, run
from curvops.estimators.sketch import Sketch
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
    progressbar: bool = False,
) -> Any:
    """Estimate the diagonal; exact from as many products as the matrix has columns.

    An unbiased estimate at any number of products, from random signs, whose squares are one. ``"hutchinson"`` averages
    v ⊙ Av (Bekas, Kokiopoulou & Saad 2007) and keeps two vectors; the error of an entry falls as 1/√m times the norm of
    the rest of its row. ``"xdiag"`` (Epperly, Tropp & Webber 2023) spends half of the products on a basis of A's range,
    with each vector left out in turn; it is better where the spectrum decays, and keeps about two vectors a product.

    Args:
        matrix: Square, and for ``"xdiag"`` symmetric or with products from the left (``adjoint()``, ``mT`` or ``T``).
        method: See above.
        num_products: Products with the matrix, one a column; with a tolerance those of the first round.
        tolerance: Wanted norm of the standard errors relative to that of the diagonal: rounds double the products
            until it is reached.
        max_products: Products after which a warning says that it was not.
        seed: Seed of the random signs. The global random state is neither used nor changed.
        groups: Give the diagonal by these rows, as a dict: rows by name, ``"tensors"`` or ``"modules"``.
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
        found = run(sampler, products, Budget(num_products, tolerance, max_products), each=False)
        return found if groups is None else {name: found.part(index) for name, index in rows.items()}


class _Hutchinson:
    method, cost, least = "Hutchinson", 1, 2

    def __init__(self, probes: Probes) -> None:
        self.probes, self.count = probes, 0
        self.mean = self.spread = probes.empty().new_zeros(probes.size)

    def add(self, count: int) -> None:
        """Of means and sums of squared deviations, so that no sample is kept (Chan, Golub & LeVeque 1979)."""
        for columns, product in self.probes.pairs(count):
            samples = columns * product
            new, old, mean = samples.shape[1], self.count, samples.mean(1)
            step, self.count = mean - self.mean, old + new
            self.mean = self.mean + step * (new / self.count)
            spread = (samples - mean[:, None]).square().sum(1)
            self.spread = self.spread + spread + step.square() * (old * new / self.count)

    def result(self) -> tuple[Tensor, Tensor]:
        return self.mean, (self.spread / (self.count * (self.count - 1))).sqrt()

    def exact(self) -> Tensor:
        return torch.cat([(columns * product).sum(0) for columns, product in self.probes.identity()])


class _XDiag(_Hutchinson):
    method, cost, least = "XDiag", 2, 2

    def __init__(self, probes: Probes) -> None:
        super().__init__(probes)
        self.sketch = Sketch(probes, adjoint=not getattr(probes.products.matrix, "symmetric", False))

    def add(self, count: int) -> None:
        self.sketch.add(count)

    def result(self) -> tuple[Tensor, Tensor]:
        Q, AtQ, images, s = self.sketch.leave_one_out()
        only = Q @ s
        rest = self.sketch.tests * only * (s * images).sum(0)  # what the other vectors miss of each product
        return mean_and_error((Q * AtQ).sum(1, keepdim=True) - only * (AtQ @ s) + rest)
