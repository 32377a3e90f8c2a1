"""The diagonal of the GGN or of a Fisher matrix, as a linear operator."""

from __future__ import annotations

from curvops.kronecker.account import Form, diagonal_form
from curvops.kronecker.collect import DiagonalCollector, WholeCollector
from curvops.kronecker.groups import Group, Key
from curvops.kronecker.operator import KroneckerOperator
from curvops.kronecker.state import Entry


class GGNDiagonalLinearOperator(KroneckerOperator):
    """The diagonal of the GGN (``fisher_type="type-2"``, exact), or of its Monte-Carlo or empirical Fisher.

    Streamed: one backward pass for each column of the output factor, squared datum by datum, so that memory does
    not grow with the number of outputs. Arguments as for `KFACLinearOperator`; ``kfac_approx`` has no effect.

    Example:
        >>> import torch
        >>> from curvops import GGNDiagonalLinearOperator, GGNLinearOperator
        >>> model = torch.nn.Linear(3, 2).double()
        >>> data = [(torch.rand(5, 3).double(), torch.rand(5, 2).double())]
        >>> problem = model, torch.nn.MSELoss(), dict(model.named_parameters()), data
        >>> diagonal = GGNDiagonalLinearOperator(*problem, fisher_type="type-2").diagonal()
        >>> torch.allclose(diagonal, GGNLinearOperator(*problem).to_dense().diagonal())
        True
    """

    def _form(self, group: Group) -> Form:
        return diagonal_form(group)

    def _compute(self) -> dict[Key, Entry]:
        if self.fisher_type == "forward-only":
            raise ValueError(
                "fisher_type: 'forward-only' takes no gradients, so there is no diagonal. Use 'type-2', 'mc' or 'empirical'."
            )
        diagonals = DiagonalCollector(self._sweep, self._compute_dtype, self._budget())
        wholes = WholeCollector(self._sweep, None, self._compute_dtype)
        self._collect(diagonals, wholes)
        return {**diagonals.entries(), **wholes.entries()}
