"""The Jacobian of a model's outputs on a data set in its parameters, and its adjoint; no loss is needed."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, closing
from copy import copy
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module
from typing_extensions import Unpack

from curvops.memory import granted
from curvops.operators.composite import AdjointOperator
from curvops.operators.linear_operator import LinearOperator
from curvops.operators.submatrix import restricted_name
from curvops.products import rules
from curvops.products.account import Account, AccountedOperator, attempted, relative_difference, tolerance
from curvops.products.batch import Push
from curvops.products.proofs import pushed_forward
from curvops.products.record import Recorder
from curvops.products.reference import OutputLinearization
from curvops.products.rows import pulled_rows
from curvops.risk.data import EMPTY, Batch
from curvops.risk.determinism import check_deterministic as check
from curvops.risk.empirical_risk import EmpiricalRisk, RiskOptions
from curvops.risk.model import ModelFunction
from curvops.risk.walk import Walk
from curvops.space import TensorSpace


class JacobianLinearOperator(AccountedOperator):
    """J = ∂f(θ; x_n)/∂θ for all data one below the other, ``[N · outputs, D]``, of the model as it is at each product.

    It gives and takes outputs as ``[N · outputs]``, or as one tensor ``[N, *outputs]`` in a list or in a dict under the
    name ``"output"``. Where batches have outputs of several shapes, there is a tensor for each, named ``"0"``, ``"1"``, ….

    Args:
        model_func: Module called as ``model(X)``, or a function ``(params, X)``.
        params: Parameters by name: the module's own tensors, any subset of them.
        data: Iterable of ``(X, y)`` that can be walked again, in the same order; ``y`` is not looked at.
        check_deterministic: Compare two passes over the data before anything is computed.
        memory_budget: Bytes that intermediate results may take; a quarter of the free memory if not given.
        options: ``progressbar``, ``num_data``, ``batch_size_fn`` and ``process_group``, as of `HessianLinearOperator`; its ``reduction`` has no effect.

    Raises:
        TypeError, ValueError: If an argument does not fit; the message says which and how.
        RuntimeError: If two passes over the data differ.

    Example:
        >>> import torch
        >>> from curvops import JacobianLinearOperator
        >>> model, data = torch.nn.Linear(3, 2), [(torch.rand(5, 3), None)]
        >>> J = JacobianLinearOperator(model, dict(model.named_parameters()), data)
        >>> J.shape, (J.T @ torch.ones(10)).shape, J.datum(4).shape
        ((10, 8), torch.Size([8]), (2, 8))
    """

    def __init__(
        self,
        model_func: Module | ModelFunction,
        params: Mapping[str, Tensor],
        data: Iterable[tuple[Any, Any]],
        *,
        check_deterministic: bool = True,
        memory_budget: int | None = None,
        **options: Unpack[RiskOptions],
    ) -> None:
        options["reduction"] = "sum"
        self.memory_budget, self.account = memory_budget, Account()
        self.risk = EmpiricalRisk(model_func, _seen_outputs, params, data, **options)
        if self.risk.divided:
            raise ValueError(
                "process_group: a Jacobian's parameters must not be cut over the processes that divide its rows. Pass the whole data in each "
                "process, without process_group=."
            )
        if check_deterministic:
            check(self.risk)
        self._datum: int | None = None
        super().__init__(self.risk.space, self._outputs())

    def datum(self, n: int) -> JacobianLinearOperator:
        """The Jacobian of the ``n``-th datum's output, ``[outputs, D]``, as it is in its batch.

        Raises:
            IndexError: If there is no such datum.
        """
        if not isinstance(n, int) or isinstance(n, bool):
            raise TypeError(f"datum: expected the number of a datum, got {n!r}.")
        one = copy(self)
        one._datum, one.account = n, Account()
        LinearOperator.__init__(one, self.domain, one._outputs())
        one._name = f"{self.name}.datum({n})"
        return one

    def _restricted(self, rows: TensorSpace, columns: TensorSpace) -> LinearOperator:
        if rows != self.codomain:
            return super()._restricted(rows, columns)
        operator = copy(self)
        operator.risk, operator.account = self.risk.restricted(columns.names), Account()
        LinearOperator.__init__(operator, columns, rows)
        operator._name = restricted_name(self, rows, columns)
        return operator

    def _apply(self, columns: Tensor) -> Tensor:
        total = torch.zeros(self.shape[0], columns.shape[1], dtype=self.codomain.dtype, device=self.device)
        by_vmap = self._until_refuted()
        with self.risk.ranks.together(), closing(self._batches()) as batches:
            for one, rows in batches:
                pays = rules.jacobian_pays(columns.shape[1], one.z.numel(), self.domain.dim)
                if (matrix := by_vmap(one, pays)) is not None:
                    wide = self.domain.sum_dtype
                    total[rows] = (matrix.to(wide) @ columns.to(wide)).to(total.dtype)
                    continue
                push = self._push(one)
                for k, v in enumerate(columns.T):
                    total[rows, k] = push(v).flatten().to(total.dtype)
            return self._summed(total, columns)

    def _apply_adjoint(self, columns: Tensor) -> Tensor:
        total = torch.zeros(columns.shape[1], self.domain.dim, dtype=self.domain.sum_dtype, device=self.device)
        by_vmap = self._until_refuted()
        with self.risk.ranks.together(), closing(self._batches()) as batches:
            for one, rows in batches:
                pays = rules.jacobian_pays(columns.shape[1] // 2, one.z.numel(), self.domain.dim)
                if (matrix := by_vmap(one, pays)) is not None:
                    total += columns[rows].T.to(total.dtype) @ matrix.to(total.dtype)
                    continue
                for row, u in zip(total, columns[rows].T, strict=True):
                    self.domain.join(one.jacobian.pull(u.reshape(one.z.shape)), row)
            return self._summed(total, columns).T.to(self.domain.dtype)

    def _until_refuted(self) -> Callable[..., Tensor | None]:
        """Gives a batch's rows by `vmap` where they are wanted, in a place if one is given, until that was refuted for one."""
        refuted = False

        def rows(one: _Outputs, wanted: bool, out: Tensor | None = None) -> Tensor | None:
            nonlocal refuted
            # it runs over several data, and knows no shards
            if refuted or not wanted or self._datum is not None or one.batch.size == 1 or self.domain.shards:
                return None
            if out is None:
                out = torch.empty(one.z.numel(), self.domain.dim, dtype=self.domain.dtype, device=self.device)
            refuted = not self._together(one, out)
            return None if refuted else out

        return rows

    def _summed(self, total: Tensor, vectors: Tensor | None = None) -> Tensor:
        """What the processes of a group have found, together."""
        ranks = self.risk.ranks
        if not ranks.alone:
            ranks.meet(f"{self.name}, {' × '.join(map(str, total.shape))} numbers", self.risk.state, vectors)
        return ranks.add(total)

    def _dense(self) -> Tensor:
        """By `vmap` over the data, or by as many products as there are outputs or parameters in a batch's graph."""
        matrix = torch.zeros(self.shape, dtype=self.domain.dtype, device=self.device)
        by_vmap = self._until_refuted()
        with self.risk.ranks.together(), closing(self._batches()) as batches:
            for one, rows in batches:
                if by_vmap(one, True, matrix[rows]) is None:
                    self._one_by_one(one, matrix[rows])
            return self._summed(matrix).to(self.codomain.dtype)

    def _one_by_one(self, one: _Outputs, rows: Tensor) -> None:
        if one.z.numel() <= self.domain.dim:
            units = torch.eye(one.z.numel(), dtype=one.z.dtype, device=one.z.device)
            for row, u in zip(rows, units, strict=True):
                self.domain.join(one.jacobian.pull(u.reshape(one.z.shape)), row)
        else:
            push = self._push(one)
            for k, v in enumerate(torch.eye(self.domain.dim, dtype=self.dtype, device=self.device)):
                rows[:, k] = push(v).flatten()

    def _together(self, one: _Outputs, out: Tensor) -> bool:
        """Write the rows by `vmap` over a batch's data; whether a random combination of them is that of its graph."""
        units = torch.eye(one.z[0].numel(), dtype=one.z.dtype, device=one.z.device).reshape(-1, *one.z.shape[1:])
        primals = {name: p.detach() for name, p in self.risk.params.items()}
        us = units.expand(one.batch.size, *units.shape)
        entries, room = one.record.entries // one.batch.size, partial(granted, self.device, self.memory_budget)
        parts = partial(pulled_rows, self.risk.functional, primals, one.batch.X, us, self.domain, entries, room)

        def write() -> Tensor:
            start = 0
            for some in parts():
                out[start : start + len(some)] = some
                start += len(some)
            return out

        found, why = attempted(write)
        if found is not None:
            noise = torch.randn(one.z.shape, generator=torch.Generator().manual_seed(0), device="cpu").to(one.z)
            expected = torch.zeros(self.domain.dim, dtype=self.domain.sum_dtype, device=self.device)
            self.domain.join(one.jacobian.pull(noise), expected)
            difference = relative_difference(noise.flatten().to(found.dtype) @ found, expected)
            if difference <= tolerance(self.dtype):
                why = f"a random combination equals the reference's within {difference:.1e}"
                self.account.note("rows", "by vmap over the data", why)
                return True
            why = f"vmap differs from the reference by {difference:.1e}"
        self.account.note("rows", "one by one", why)
        out.zero_()  # another way adds to it
        return False

    def _push(self, one: _Outputs) -> Push:
        """J v of a batch by forward mode where that takes less and is proved."""
        push, why = None, "of one datum"
        if self._datum is None:
            push, why = pushed_forward(self.risk, one.batch, one.record, one.z)
        self.account.note("J v", "reverse over reverse" if push is None else "forward mode", why)
        return push or one.jacobian.push

    def _batches(self) -> Generator[tuple[_Outputs, slice], None, None]:
        """The outputs of each batch with their graph, or only those of the datum that is asked for, and their rows."""
        start = self._first_row
        with self._walk() as walk:
            for batch in self._wanted(walk):
                record = Recorder(batch.size)
                z = record.finish(self.risk.forward(batch.X, record))
                own = z if self._datum is None else z[self._datum - batch.start]
                rows = slice(start, start + own.numel())
                if rows.stop <= self._last_row:
                    yield _Outputs(batch, record, own, OutputLinearization(own, self.risk.params, self.domain)), rows
                start = rows.stop
        if start != self._last_row:
            raise RuntimeError(
                f"{self.name}: expected {self._last_row - self._first_row} outputs, as when the operator was made, got "
                f"{start - self._first_row}. Make it anew for other data."
            )

    def _walk(self) -> AbstractContextManager[Walk]:
        return self.risk.walk(self.name, "" if self._datum is None else f"datum {self._datum}")

    def _wanted(self, walk: Walk) -> Iterator[Batch]:
        """All batches, or the one with the datum that is asked for, after which no other is looked at."""
        for batch in walk:
            if self._datum is None:
                yield batch
            elif 0 <= self._datum - batch.start < batch.size:
                yield batch
                return

    def _outputs(self) -> TensorSpace:
        """The space of all outputs, of all processes of a group one after the other."""
        found = []
        ranks = self.risk.ranks
        with ranks.together():
            with self._walk() as walk:
                for batch in self._wanted(walk):
                    z = self.risk.output(batch.X)
                    if z.ndim == 0 or len(z) != batch.size:
                        raise ValueError(
                            f"{self.name}: expected an output with one row for each of {batch.size} data, got shape {tuple(z.shape)}."
                        )
                    found.append((z.shape if self._datum is None else z.shape[1:], z.dtype))
                size = walk.size
            sizes, *_ = ranks.meet(f"{self.name}: outputs", size=size)
            shares = ranks.gather(found)
        self._first_row = sum(shape.numel() for share in shares[: ranks.rank] for shape, _ in share)
        self._last_row = self._first_row + sum(shape.numel() for shape, _ in found)
        outputs = [
            torch.zeros((), dtype=dtype, device=self.risk.space.device).expand(shape)
            for share in shares
            for shape, dtype in share
        ]
        if self._datum is not None:
            if not outputs:
                raise IndexError(f"datum: expected a place among {sum(sizes)} data, got {self._datum}.")
            return TensorSpace({"output": outputs[0]})
        if not outputs:
            raise ValueError(EMPTY)
        if len({z.shape[1:] for z in outputs}) > 1:
            return TensorSpace({str(k): z for k, z in enumerate(outputs)})
        shape = (sum(map(len, outputs)), *outputs[0].shape[1:])
        return TensorSpace({"output": outputs[0].new_zeros(()).expand(shape)})


class _Outputs(NamedTuple):
    """A batch, what its pass did, its outputs with their graph, and their Jacobian by reverse mode."""

    batch: Batch
    record: Recorder
    z: Tensor
    jacobian: OutputLinearization


class TransposedJacobianLinearOperator(AdjointOperator):
    """Jᵀ, ``[D, N · outputs]``: the adjoint of the `JacobianLinearOperator` of the same arguments.

    Args:
        model_func, params, data: Model, parameters by name and batches, as of `JacobianLinearOperator`.
        check_deterministic, memory_budget: As there.
        options: ``progressbar``, ``num_data``, ``batch_size_fn`` and ``process_group``, as there; ``reduction`` has no effect.

    Example:
        >>> import torch
        >>> from curvops import TransposedJacobianLinearOperator
        >>> model, data = torch.nn.Linear(3, 2), [(torch.rand(5, 3), None)]
        >>> TransposedJacobianLinearOperator(model, dict(model.named_parameters()), data).shape
        (8, 10)
    """

    def __init__(
        self,
        model_func: Module | ModelFunction,
        params: Mapping[str, Tensor],
        data: Iterable[tuple[Any, Any]],
        *,
        check_deterministic: bool = True,
        memory_budget: int | None = None,
        **options: Unpack[RiskOptions],
    ) -> None:
        own: dict[str, Any] = {"check_deterministic": check_deterministic, "memory_budget": memory_budget, **options}
        super().__init__(JacobianLinearOperator(model_func, params, data, **own))
        self._name = ""  # that of the class, in messages


def _seen_outputs(z: Tensor, y: Any) -> Tensor:
    """What the determinism check looks at in the place of a loss, one to one and curved, as losses are."""
    return z.asinh().sum()
