"""Frobenius norms of all blocks A_ij of a matrix, from products with random vectors in one group at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from curvops.checkpoint import Checkpoint
from curvops.estimators.estimate import Estimate
from curvops.estimators.groups import Groups, Rows, resolve
from curvops.estimators.probes import Probes, mean_and_error
from curvops.estimators.rounds import Budget
from curvops.estimators.steps import Steps
from curvops.lengths import power_of_two
from curvops.matrix import Matrix, Products

# samples that the bound of the variance is worth; without it errors of 8 skewed samples are 1.4 times too small
BOUND = 8


@dataclass(frozen=True)
class BlockNorms:
    """What is known of the blocks A_ij of a matrix whose rows and columns are in G groups.

    Attributes:
        names: The groups.
        squared: ‖A_ij‖²_F, `[G, G]`, unbiased.
        norms: ‖A_ij‖_F, `[G, G]`, the roots. Their errors are by the delta method, e / (2 ‖A_ij‖).
        traces: tr A_ii, `[G]`, unbiased, from the same products.
    """

    names: tuple[str, ...]
    squared: Estimate
    norms: Estimate
    traces: Estimate

    @classmethod
    def of(
        cls,
        names: Iterable[str],
        squared: tuple[Tensor, Tensor],
        traces: tuple[Tensor, Tensor],
        scale: float | Tensor = 1.0,
        **origin: Any,
    ) -> BlockNorms:
        """From values and standard errors, the squared ones over ``scale``²; further arguments are those of `Estimate.of`."""
        norms = squared[0].sqrt()
        error = torch.where(norms > 0, squared[1] / (2 * norms), 0.0)
        squared, roots = (squared[0] * scale**2, squared[1] * scale**2), (norms * scale, error * scale)
        found = [Estimate.of(*both, **origin) for both in (squared, roots, traces)]
        return cls(tuple(names), *found)


def block_norms(
    matrix: Matrix,
    groups: Groups = "modules",
    *,
    num_products: int = 8,
    symmetric: bool | None = None,
    seed: int = 0,
    checkpoint: Checkpoint | None = None,
    progressbar: bool = False,
) -> BlockNorms:
    """Estimate ‖A_ij‖_F of every pair of groups, and each trace tr A_jj.

    For independent random signs v in the entries of group j, and zero elsewhere, ‖(A v)_i‖² has the mean ‖A_ij‖²_F: one
    product serves all blocks of a column. A group with no more entries than products takes the identity's columns
    instead, and is exact. So is a zero block, of which each product is zero; of any other block none is, but on a set
    of measure zero of matrices.

    Of a symmetric matrix ‖A_ij‖ = ‖A_ji‖: off the diagonal the estimates from both groups' products, which are
    independent, are averaged, or the exact one is taken. (Weights by their stated variances would bias the result, for a
    small estimate states a small error; and the variances differ by the diagonals of AᵀA and A Aᵀ only.)

    With m products a group, the relative error of a norm is at most about 1 / √(2 m) on the diagonal and 1 / (2 √m) off
    it (0.25 and 0.18 for 8), whatever the block; it is that for blocks of rank one. The variance of ‖B v‖² is at most
    2 ‖BᵀB‖², of which products with different vectors v and w tell: the mean of ((B v)ᵀ B w)² is ‖BᵀB‖². The stated
    variance is that of the samples, mixed with this bound as if it were 8 samples more, for the variance of few skewed
    samples is small where their mean is. So in expectation it is no less than the true one. Errors of the traces are
    those of the samples.

    Args:
        matrix: Square.
        groups: ``"tensors"``, ``"modules"`` or a dict of them, see `trace`.
        num_products: Products for each group (m); so many products ``[D]`` are held at a time.
        symmetric: Whether the matrix equals its transpose. Default: what the matrix says of itself, or else that it does not.
        seed: Seed of the random signs. The global random state is neither used nor changed.
        checkpoint: Where the state is kept, to go on from after the process was killed: see `curvops.Checkpoint`. It is
            what is known of the groups so far.
        progressbar: Show products as they are taken (needs ``tqdm``).

    Raises:
        TypeError, ValueError: If an argument is not as described.
        FloatingPointError: If a product is not finite.

    Example:
        >>> import torch
        >>> matrix = torch.ones(20, 20)
        >>> matrix[15:, :15] = matrix[:15, 15:] = 0
        >>> found = block_norms(matrix, {"a": slice(0, 15), "b": slice(15, 20)}, symmetric=True, num_products=10)
        >>> found.norms[1]
        tensor([0., 5.], dtype=torch.float64)
        >>> found.norms.part((0, 0))
        Estimate(16.7 ± 2.9, signs by group, 15 products)
    """
    with Products(matrix, "block norms", progressbar=progressbar) as products:
        probes, rows = Probes(products, seed), resolve(groups, products)
        Budget(num_products).check()
        if num_products < 2:
            raise ValueError("num_products: expected at least 2, for a standard error, got 1.")
        steps = Steps(checkpoint, probes, rows, {"num_products": num_products, "seed": seed}, inside=False)
        known = [steps.tensors[name] for name in _Column._fields] if steps.tensors else []
        found = [_Column(*parts) for parts in zip(*known, strict=True)]
        for name in list(rows)[len(found) :]:
            found.append(_column(probes, name, rows, num_products))
            steps.done(dict(zip(_Column._fields, map(torch.stack, zip(*found, strict=True)), strict=True)))
        steps.end()
        squares, variances, traces, exact, scales = (torch.stack(parts, -1) for parts in zip(*found, strict=True))
        scale = scales.max()
        squares, variances = squares * (scales / scale) ** 2, variances * (scales / scale) ** 4
        if getattr(matrix, "symmetric", False) if symmetric is None else symmetric:
            squares, variances = _averaged(squares, variances, exact)
        origin = {"products": products.count, "method": "signs by group", "exact": bool(exact.all())}
        return BlockNorms.of(rows, (squares, variances.sqrt()), (traces[0], traces[1]), scale, **origin)


class _Column(NamedTuple):
    """What the products of one group say: of its column of blocks `[G]`, over a scale² and its square, and the trace of its own
    with its error `[2]`; whether they are exact, as a number; and the scale."""

    squares: Tensor
    variances: Tensor
    trace: Tensor
    exact: Tensor
    scale: Tensor


def _column(probes: Probes, name: str, rows: Mapping[str, Rows], count: int) -> _Column:
    products, own = probes.products, rows[name]
    size = own.stop - own.start if isinstance(own, slice) else len(own)
    exact = size <= count
    identity = torch.eye(size if exact else 0, dtype=probes.dtype, device=products.device)
    vectors = identity if exact else probes.draw(count, size)
    padded = torch.zeros(probes.size, vectors.shape[1], dtype=probes.dtype, device=products.device)
    padded[own] = vectors
    images = probes.times(padded)
    scale = power_of_two(images)  # squares of a small or large matrix are no numbers
    grams = torch.stack([part.mT @ part for part in ((images[each] / scale).double() for each in rows.values())])
    inside = (vectors * images[own]).sum(0, dtype=torch.float64)
    squares, zero = grams.diagonal(dim1=1, dim2=2), grams.new_zeros(())
    if exact:
        return _Column(
            squares.sum(1), grams.new_zeros(len(rows)), torch.stack([inside.sum(), zero]), zero + 1, scale.double()
        )
    bound = 2 * (grams.square().sum((1, 2)) - squares.square().sum(1)) / (count * (count - 1))
    variances = ((count - 1) * squares.var(1) + BOUND * bound) / (count - 1 + BOUND)
    return _Column(squares.mean(1), variances / count, torch.stack(mean_and_error(inside)), zero, scale.double())


def _averaged(squares: Tensor, variances: Tensor, exact: Tensor) -> tuple[Tensor, Tensor]:
    """Estimates of a symmetric matrix: off the diagonal the mean of both, or the one of a group that is exact."""
    weights = 0.5 + (exact.unsqueeze(0) - exact.unsqueeze(1)) / 2
    mean, spread = weights * squares, weights.square() * variances
    own = torch.eye(len(exact), dtype=torch.bool, device=exact.device)  # these are one estimate, and not two
    return mean + mean.mT, torch.where(own, variances, spread + spread.mT)
