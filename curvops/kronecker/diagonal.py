"""The diagonal of the GGN or of a Fisher matrix, as a linear operator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from curvops.kronecker.collect import Collection
from curvops.kronecker.correction import BasisDiagonal
from curvops.kronecker.groups import Group, Key
from curvops.kronecker.operator import KroneckerOperator
from curvops.kronecker.options import Options
from curvops.kronecker.rows import Pass, Rows
from curvops.kronecker.state import Entry


class GGNDiagonalLinearOperator(KroneckerOperator):
    """The diagonal of the GGN (``fisher_type="type-2"``, exact, the default), or of a Monte-Carlo or empirical Fisher.

    Streamed: one backward pass for each loss term of a datum and column of its factor, squared datum by datum, so that
    memory does not grow with the number of outputs. Where these passes are more than ``BlockRule(most_passes=1024)``, as of
    language models and segmentation, the diagonal is estimated with random signs, and a warning says so.

    Args:
        model_func, loss_func, params, data: Model, loss, parameters by name and batches, as of `KFACLinearOperator`.
        check_deterministic, checkpoint: As there.
        options: ``fisher_type``, ``mc_samples``, ``kfac_approx`` and ``separate_weight_and_bias`` (without
            effect), ``num_per_example_loss_terms``, ``seed``, ``rule``, ``memory_budget``, ``spill``, ``reduction``, ``progressbar``,
            ``num_data``, ``batch_size_fn`` and ``process_group``, as there.

    Example:
        >>> import torch
        >>> from curvops import GGNDiagonalLinearOperator, GGNLinearOperator
        >>> model = torch.nn.Linear(3, 2).double()
        >>> data = [(torch.rand(5, 3).double(), torch.rand(5, 2).double())]
        >>> problem = model, torch.nn.MSELoss(), dict(model.named_parameters()), data
        >>> diagonal = GGNDiagonalLinearOperator(*problem).diagonal()
        >>> torch.allclose(diagonal, GGNLinearOperator(*problem).to_dense().diagonal())
        True
    """

    default_fisher_type = "type-2"
    needs_gradients = "so there is no diagonal. Use 'type-2', 'mc' or 'empirical'."

    @classmethod
    def _options(cls, **given: Any) -> Options:
        # no block is joint, so that a damping may be another for the bias
        return replace(super()._options(**given), separate_weight_and_bias=True)

    def _compute(self, collection: Collection) -> dict[Key, Entry]:
        return collection.first(lambda: Diagonals(collection), dense=False, together=True)


class Diagonals:
    """Diagonals of the linear groups' blocks."""

    def __init__(self, collection: Collection) -> None:
        self._collection = collection
        self.parts: dict[Key, Entry] = {}  # what was added so far

    def add(self, group: Group, uses: list[Rows], found: Pass) -> None:
        collection = self._collection
        if group.key not in self.parts:
            total = collection.spill.zeros(group.shape, collection.dtype)
            self.parts[group.key] = Entry("diagonal", {"total": total})
        if not collection.planned:
            BasisDiagonal(self.parts[group.key], collection.budget).add([rows.formed() for rows in uses])

    def entries(self, groups: Mapping[Key, Group], data: Mapping[str, int]) -> dict[Key, Entry]:
        return self.parts
