"""The squared Frobenius norm of a matrix, or of each of its diagonal blocks, from products with random vectors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from curvops.checkpoint import Checkpoint
from curvops.estimators.estimate import Estimate
from curvops.estimators.groups import Groups, Rows, by_name, resolve
from curvops.estimators.probes import Distribution, Probes, jackknife, mean_and_error, mean_of_pairs
from curvops.estimators.rounds import Budget, Sampler, run
from curvops.estimators.trace import Hutchinson
from curvops.lengths import dots, lengths, power_of_two
from curvops.matrix import Matrix, Products


def squared_norm(
    matrix: Matrix,
    *,
    num_products: int = 60,
    tolerance: float | None = None,
    max_products: int = 1000,
    distribution: Distribution = "rademacher",
    seed: int = 0,
    groups: Groups = None,
    checkpoint: Checkpoint | None = None,
    progressbar: bool = False,
) -> Any:
    """Estimate ‖A‖²_F, the sum of the squared entries; exact from as many products as the matrix has columns.

    The mean of ‖Av‖² over random vectors, that is Hutchinson's estimate of tr AᵀA; it is unbiased.

    Of a diagonal block A_ll of a symmetric matrix the rows of Av hold the other blocks' parts too. Pairs of products
    tell them apart: v_lᵀ (A w)_l · w_lᵀ (A v)_l has the mean ‖A_ll‖²_F for independent v and w, and all m (m − 1) / 2
    pairs are used. The result is unbiased, hence may be negative where it is small beside its standard error, which is
    the jackknife's (Efron & Stein 1981).

    Args:
        matrix: Any with products; square for groups, and then taken as symmetric.
        num_products: Products with the matrix, one a column; with a tolerance those of the first
            round, of ten samples at least.
        tolerance: Wanted standard error relative to the estimate (of every group): rounds double the products until
            it is reached.
        max_products: Products after which a warning says that it was not.
        distribution: Of the random vectors' entries.
        seed: Seed of the random vectors. The global random state is neither used nor changed.
        groups: Give the squared norms of diagonal blocks, from the same products, as a dict:
            ``"tensors"``, ``"modules"`` or a dict of them, see `trace`. It keeps two vectors a product.
        checkpoint: Where the state is kept, to go on from after the process was killed: see `curvops.Checkpoint`.
        progressbar: Show products as they are taken (needs ``tqdm``).

    Returns:
        An `Estimate` without axes, or with groups a dict of such.

    Raises:
        TypeError, ValueError: If an argument is not as described.
        FloatingPointError: If a product is not finite.

    Example:
        >>> import torch
        >>> squared_norm(torch.ones(3, 3)), squared_norm(torch.ones(3, 3), groups={"last": slice(1, 3)})
        (Estimate(9, exact, 3 products), {'last': Estimate(4, exact, 3 products)})
    """
    budget = Budget(num_products, tolerance, max_products)
    found, scale, rows, dtype = _squares(matrix, budget, groups, progressbar, checkpoint, seed, distribution)
    found = found.like(found * scale**2, found.standard_error * scale**2)
    return by_name(found.to_dtype(dtype), groups, rows)


def frobenius_norm(matrix: Matrix, **options: Any) -> Estimate:
    """The root of `squared_norm`, also where the square is none of the matrix's dtype; its options but the groups."""
    given = {**(squared_norm.__kwdefaults__ or {}), **options}
    budget = Budget(*(given.pop(name) for name in Budget._fields))
    squares, scale, _, dtype = _squares(matrix, budget, **given)
    squared = squares.part(0)
    root = squared.clamp(min=0).sqrt()
    error = squared.standard_error / (2 * root.clamp(min=torch.finfo(root.dtype).tiny))
    return squared.like(root * scale, error * scale).to_dtype(dtype)


def _squares(
    matrix: Matrix,
    budget: Budget,
    groups: Groups,
    progressbar: bool,
    checkpoint: Checkpoint | None,
    seed: int,
    distribution: Distribution,
) -> tuple[Estimate, float, Mapping[str, Rows], torch.dtype]:
    """Squared norms ``[G]`` over a scale, in double precision, that scale, the groups, and the dtype of their roots."""
    blocks = groups is not None
    with Products(matrix, "squared norm", square=blocks, symmetric=blocks, progressbar=progressbar) as products:
        probes, rows = Probes(products, seed, distribution), resolve(groups, products)
        sampler = (DiagonalBlocks if blocks else _Whole)(probes, rows)
        found = run(sampler, budget, checkpoint=checkpoint, rows=rows, seed=seed, distribution=distribution)
        return found, sampler.scale, rows, probes.dtype


class _Whole(Hutchinson):
    """Of squares over ``scale``, for those of a small or large matrix may be no numbers; the samples are their roots."""

    scale = 1.0

    def __init__(self, probes: Probes, rows: Mapping[str, Rows]) -> None:
        super().__init__(probes, rows)
        self.samples = self.samples.double()

    def result(self) -> tuple[Tensor, Tensor]:
        return mean_and_error(self._squares(self.samples))

    def exact(self) -> Tensor:
        return self._squares(torch.cat([self.sampled(*pair) for pair in self.probes.identity()], 1)).sum(1)

    def sampled(self, columns: Tensor, product: Tensor) -> Tensor:
        return lengths(product).double().unsqueeze(0)

    def _squares(self, roots: Tensor) -> Tensor:
        self.scale = float(power_of_two(roots))
        return (roots / self.scale).square()


class DiagonalBlocks(Sampler):
    """Squared norms of diagonal blocks of a symmetric matrix, from all pairs of products."""

    method, cost, least, known = "pairs", 1, 3, ("tests", "images")
    scale = 1.0

    def __init__(self, probes: Probes, rows: Mapping[str, Rows]) -> None:
        self.probes, self.rows = probes, rows
        self.tests, self.images = probes.empty(), probes.empty()

    def add(self, count: int) -> None:
        tests = self.probes.draw(count)
        self.tests = torch.cat([self.tests, tests], 1)
        self.images = torch.cat([self.images, self.probes.times(tests)], 1)

    def result(self) -> tuple[Tensor, Tensor]:
        found = [_pairs((self.tests[rows].mT @ self.images[rows]).double()) for rows in self.rows.values()]
        values, errors = zip(*found, strict=True)
        return torch.stack(values), torch.stack(errors)

    def exact(self) -> Tensor:
        return torch.stack([self.inside(columns, product) for columns, product in self.probes.identity()]).sum(0)

    def inside(self, columns: Tensor, product: Tensor) -> Tensor:
        """The part ``[G]`` of the squared norms that is in some of the matrix's columns, those of the identity given."""
        parts = [(dots(product[r], product[r]) * columns[r].sum(0)).sum() for r in self.rows.values()]
        return torch.stack(parts)


def _pairs(products: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of M_ij M_ji over pairs i ≠ j, and its standard error."""
    count = len(products)
    pairs = (products * products.mT).fill_diagonal_(0)
    left_out = (pairs.sum() - 2 * pairs.sum(1)) / ((count - 1) * (count - 2))
    return mean_of_pairs(products), jackknife(left_out)
