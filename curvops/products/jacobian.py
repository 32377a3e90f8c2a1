"""The Jacobian of a model's outputs on a data set in its parameters, and its adjoint; no loss is needed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from copy import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from typing_extensions import Unpack

from curvops.context import quietly
from curvops.memory import budget
from curvops.operators.composite import AdjointOperator
from curvops.operators.linear_operator import LinearOperator
from curvops.operators.submatrix import restricted_name
from curvops.products.account import relative_difference, tolerance
from curvops.products.batch import Push
from curvops.products.proofs import pushed_forward
from curvops.products.record import Recorder
from curvops.products.reference import OutputLinearization
from curvops.products.rows import pulled_rows
from curvops.products.rules import matrix_pays
from curvops.risk.data import Batch
from curvops.risk.determinism import check_deterministic as check
from curvops.risk.empirical_risk import EmpiricalRisk, RiskOptions
from curvops.risk.model import ModelFunction
from curvops.space import TensorSpace


class JacobianLinearOperator(LinearOperator):
    """J = ∂f(θ; x_n)/∂θ for all data one below the other, ``[N · outputs, D]``, of the model as it is at each product.

    It gives and takes outputs as ``[N · outputs]``, or as one tensor ``[N, *outputs]`` in a list or in a dict under the
    name ``"output"``. Where batches have outputs of several shapes, there is a tensor for each, named ``"0"``, ``"1"``, ….

    Args:
        model_func: Module called as ``model(X)``, or a function ``(params, X)``.
        params: Parameters by name: the module's own tensors, any subset of them.
        data: Iterable of ``(X, y)`` that can be walked again, in the same order; ``y`` is not looked at.
        check_deterministic: Compare two passes over the data before anything is computed.
        options: ``progressbar``, ``num_data``, ``batch_size_fn``, as of `HessianLinearOperator`.

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
        **options: Unpack[RiskOptions],
    ) -> None:
        options["reduction"] = "sum"
        self.risk = EmpiricalRisk(model_func, _seen_outputs, params, data, **options)
        if check_deterministic:
            check(self.risk)
        self._datum: int | None = None
        super().__init__(self.risk.space, self._outputs())

    def datum(self, n: int) -> JacobianLinearOperator:
        """The Jacobian of the ``n``-th datum's output, ``[outputs, D]``, as it is in its batch.

        Raises:
            IndexError: If there is no such datum.
        """
        if not isinstance(n, int):
            raise TypeError(f"datum: expected the number of a datum, got {n!r}.")
        one = copy(self)
        one._datum = n
        LinearOperator.__init__(one, self.domain, one._outputs())
        one._name = f"{self.name}.datum({n})"
        return one

    def _leaves(self) -> Iterable[Tensor]:
        return self.risk.params.values()

    def _restricted(self, rows: TensorSpace, columns: TensorSpace) -> LinearOperator:
        if rows != self.codomain:
            return super()._restricted(rows, columns)
        operator = copy(self)
        operator.risk = self.risk.restricted(columns.names)
        LinearOperator.__init__(operator, columns, rows)
        operator._name = restricted_name(self, rows, columns)
        return operator

    def _apply(self, columns: Tensor) -> Tensor:
        if matrix_pays(columns.shape[1], self.domain.dim):
            return (self._matrix() @ columns).to(self.codomain.dtype)
        pieces = []
        for z, jacobian, push, _ in self._batches(1):
            found = [z.new_zeros(z.numel(), 0)]
            for v in columns.T:
                pushed = jacobian.push(v) if push is None else push(v)
                found.append(pushed.reshape(-1, 1).to(self.codomain.dtype))
            pieces.append(torch.cat(found, 1))
        return torch.cat(pieces)

    def _apply_adjoint(self, columns: Tensor) -> Tensor:
        total = torch.zeros(columns.shape[1], self.domain.dim, dtype=self.domain.sum_dtype, device=self.device)
        start = 0
        for z, jacobian, *_ in self._batches(0):
            for row, u in zip(total, columns[start : start + z.numel()].T, strict=True):
                self.domain.join(jacobian.pull(u.reshape(z.shape)), row)
            start += z.numel()
        return total.T.to(self.domain.dtype)

    def _dense(self) -> Tensor:
        return self._matrix().to(self.codomain.dtype)

    def _matrix(self) -> Tensor:
        """By `vmap` over the data, or by as many products as there are outputs or parameters in a batch's graph."""
        rows = torch.zeros(self.shape, dtype=self.domain.dtype, device=self.device)
        start = 0
        for z, jacobian, push, batch in self._batches(1):
            own = rows[start : start + z.numel()]
            if (together := self._rows(batch, z, jacobian)) is not None:
                own[:] = together
            elif z.numel() <= self.domain.dim:
                units = torch.eye(z.numel(), dtype=z.dtype, device=z.device)
                for row, u in zip(own, units, strict=True):
                    self.domain.join(jacobian.pull(u.reshape(z.shape)), row)
            else:
                for k, v in enumerate(torch.eye(self.domain.dim, dtype=self.dtype, device=self.device)):
                    own[:, k] = (jacobian.push(v) if push is None else push(v)).flatten()
            start += z.numel()
        return rows

    def _rows(self, batch: Batch, z: Tensor, jacobian: OutputLinearization) -> Tensor | None:
        """All rows of a batch by `vmap` over its data, if a random combination of them is that of the batch's graph."""
        if self._datum is not None or batch.size == 1:
            return None
        units = torch.eye(z[0].numel(), dtype=z.dtype, device=z.device).reshape(-1, *z.shape[1:])
        primals = {name: p.detach() for name, p in self.risk.params.items()}
        us, most = units.expand(batch.size, *units.shape), budget(self.device, None)
        try:
            with quietly():
                found = torch.cat(list(pulled_rows(self.risk.functional, primals, batch.X, us, self.domain, most)))
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError):
            return None
        noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0)).to(z)
        expected = torch.zeros(self.domain.dim, dtype=self.domain.sum_dtype, device=self.device)
        self.domain.join(jacobian.pull(noise), expected)
        same = relative_difference(noise.flatten().to(found.dtype) @ found, expected) <= tolerance(self.dtype)
        return found if same else None

    def _batches(self, pushes: int) -> Iterator[tuple[Tensor, OutputLinearization, Push | None, Batch]]:
        """For each batch its outputs (one datum's, if that is asked for), their Jacobian, J v by forward mode if proved."""
        with self.risk.walk(self.name) as walk:
            for batch in walk:
                if self._datum is not None and not 0 <= self._datum - batch.start < batch.size:
                    continue
                record = Recorder(batch.size)
                z = record.finish(self.risk.forward(batch.X, record))
                push = pushed_forward(self.risk, batch, record, z)[0] if pushes and self._datum is None else None
                own = z if self._datum is None else z[self._datum - batch.start]
                yield own, OutputLinearization(own, self.risk.params, self.domain), push, batch
                if self._datum is not None:
                    return

    def _outputs(self) -> TensorSpace:
        with self.risk.walk(self.name) as walk, torch.no_grad():
            found = []
            for batch in walk:
                if self._datum is None or 0 <= self._datum - batch.start < batch.size:
                    z = self.risk.forward(batch.X)
                    if z.ndim == 0 or len(z) != batch.size:
                        raise ValueError(
                            f"{self.name}: expected an output with one row for each of {batch.size} data, got shape {tuple(z.shape)}."
                        )
                    found.append(z if self._datum is None else z[self._datum - batch.start])
            if not found:
                raise IndexError(f"datum: expected a place among {walk.size} data, got {self._datum}.")
        if self._datum is not None:
            return TensorSpace({"output": found[0]})
        if len({z.shape[1:] for z in found}) > 1:
            return TensorSpace({str(k): z for k, z in enumerate(found)})
        shape = (sum(map(len, found)), *found[0].shape[1:])
        return TensorSpace({"output": found[0].new_zeros(()).expand(shape)})


class TransposedJacobianLinearOperator(AdjointOperator):
    """Jᵀ, ``[D, N · outputs]``: the adjoint of the `JacobianLinearOperator` of the same arguments.

    Example:
        >>> import torch
        >>> from curvops import TransposedJacobianLinearOperator
        >>> model, data = torch.nn.Linear(3, 2), [(torch.rand(5, 3), None)]
        >>> TransposedJacobianLinearOperator(model, dict(model.named_parameters()), data).shape
        (8, 10)
    """

    def __init__(self, *problem: Any, **options: Any) -> None:
        super().__init__(JacobianLinearOperator(*problem, **options))


def _seen_outputs(z: Tensor, y: Any) -> Tensor:
    """What the determinism check looks at in the place of a loss, one to one and curved, as losses are."""
    return z.asinh().sum()
