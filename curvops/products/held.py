"""Small matrices that are held instead of linearizations, once their making has paid off."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from curvops.gram import add_gram, mirrored
from curvops.products.batches import Upgrade
from curvops.products.certify import Account, reason
from curvops.products.choose import timed
from curvops.products.keep import Kept, versions
from curvops.products.products import WORTH, MatrixProduct
from curvops.risk.data import Batch, joined_batches
from curvops.space import TensorSpace
from curvops.tree import select

LARGEST = 2048  # side up to which a square matrix is held
SHARE = 8  # a dense matrix costs no more than this part of its columns one by one
JOINED = 128  # data up to which small batches are joined


class HeldMatrix(Upgrade):
    """The matrix ``[D, D]`` itself, after a share of D products.

    Args:
        space: The space of the parameters.
        dense: Makes the matrix of some batches, without the constant c.
        budget: Bytes that may be kept.
    """

    form = "the matrix itself is kept"
    final = True

    def __init__(
        self, space: TensorSpace, dense: Callable[[Sequence[Batch]], Tensor], budget: Callable[[], int]
    ) -> None:
        self._space, self._dense, self._budget = space, dense, budget

    def due(self, kept: Sequence[Kept], vectors: int, seconds: float) -> bool | None:
        needed = self._space.dim**2 * self._space.sum_dtype.itemsize + sum(k.size for k in kept)
        if self._space.dim > LARGEST or needed > self._budget():
            return None
        return SHARE * vectors >= self._space.dim

    def build(self, kept: Sequence[Kept]) -> list[Kept]:
        sources = [batch for k in kept for batch in k.sources]
        return [_held(MatrixProduct(self._dense(sources), rows=False), sources)]


class HeldRows(Upgrade):
    """The rows Sᵀ J of all loss terms, or their second moment if that is smaller.

    They are made once products have taken the time that making them will take, as a part of the first batch tells.

    Args:
        space: The space of the parameters.
        rows: Gives rows ``[…, D]`` of a batch; takes the number of rows a datum that are too many, and raises a
            ValueError then.
        budget: Bytes that may be kept.
        account: Where it is recorded why rows are not kept.
    """

    form = "the rows of Sᵀ J are kept"
    final = True

    def __init__(
        self,
        space: TensorSpace,
        rows: Callable[[Batch, float], Iterable[Tensor]],
        budget: Callable[[], int],
        account: Account,
    ) -> None:
        self._space, self._rows, self._budget, self._account = space, rows, budget, account
        self._predicted: float | None = None

    def due(self, kept: Sequence[Kept], vectors: int, seconds: float) -> bool | None:
        if vectors <= 2 * WORTH:
            return False
        if self._predicted is None:
            self._predicted = self._predict(kept, seconds / vectors)
        return None if self._predicted == torch.inf else seconds >= self._predicted

    def _predict(self, kept: Sequence[Kept], before: float) -> float:
        """Seconds that making the rows takes; infinite if they do not fit or do not pay off."""
        data = sum(batch.size for k in kept for batch in k.sources)
        room = self._budget() - sum(k.size for k in kept)
        first = kept[0].sources[0]
        few = max(1, first.size // 4)
        X, y = (select(part, first.size, slice(0, few)) for part in (first.X, first.y))
        part = Batch(X, y, few, first.start)
        most = room / (data * self._space.dim * self._space.dtype.itemsize)
        try:
            rows, seconds = timed(lambda: torch.cat(list(self._rows(part, most))), self._space.device)
        except Exception as error:  # any failure of an optimisation means that the reference serves
            self._account.note("rows of Sᵀ J", "not kept", reason(error))
            return torch.inf
        v = rows.sum(0)
        product = timed(lambda: rows.T @ (rows @ v), self._space.device)[1] * data / few
        if product <= before:
            return seconds * data / few
        self._account.note(
            "rows of Sᵀ J", "not kept", f"{1e3 * product:.1f} ms a product, {1e3 * before:.1f} ms before"
        )
        return torch.inf

    def build(self, kept: Sequence[Kept]) -> list[Kept]:
        sources = [batch for k in kept for batch in k.sources]
        found = [rows for batch in joined_batches(sources, JOINED) for rows in self._rows(batch, torch.inf)]
        rows = torch.cat(found)
        if len(rows) < self._space.dim or self._space.dim > LARGEST:
            return [_held(MatrixProduct(rows, rows=True), sources)]
        matrix = rows.new_zeros(self._space.dim, self._space.dim)
        add_gram(matrix, rows)
        return [_held(MatrixProduct(mirrored(matrix.unsqueeze(0))[0], rows=False), sources)]


def _held(product: MatrixProduct, sources: Sequence[Batch]) -> Kept:
    return Kept(product, sources, versions(sources))
