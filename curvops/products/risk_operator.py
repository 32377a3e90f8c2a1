"""Operators that are sums over batches of an empirical risk: Hessian and the GGN family."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import copy
from threading import Lock
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Module
from typing_extensions import Unpack

from curvops.losses import OutputCurvature
from curvops.memory import budget, granted
from curvops.operators.linear_operator import LinearOperator
from curvops.operators.submatrix import restricted_name
from curvops.products import rules
from curvops.products.account import Account, AccountedOperator, attempted, relative_difference, tolerance
from curvops.products.batch import BatchProduct
from curvops.products.kept import Kept
from curvops.products.pieces import in_pieces, piece_size
from curvops.products.record import Recorder
from curvops.risk.data import Batch, joins
from curvops.risk.determinism import check_deterministic as check
from curvops.risk.empirical_risk import EmpiricalRisk, RiskOptions
from curvops.risk.model import ModelFunction
from curvops.risk.walk import Walk, silenced
from curvops.space import TensorSpace

_LOCK = Lock()
Fast = Callable[[Sequence[BatchProduct]], Tensor]
Cross = Callable[[Tensor], list[Tensor | None]]
SomeOperator = TypeVar("SomeOperator", bound="RiskOperator")


class RiskOperator(AccountedOperator):
    """A symmetric matrix c Σ_batches (…) of an empirical risk: of model, loss and data as they are at each product.

    Args, options and errors are those of `HessianLinearOperator`.
    """

    def __init__(
        self,
        model_func: Module | ModelFunction,
        loss_func: Callable[[Any, Any], Tensor],
        params: Mapping[str, Tensor],
        data: Iterable[tuple[Any, Any]],
        *,
        check_deterministic: bool = True,
        memory_budget: int | None = None,
        **options: Unpack[RiskOptions],
    ) -> None:
        risk = EmpiricalRisk(model_func, loss_func, params, data, **options)
        self._set(risk, memory_budget)
        if check_deterministic:
            with risk.ranks.together():
                check(risk)
                self.account.note("second derivatives", *self._judge())
                risk.ranks.meet(f"{self.name}: end of the checks")

    @classmethod
    def of(
        cls: type[SomeOperator], risk: EmpiricalRisk, *, memory_budget: int | None = None, **options: Any
    ) -> SomeOperator:
        """The operator of an existing risk, unchecked: several operators share its checks and proofs.

        Args:
            risk: The empirical risk.
            memory_budget: As for the constructor.
            options: The options that only this class has.
        """
        operator = cls.__new__(cls)
        operator._options(**options)
        operator._set(risk, memory_budget)
        return operator

    def _options(self) -> None:
        """Take the options that only this class has."""

    def _set(self, risk: EmpiricalRisk, memory_budget: int | None) -> None:
        self.risk, self.memory_budget, self.account = risk, memory_budget, Account()
        self._kept: Kept | None = None
        self._open = 0  # contexts of `linearized`
        super().__init__(risk.space, symmetric=True, psd=self._is_psd())

    @contextmanager
    def linearized(self: SomeOperator) -> Iterator[SomeOperator]:
        """A context within which the batches' graphs are kept, within the memory budget, from the first product on.

        What does not fit is computed anew in each product. Inside, the operator means model, loss and data as they
        were at the first product: a parameter, a buffer or a mode that has changed is an error where PyTorch's version
        counters show it, and so are a replaced module, a setting or a hook of one, and a batch that is met again and is
        another (a change by way of ``p.data`` or NumPy, of the loss, or of data that are kept is not seen).

        Example:
            >>> import torch
            >>> from curvops import HessianLinearOperator
            >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
            >>> data = [(torch.rand(5, 3), torch.randint(2, (5,)))]
            >>> hessian = HessianLinearOperator(model, torch.nn.CrossEntropyLoss(), dict(model.named_parameters()), data)
            >>> v = torch.ones(hessian.shape[1])
            >>> with hessian.linearized():
            ...     for _ in range(10):
            ...         v = hessian @ (v / v.norm())
        """
        with _LOCK:
            if not self._open:
                self._kept = Kept(
                    self.risk, self.name, self._by_place, self._begin, self._hold, self._budget, self.account
                )
            self._open += 1
        try:
            yield self
        finally:
            with _LOCK:
                self._open -= 1
                if not self._open:
                    self._kept = None

    def _restricted(self, rows: TensorSpace, columns: TensorSpace) -> LinearOperator:
        if rows != columns:
            return CrossOperator(self, rows, columns)
        operator = copy(self)
        operator._set(self.risk.restricted(rows.names), self.memory_budget)
        operator._name = restricted_name(self, rows, columns)
        return operator

    def _is_psd(self) -> bool:
        return False

    def _judge(self) -> tuple[str, str]:
        """Compare this operator's kind of derivative with central differences; the verdict, and its reason."""
        return "not judged", ""

    @property
    def _by_place(self) -> str:
        """What belongs to the data's places, such as random numbers."""
        return ""

    @abstractmethod
    def _linearize(self, batch: Batch, curvature: OutputCurvature, z: Tensor, record: Recorder) -> BatchProduct:
        """The products of one batch, of whose forward pass ``z`` carries the graph."""

    @abstractmethod
    def _cross(
        self, batch: Batch, curvature: OutputCurvature, z: Tensor, rows: TensorSpace, columns: TensorSpace
    ) -> Cross:
        """One batch's products of the rows of some parameters and the columns of others."""

    @abstractmethod
    def _fast(self, product: BatchProduct, rows: Tensor | None) -> tuple[str, Fast] | None:
        """A faster way than products one by one, if the rules know one: its name, and what it gives for some batches.

        Args:
            product: The products of the first of these batches.
            rows: The vectors ``[K, D]``, for products with them ``[K, D]``; ``None`` for the matrix ``[D, D]``.
        """

    def _hold(self, product: BatchProduct, times: float) -> BatchProduct:
        """What is kept for many products with a batch: its graph, of which there is room for some times as much, or something else."""
        return product

    def _apply(self, columns: Tensor) -> Tensor:
        kept = self._kept  # which another thread may end
        if kept is None and not self.domain.shards and rules.matrix_pays(columns.shape[1], self.domain.dim):
            dense = self._dense()
            # the identity is what many ask with; to multiply with it would take longer than some matrices
            eye = torch.eye(len(columns), dtype=self.dtype, device=self.device)
            return dense if torch.equal(columns, eye) else dense @ columns
        rows = columns.T.contiguous()
        if kept is not None:
            total = torch.zeros(rows.shape, dtype=self.domain.sum_dtype, device=self.device)
            found = kept.add_to(total, rows).T.to(self.dtype)
        else:
            found = self._sum(rows).T.to(self.dtype)
        return self._told(found, columns)

    def _dense(self) -> Tensor:
        if self.domain.dim > rules.LARGEST_MATRIX or self._kept is not None:
            return super()._dense()
        found = self._sum(None).to(self.dtype)
        return self._told(found, found.new_zeros(()))

    def _told(self, product: Tensor, columns: Tensor) -> Tensor:
        """The product with some columns; a warning where it is not finite for one that is."""
        # a sum is finite only of finite numbers; where it is not, it may have overflowed
        if not math.isfinite(float(product.sum())) and (columns.isfinite().all(0) > product.isfinite().all(0)).any():
            warnings.warn(
                f"{self.name}: the product has entries that are not finite. Likely causes: a derivative that is not there at these values, "
                "which PyTorch gives as 0/0, as of a root or a norm of zero; overflow; a loss that is not finite.",
                RuntimeWarning,
                stacklevel=2,
            )
        return product

    def _pieces(self, batch: Batch) -> list[Batch]:
        """A batch, in pieces where the user's memory budget asks for it."""
        budget = self.memory_budget
        return in_pieces(batch, piece_size(self.risk, batch, budget, self.account) if budget else 0)

    def _begin(self, batch: Batch, walk: Walk | None = None) -> BatchProduct:
        """The products of a batch; without the walk of one that was begun before on it, and whose graph was let go."""
        record = Recorder(batch.size)
        z = record.finish(self.risk.run(batch, record))
        if walk is not None:
            return self._linearize(batch, walk.curvature(z, batch), z, record)
        curvature = self.risk.loss.curvature(z, batch.y, batch.size)
        return self._linearize(batch, silenced(curvature) if batch.silent else curvature, z, record)

    def _sum(self, rows: Tensor | None) -> Tensor:
        """Products with vectors ``[K, D]``, or the matrix, summed over the data: together by a fast way, or one by one."""
        K = self.domain.dim if rows is None else len(rows)
        total = torch.zeros(K, self.domain.dim, dtype=self.domain.sum_dtype, device=self.device)
        waiting: list[BatchProduct] = []
        refuted = bool(self.domain.shards)  # fast ways know whole tensors only

        def flush() -> None:
            nonlocal refuted
            if waiting and not self._together(total, waiting, rows):
                refuted = True
                for product in waiting:
                    self._one_by_one(total, self._begin(product.batch), rows)
            waiting.clear()

        def add(batch: Batch, walk: Walk) -> None:
            pieces = self._pieces(batch)
            for piece in pieces:
                product = self._begin(piece, walk)
                if refuted or self._fast(product, rows) is None:
                    self._one_by_one(total, product, rows)
                    continue
                if waiting and (len(pieces) > 1 or not self._joins(waiting, product, rows)):
                    flush()
                waiting.append(product)

        return self.risk.sum_over_data(self.name, total, add, flush, vectors=rows, by_place=self._by_place)

    def _joins(self, waiting: Sequence[BatchProduct], product: BatchProduct, rows: Tensor | None) -> bool:
        """Whether a small batch goes together with others, if no fewer columns do then."""
        if not joins([p.batch for p in waiting], product.batch, rules.JOINED):
            return False
        most = min(self.domain.dim if rows is None else len(rows), self._columns_together([product]))
        return self._columns_together([*waiting, product]) >= most

    def _one_by_one(self, total: Tensor, product: BatchProduct, rows: Tensor | None) -> None:
        if rows is None:
            rows = torch.eye(len(total), dtype=self.dtype, device=self.device)
        product.add_to(total, rows, last=True)

    def _together(self, total: Tensor, products: Sequence[BatchProduct], rows: Tensor | None) -> bool:
        """Add what the fast way gives, if a random combination of it is what the reference gives for the combined vectors.

        The reference's graphs are free then: what the fast way takes does not lie beside them.
        """
        found = self._fast(products[0], rows)
        assert found is not None
        name, fast = found
        made = torch.randn(len(total), generator=torch.Generator().manual_seed(0), device="cpu")
        noise = made.to(self.device, self.dtype)
        expected = torch.zeros(1, self.domain.dim, dtype=total.dtype, device=self.device)
        free = all(product.record.fresh for product in products)  # a batch's graph may be part of another's
        for product in products:
            product.add_to(expected, (noise if rows is None else noise @ rows).unsqueeze(0), last=free)
        work = "dense matrix" if rows is None else "columns"
        part, why = attempted(lambda: fast(products))
        if part is None:
            self.account.note(work, "one by one", f"{name} is unsupported here: {why}")
            return False
        difference = relative_difference(noise.to(part.dtype) @ part, expected[0].to(part.dtype))
        if not difference <= tolerance(self.dtype):
            self.account.note(work, "one by one", f"{name} differs from the reference by {difference:.1e}")
            return False
        self.account.note(work, name, f"a random combination equals the reference's within {difference:.1e}")
        total.add_(part)
        return True

    def _budget(self) -> int:
        return budget(self.device, self.memory_budget)

    def _granted(self, wanted: int) -> int:
        """How many of the bytes that are wanted there is room for, beside what `linearized` keeps."""
        kept = self._kept
        size = 0 if kept is None else kept.size
        left = None if self.memory_budget is None else max(0, self.memory_budget - size)
        return granted(self.device, left, wanted)

    def _columns_together(self, products: Sequence[BatchProduct]) -> int:
        """How many columns of some batches go together."""
        room = None if self.memory_budget is None else self.memory_budget // self.dtype.itemsize
        return rules.columns_together(sum(p.record.entries for p in products), room)


class CrossOperator(LinearOperator):
    """The rows of some parameters and the columns of others, of a risk's matrix; nothing else is differentiated in.

    By reverse over reverse, one vector after the other.
    """

    def __init__(self, operator: RiskOperator, rows: TensorSpace, columns: TensorSpace) -> None:
        super().__init__(columns, rows)
        self.operator, self._name = operator, restricted_name(operator, rows, columns)

    def _leaves(self) -> Iterable[Tensor]:
        return self.operator._leaves()

    def _in_step(self) -> AbstractContextManager[None]:
        return self.operator._in_step()

    def _restricted(self, rows: TensorSpace, columns: TensorSpace) -> LinearOperator:
        return self.operator._restricted(rows, columns)

    def _apply(self, columns: Tensor) -> Tensor:
        return self._sum(columns, self.codomain, self.domain)

    def _apply_adjoint(self, columns: Tensor) -> Tensor:
        return self._sum(columns, self.domain, self.codomain)

    def _sum(self, vectors: Tensor, rows: TensorSpace, columns: TensorSpace) -> Tensor:
        risk = self.operator.risk
        total = torch.zeros(vectors.shape[1], rows.dim, dtype=rows.sum_dtype, device=rows.device)

        def add(batch: Batch, walk: Walk) -> None:
            for piece in self.operator._pieces(batch):
                z = risk.run(piece)
                product = self.operator._cross(piece, walk.curvature(z, piece), z, rows, columns)
                for sums, v in zip(total, vectors.T, strict=True):
                    rows.join(product(v), sums)

        by_place = self.operator._by_place
        found = risk.sum_over_data(self.name, total, add, vectors=vectors, by_place=by_place, space=rows)
        return found.T.to(rows.dtype)
