"""What the same products say of each diagonal block of a symmetric matrix."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from curvops.checkpoint import Checkpoint
from curvops.estimators.estimate import Estimate
from curvops.estimators.groups import Groups, resolve, sums
from curvops.estimators.norm import DiagonalBlocks
from curvops.estimators.probes import Probes, mean_and_error
from curvops.estimators.rounds import Budget, run
from curvops.matrix import Matrix, Products


class Block(NamedTuple):
    """A diagonal block B: its trace, squared Frobenius norm (in double precision) and diagonal ``[n]``."""

    trace: Estimate
    squared_norm: Estimate
    diagonal: Estimate

    @property
    def eigenvalue_bounds(self) -> tuple[float, float]:
        """‖B‖²/tr B ≤ λ ≤ ‖B‖ for the largest eigenvalue of a positive semi-definite block, as sure as the estimates.

        The eigenvalue itself takes products of the block's own, for Krylov's vectors of a block must not meet the
        others.
        """
        trace, square = max(self.trace.item(), 0.0), max(self.squared_norm.item(), 0.0)
        return (square / trace if trace else 0.0), square**0.5


def by_group(
    matrix: Matrix,
    groups: Groups = "tensors",
    *,
    num_products: int = 60,
    seed: int = 0,
    checkpoint: Checkpoint | None = None,
    progressbar: bool = False,
) -> dict[str, Block]:
    """Trace, squared norm and diagonal of each diagonal block of a symmetric matrix, for the products of one estimate.

    Hutchinson's estimates from one set of random signs; for the squared norm all pairs of products, see `squared_norm`.
    Exact from as many products as the matrix has columns. It keeps two vectors a product.

    Args:
        matrix: Symmetric.
        groups: The blocks: ``"tensors"`` or ``"modules"`` of a `LinearOperator`, or a dict of them, see `trace`.
        num_products: Products with the matrix, however many groups there are.
        seed: Seed of the random signs. The global random state is neither used nor changed.
        checkpoint: Where the state is kept, to go on from after the process was killed: see `curvops.Checkpoint`.
        progressbar: Show products as they are taken (needs ``tqdm``).

    Returns:
        A `Block` for each name.

    Raises:
        TypeError, ValueError: If an argument is not as described.
        FloatingPointError: If a product is not finite.

    Example:
        >>> import torch
        >>> by_group(torch.eye(4), {"front": slice(0, 1), "back": slice(1, 4)})["back"][:2]
        (Estimate(3, exact, 4 products), Estimate(3, exact, 4 products))
    """
    with Products(matrix, "by group", symmetric=True, progressbar=progressbar) as products:
        rows = resolve(groups, products)
        probes = Probes(products, seed)
        sampler = _Blocks(probes, rows)
        found = run(sampler, Budget(num_products), checkpoint=checkpoint, rows=rows, seed=seed)
    count = len(rows)
    traces, diagonal = (found.part(part).to_dtype(probes.dtype) for part in (slice(count), slice(2 * count, None)))
    return {
        name: Block(traces.part(i), found.part(count + i), diagonal.part(index))
        for i, (name, index) in enumerate(rows.items())
    }


class _Blocks(DiagonalBlocks):
    """Traces, squared norms and the whole diagonal, one after the other."""

    method = "Hutchinson"

    def result(self) -> tuple[Tensor, Tensor]:
        traces = mean_and_error(sums(self.tests, self.images, self.rows))
        diagonal = mean_and_error(self.tests * self.images)
        value, error = (torch.cat(parts) for parts in zip(traces, super().result(), diagonal, strict=True))
        return value, error

    def exact(self) -> Tensor:
        diagonal, squares = [], []
        for columns, product in self.probes.identity():
            diagonal.append((columns * product).sum(0))
            squares.append(self.inside(columns, product))
        entries = torch.cat(diagonal)
        traces = torch.stack([entries[index].sum() for index in self.rows.values()])
        return torch.cat([traces, torch.stack(squares).sum(0), entries])
