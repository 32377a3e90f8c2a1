"""An operator that several processes have whole, and whose columns they divide among them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from curvops.operators.linear_operator import LinearOperator
from curvops.ranks import Ranks
from curvops.space import TensorSpace

DIFFERENT = (
    "have different operators. Each needs all data and the same model, loss and seed; where the data are shared, pass "
    "process_group= to the operator itself"
)


class SpreadOperator(LinearOperator):
    """A, of which each process of a group multiplies some of the columns, and all get the product.

    For dense matrices, and for whatever multiplies blocks of columns: probes of estimators, starts of Lanczos. Each
    process has the operator whole, with all data; where the data are shared, pass ``process_group=`` to the operator
    itself. One vector is multiplied by the first process alone. A first product, when it is made, shows whether all have the
    same operator.

    Args:
        operator: The operator, the same in all processes.
        process_group: Processes of `torch.distributed`, which all make the same calls.

    Raises:
        RanksError: In all processes, if one of them fails, or if they differ in operators or vectors.

    Example:
        In a script that is started by ``torchrun --nproc-per-node 4 script.py``::

            torch.distributed.init_process_group("gloo")
            hessian = HessianLinearOperator(model, loss, params, data)
            trace = SpreadOperator(hessian, torch.distributed.group.WORLD).trace(num_products=64)
    """

    def __init__(self, operator: LinearOperator, process_group: Any) -> None:
        if not isinstance(operator, LinearOperator):
            raise TypeError(f"SpreadOperator: expected a LinearOperator, got {type(operator).__name__}.")
        self._ranks = Ranks(process_group)
        self._ranks.expect_apart({**operator.domain.shards, **operator.codomain.shards})
        super().__init__(operator.domain, operator.codomain, symmetric=operator.symmetric, psd=operator.psd)
        self.operator, self._parts, self._name = operator, (operator,), f"{operator.name}, spread"
        self._group = process_group
        self._ranks.expect_same(
            self.name, {"operator": repr(operator), "spaces": f"{operator.domain}, {operator.codomain}"}
        )
        with self._ranks.together():
            # data, buffers, losses, seeds and factors show in what the operator does
            noise = torch.randn(self.domain.dim, 1, generator=torch.Generator().manual_seed(0), device="cpu")
            product = operator._product(noise.to(self.device, self.dtype))
            self._ranks.meet(f"{self.name}: first product", vectors=product, different=DIFFERENT)

    @property
    def _at_hand(self) -> bool:
        return False  # the other processes have to come along

    def _in_step(self) -> AbstractContextManager[None]:
        return self._ranks.together()

    def _apply(self, columns: Tensor) -> Tensor:
        return self._divided(self.operator._product, lambda own: columns[:, own], columns.shape[1], columns)

    def _apply_adjoint(self, columns: Tensor) -> Tensor:
        adjoint = self.operator.adjoint()
        return self._divided(adjoint._product, lambda own: columns[:, own], columns.shape[1], columns)

    def _dense(self) -> Tensor:
        def units(own: slice) -> Tensor:
            some = torch.zeros(self.domain.dim, own.stop - own.start, dtype=self.dtype, device=self.device)
            some[own].fill_diagonal_(1)
            return some

        return self._divided(self.operator._product, units, self.domain.dim)

    def _restricted(self, rows: TensorSpace, columns: TensorSpace) -> LinearOperator:
        return SpreadOperator(self.operator._restricted(rows, columns), self._group)

    def _divided(
        self,
        multiply: Callable[[Tensor], Tensor],
        some: Callable[[slice], Tensor],
        number: int,
        all: Tensor | None = None,
    ) -> Tensor:
        """Products with so many columns, of which ``some`` gives those of a range, from all processes."""
        ranks = self._ranks
        with ranks.together():
            part = multiply(some(ranks.own(number)))
            state = {str(k): tensor for k, tensor in enumerate(self._leaves())}
            ranks.meet(f"{self.name}, {number} columns", state, all)
        return ranks.join_columns(part, number)
