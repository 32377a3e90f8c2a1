"""Several columns at once: one by one, or batched by `vmap`, whichever one measurement finds faster."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from curvops.linearize.certify import Account, relative_difference, tolerance
from curvops.linearize.pushforward import CLEARLY, timed
from curvops.linearize.reference import BatchProduct

CHUNK = 16  # columns that are batched together
WORTH = 4  # columns from which a measurement is worth its time


class Columns:
    """Applies a batch's linearization to columns, in the way that its first use measured.

    Args:
        account: Where the choice is recorded.
    """

    def __init__(self, account: Account) -> None:
        self._account = account
        self._batched: bool | None = None

    def apply(self, product: BatchProduct, columns: Tensor) -> Tensor:
        """``[D, K]`` to ``[D, K]``."""
        if columns.shape[1] < WORTH:
            return _loop(product, columns)
        if self._batched is None:
            return self._measure(product, columns)
        return _batched(product, columns) if self._batched else _loop(product, columns)

    def _measure(self, product: BatchProduct, columns: Tensor) -> Tensor:
        """Both ways on the first columns; the batched one counts only if it is equal."""
        few = columns[:, :WORTH]
        product.product(few[:, 0])  # what is made at first use is not measured
        one_by_one, slow = timed(lambda: _loop(product, few), columns.device)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # a warning of slow batching rules is a no
                # as many at once as there will be: batching pays off with their number
                together, fast = timed(lambda: _batched(product, columns[:, :CHUNK]), columns.device)
        except Exception as error:  # any failure of an optimisation means that the reference serves
            reason = f"{type(error).__name__}: {error}".split("\n")[0]
            self._batched = False
            self._account.note("columns", "one by one", f"batching is unsupported here: {reason}")
        else:
            difference = relative_difference(together[:, :WORTH], one_by_one)
            slow, fast = slow / WORTH, fast / together.shape[1]
            equal = difference <= tolerance(columns.dtype)
            self._batched = equal and fast < CLEARLY * slow
            choice = "batched by vmap" if self._batched else "one by one"
            measured = f"a column took {1e3 * fast:.1f} ms batched, {1e3 * slow:.1f} ms one by one"
            self._account.note("columns", choice, measured + ("" if equal else f", and differ by {difference:.1e}"))
        rest = columns[:, WORTH:]
        if not rest.shape[1]:
            return one_by_one
        return torch.cat([one_by_one, _batched(product, rest) if self._batched else _loop(product, rest)], 1)


def _loop(product: BatchProduct, columns: Tensor) -> Tensor:
    return torch.stack([product.product(column) for column in columns.unbind(1)], 1)


def _batched(product: BatchProduct, columns: Tensor) -> Tensor:
    return torch.cat([product.products(part) for part in columns.split(CHUNK, 1)], 1)
