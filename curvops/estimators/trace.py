"""The trace of a matrix, or of each of its diagonal blocks, from products with random vectors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from curvops.checkpoint import Checkpoint
from curvops.estimators.groups import Groups, Rows, by_name, resolve, sums
from curvops.estimators.probes import Distribution, Probes, error_of_leave_one_out, mean_and_error, mean_of_pairs
from curvops.estimators.rounds import Budget, Sampler, run
from curvops.estimators.sketch import SKETCH, LeaveOut, Sketch
from curvops.lengths import power_of_two
from curvops.matrix import Matrix, Products


def trace(
    matrix: Matrix,
    *,
    method: Literal["xtrace", "hutch++", "hutchinson"] = "xtrace",
    num_products: int = 60,
    tolerance: float | None = None,
    max_products: int = 1000,
    distribution: Distribution = "rademacher",
    seed: int = 0,
    groups: Groups = None,
    checkpoint: Checkpoint | None = None,
    progressbar: bool = False,
) -> Any:
    """Estimate the trace; exact from as many products as the matrix has columns.

    An unbiased estimate at any number of products. ``"hutchinson"`` averages vᵀAv over random vectors (Hutchinson
    1989) and keeps no vectors; its error falls as 1/√m. ``"hutch++"`` (Meyer et al. 2021) spends a third of the
    products each on a basis Q of A's range, on tr QᵀAQ, and on Hutchinson's estimate of the rest; ``"xtrace"``
    (Epperly, Tropp & Webber 2023) uses all vectors for both, with each left out in turn. Their errors fall as 1/m or
    faster on spectra that decay (on flat ones Hutchinson's is smaller), and they keep two vectors a product, and take
    about six, in at least single precision. XTrace's standard error includes the covariance of its samples, which the paper leaves out.

    Args:
        matrix: Square; a `LinearOperator`, a tensor, SciPy's, or anything with a shape and products.
        method: See above.
        num_products: Products with the matrix, one a column; with a tolerance those of the first
            round, of ten samples at least.
        tolerance: Wanted standard error relative to the estimate (of every group): rounds double the products until
            it is reached. To stop where an error is small by chance biases skewed samples' mean: on a spectrum 1/i
            Hutchinson's by −0.3 of its standard deviations, Hutch++'s by −0.1.
        max_products: Products after which a warning says that it was not.
        distribution: Of the random vectors' entries. ``"rademacher"`` has the lower variance for Hutchinson;
            ``"normal"`` for XTrace is scaled to the sphere, which is theirs.
        seed: Seed of the random vectors. The global random state is neither used nor changed.
        groups: Give the traces of diagonal blocks in place of the whole matrix's, from the same products, as a dict:
            ``"tensors"`` or ``"modules"`` of a `LinearOperator`; or a dict name → slice, tensor of indices, or names and
            patterns of tensors, such as ``{"attention": "*.attn.*"}``. Those of a partition add up to the whole's estimate.
            The other blocks of a group's rows add noise of mean zero, which its standard error includes.
        checkpoint: Where the state is kept, to go on from after the process was killed: see `curvops.Checkpoint`.
        progressbar: Show products as they are taken (needs ``tqdm``).

    Returns:
        An `Estimate` without axes, or with groups a dict of such.

    Raises:
        TypeError, ValueError: If an argument is not as described.
        FloatingPointError: If a product is not finite.

    Example:
        >>> import torch
        >>> trace(torch.diag(torch.arange(5.0)), groups={"first": slice(0, 2), "rest": slice(2, 5)})
        {'first': Estimate(1, exact, 5 products), 'rest': Estimate(9, exact, 5 products)}
    """
    samplers = {"xtrace": _XTrace, "hutch++": _HutchPlusPlus, "hutchinson": Hutchinson}
    if method not in samplers:
        raise ValueError(f"method: expected one of {', '.join(map(repr, samplers))}, got {method!r}.")
    with Products(matrix, "trace", progressbar=progressbar) as products:
        rows = resolve(groups, products)
        sampler = samplers[method](Probes(products, seed, distribution), rows)
        budget = Budget(num_products, tolerance, max_products)
        found = run(sampler, budget, checkpoint=checkpoint, rows=rows, seed=seed, distribution=distribution)
        return by_name(found, groups, rows)


class Hutchinson(Sampler):
    """The mean of a sample for each random vector and its product."""

    method, cost, least, apart = "Hutchinson", 1, 2, 1
    known: tuple[str, ...] = ("samples",)

    def __init__(self, probes: Probes, rows: Mapping[str, Rows]) -> None:
        self.probes, self.rows = probes, rows
        self.samples = probes.empty().new_zeros(len(rows), 0)

    def add(self, count: int) -> None:
        new = [self.sampled(*pair) for pair in self.probes.pairs(count)]
        self.samples = torch.cat([self.samples, *new], 1)

    def result(self) -> tuple[Tensor, Tensor]:
        return mean_and_error(self.samples)

    def exact(self) -> Tensor:
        return torch.stack([self.sampled(*pair).sum(1) for pair in self.probes.identity()]).sum(0)

    def sampled(self, columns: Tensor, product: Tensor) -> Tensor:
        """A sample ``[G]`` for each column; those of the identity's columns add up to the exact value."""
        return sums(columns, product, self.rows)


class _HutchPlusPlus(Hutchinson):
    method, cost, least, known, apart = "Hutch++", 3, 2, (*SKETCH, "tests", "images"), 0

    def __init__(self, probes: Probes, rows: Mapping[str, Rows]) -> None:
        super().__init__(probes, rows)
        self.sketch, self.tests, self.images = Sketch(probes), probes.empty(), probes.empty()

    def add(self, count: int) -> None:
        drawn = self.probes.draw(2 * count)
        self.sketch.add(drawn[:, ::2])
        tests = drawn[:, 1::2]
        self.tests = torch.cat([self.tests, tests], 1)
        self.images = torch.cat([self.images, self.probes.times(tests)], 1)

    def result(self) -> tuple[Tensor, Tensor]:
        Q, AQ = self.sketch.basis, self.sketch.product
        inside = Q.mT @ self.tests
        kept = sums(Q, AQ, self.rows).sum(1, keepdim=True)
        rest = sums(self.tests - Q @ inside, self.images - AQ @ inside, self.rows)
        return mean_and_error(kept + rest)


class _XTrace(Hutchinson):
    method, cost, least, known, apart = "XTrace", 2, 3, SKETCH, 0

    def __init__(self, probes: Probes, rows: Mapping[str, Rows]) -> None:
        super().__init__(probes, rows)
        self.sketch = Sketch(probes)

    def add(self, count: int) -> None:
        self.sketch.add(self.probes.draw(count))

    def result(self) -> tuple[Tensor, Tensor]:
        tests, out = self.sketch.tests, self.sketch.leave_out()
        inside, s = out.basis.mT @ tests, out.only
        along = out.of_second(s.mT @ inside)  # of test vectors j, in the direction that leaves with i
        inside = inside - s * (s * inside).sum(0)
        one, two = self._scales(inside, along, out)
        samples, changes = [], []
        for rows in self.rows.values():
            Q, AQ = out.basis[rows], out.product[rows]
            rest, A_rest = tests[rows] - Q @ inside, self.sketch.images[rows] - AQ @ inside
            Qs, AQs = Q @ s, AQ @ s
            form, hutchinson = Qs.mT @ AQs, (rest * A_rest).sum(0)
            samples.append((Q * AQ).sum() - form.diagonal() + one * hutchinson)
            square, crossed = out.of_second_squared(form), out.of_second(Qs.mT @ A_rest + AQs.mT @ rest)
            change = square * (1 - two * along.square()) - two * along * crossed + (one - two) * hutchinson
            changes.append(change.double())
        found, change = torch.stack(samples), torch.stack(changes)
        scale = power_of_two(torch.stack([power_of_two(found.double()), power_of_two(change)]))  # these are squared
        independent = (found.detach().double() / scale).var(-1) / found.shape[-1]
        covariances = torch.stack([mean_of_pairs(each) for each in change / scale])
        error = error_of_leave_one_out(independent, covariances) * scale
        return found.mean(1), error.to(found.dtype)

    def _scales(self, inside: Tensor, along: Tensor, out: LeaveOut) -> tuple[Tensor, Tensor]:
        """What brings the rest of each test vector, without one or two products, to the length that is expected."""
        if self.probes.distribution != "normal":
            return torch.ones_like(along[0]), torch.ones_like(along)
        lost = out.only.square().sum(0)
        rank, norm = out.basis.shape[1] - lost, self.sketch.tests.square().sum(0) - inside.square().sum(0)
        size = len(out.basis)
        return (size - rank) / norm, (size - rank + lost[:, None]) / (norm + along.square())
