"""Operators that are sums over batches of an empirical risk: Hessian and the GGN family."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from curvops.memory import budget
from curvops.operators.linear_operator import LinearOperator
from curvops.products.batches import BatchSum, JoinedBatches, Upgrade
from curvops.products.certify import Account, certified
from curvops.products.held import JOINED
from curvops.products.keep import Build, KeptLinearizations
from curvops.risk.data import Batch, joined_batches
from curvops.risk.determinism import check_deterministic as check
from curvops.risk.empirical_risk import EmpiricalRisk
from curvops.risk.model import ModelFunction


class RiskOperator(LinearOperator):
    """A symmetric matrix c Σ_batches (…) of an empirical risk.

    Args:
        model_func: Module called as ``model(X)``, or a function ``(params, X)``.
        loss_func: Loss ``(output, y)``: a module, or a function together with ``reduction``.
        params: Parameters by name, any subset of the module's.
        data: Iterable of ``(X, y)`` that can be walked again.
        progressbar: Show a progress bar over the batches (needs ``tqdm``).
        check_deterministic: Compare two passes over the data, and the derivatives of second order with
            central differences on a few data, before anything is computed.
        num_data: Number of data, if known; it is compared with what the loader yields.
        batch_size_fn: Number of data in ``X`` where it cannot be seen.
        reduction: ``"mean"`` or ``"sum"``, for losses that do not say it themselves.
        memory_budget: Bytes that intermediate results and kept graphs may take; a quarter of the free memory if not
            given, and 0 to keep nothing.

    Raises:
        TypeError, ValueError: If an argument does not fit; the message says which and how.
        RuntimeError: If two passes over the data differ.
    """

    def __init__(
        self,
        model_func: Module | ModelFunction,
        loss_func: Callable[[Any, Any], Tensor],
        params: Mapping[str, Tensor],
        data: Iterable[tuple[Any, Any]],
        *,
        progressbar: bool = False,
        check_deterministic: bool = True,
        num_data: int | None = None,
        batch_size_fn: Callable[[Any], int] | None = None,
        reduction: str | None = None,
        memory_budget: int | None = None,
    ) -> None:
        self.risk = EmpiricalRisk(
            model_func,
            loss_func,
            params,
            data,
            reduction=reduction,
            progressbar=progressbar,
            num_data=num_data,
            batch_size_fn=batch_size_fn,
        )
        super().__init__(self.risk.space, symmetric=True, psd=self._is_psd())
        self.memory_budget = memory_budget
        self.account = Account()
        self._kept = KeptLinearizations(self.risk, self._linearizer(self.account), self._budget)
        self._sum = BatchSum(self._kept, self._upgrades, self.account, self.name)
        if check_deterministic:
            check(self.risk)
            self._judge()

    def explain(self) -> str:
        """What was chosen for each piece of work so far, and why."""
        rows = str(self.account) or "  nothing has been computed yet"
        return f"{self!r}\n{rows}"

    def _is_psd(self) -> bool:
        return False

    def _judge(self) -> None:
        """Compare this operator's kind of derivative with central differences."""

    def _apply(self, columns: Tensor) -> Tensor:
        c = self.risk.constant
        with self.risk.evaluation():
            total = self._sum(columns)
        self.account.note("products", "from linearizations", str(self._kept))
        return total.mul_(c).to(self.dtype)

    def _upgrades(self) -> list[Upgrade]:
        """Forms that may replace the linearizations of the batches; asked for whenever something has changed."""
        self._kept.build = self._linearizer(self.account)  # what was certified before need not hold now
        account = Account()
        return [JoinedBatches(self._linearizer(account), account, self._budget, self._accept), self._held()]

    def _accept(self, build: Build, account: Account) -> None:
        self._kept.build = build
        self.account.adopt(account)

    @abstractmethod
    def _held(self) -> Upgrade:
        """The matrix in a form that is held, for where it is small."""

    @abstractmethod
    def _linearizer(self, account: Account) -> Build:
        """What makes one batch's products, without the constant c; its choices are its own."""

    @abstractmethod
    def _add_dense(self, batch: Batch, total: Tensor) -> float:
        """Add one batch's matrix, without the constant c, to ``total`` ``[D, D]``, by a fast way.

        Returns:
            The relative difference by which it fails a certificate.
        """

    #: name of the fast way of `_add_dense`
    dense_way: str

    def _dense(self) -> Tensor:
        with warnings.catch_warnings():
            # vmap falls back to a loop for some operations, which costs time and is none of the caller's business
            warnings.filterwarnings("ignore", "There is a performance drop")
            # small batches are joined first; a model that mixes the data of a batch refutes that, not the fast way
            for joined in (JOINED, 0):
                fast = partial(self._fast_dense, joined)
                dense = certified("dense matrix", self.dense_way, fast, self.dtype, self.account)
                if dense is not None:
                    return dense
        return super()._dense()

    def _fast_dense(self, joined: int) -> tuple[Tensor, float]:
        with self.risk.evaluation(), closing(self.risk.batches(self.name)) as batches:
            dense, difference = self._dense_of(joined_batches(batches, joined))
        return dense.mul_(self.risk.constant).to(self.dtype), difference

    def _dense_of(self, batches: Iterable[Batch]) -> tuple[Tensor, float]:
        """The matrix of some batches, without the constant c, by the fast way, and the difference that was found."""
        total = torch.zeros(self.shape, dtype=self.domain.sum_dtype, device=self.device)
        differences = [self._add_dense(batch, total) for batch in batches]
        # a difference that is not a number must not be lost
        return total, float(torch.tensor(differences).max())

    def _budget(self) -> int:
        return budget(self.device, self.memory_budget)
