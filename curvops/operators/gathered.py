"""An operator of parameters that are cut over processes, for vectors that each of them has whole."""

from __future__ import annotations

import torch
from torch import Tensor

from curvops.digest import close, probe
from curvops.operators.linear_operator import LinearOperator
from curvops.ranks import RanksError
from curvops.sharding import gathered, least
from curvops.space import TensorSpace


class GatheredOperator(LinearOperator):
    """A matrix of parameters that are cut over processes (DTensors), for whole vectors, flat ones too.

    So what needs these can be had of it: dense matrices, traces, diagonals, norms, spectra, solvers, SciPy. Parameters
    and whatever a product takes stay cut; a vector is gathered when it is through. So each process needs room for the vectors that it asks for, such
    as the basis of `eigenpairs`. All of them make the same calls, with the same vectors.

    Args:
        operator: The operator.

    Raises:
        TypeError: If it is none.
        ValueError: If its vectors are whole already, as those of Kronecker operators are.
        RanksError: If the processes multiply different vectors.

    Example:
        In a script that is started by ``torchrun --nproc-per-node 2 script.py``::

            hessian = HessianLinearOperator(model, loss, dict(model.named_parameters()), data)  # of DTensors
            values, vectors = GatheredOperator(hessian).eigenpairs(3)
    """

    def __init__(self, operator: LinearOperator) -> None:
        if not isinstance(operator, LinearOperator):
            raise TypeError(f"GatheredOperator: expected a LinearOperator, got {type(operator).__name__}.")
        if not (operator.domain.shards or operator.codomain.shards):
            raise ValueError(
                f"GatheredOperator: {operator.name} takes and gives whole vectors, for nothing of it is cut over processes. Take it as it is."
            )
        super().__init__(
            operator.domain.gathered, operator.codomain.gathered, symmetric=operator.symmetric, psd=operator.psd
        )
        self.operator, self._parts, self._name = operator, (operator,), f"{operator.name}, gathered"

    @property
    def _at_hand(self) -> bool:
        return False  # the other processes have to come along

    def _apply(self, columns: Tensor) -> Tensor:
        return self._gathered(self.operator, columns)

    def _apply_adjoint(self, columns: Tensor) -> Tensor:
        return self._gathered(self.operator.adjoint(), columns)

    def _gathered(self, operator: LinearOperator, columns: Tensor) -> Tensor:
        """Products with whole columns, whole."""
        shards = {**operator.domain.shards, **operator.codomain.shards}
        own = probe(columns)
        low, high = ([sign * least(sign * number, shards) for number in own] for sign in (1, -1))
        if not close((low[0], low[1]), (high[0], high[1])):
            raise RanksError(
                f"{self.name}: the processes multiply different vectors. Give all of them the same: draw it from a generator with the same seed "
                "in each process, or broadcast it from one."
            )
        wholes = operator.domain.gathered.split(columns)
        cuts = operator.domain.shards
        placed = [cuts[n].cut(t) if n in cuts else t for n, t in zip(operator.domain.names, wholes, strict=True)]
        parts = operator.domain.parts(list(placed))
        flat = torch.cat([part.reshape(-1, columns.shape[1]) for part in parts if part is not None])
        product = operator._product(flat.to(operator.dtype))
        found = [gathered(tensor) for tensor in operator.codomain.split(product)]
        return torch.cat([tensor.reshape(-1, columns.shape[1]) for tensor in found]).to(self.dtype)

    def _restricted(self, rows: TensorSpace, columns: TensorSpace) -> LinearOperator:
        own = self.operator
        return GatheredOperator(own._restricted(own.codomain.subspace(rows.names), own.domain.subspace(columns.names)))
