"""The captured inputs and output gradients of each layer, for optimizers that users build of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from curvops.kronecker.replay import rows_of
from curvops.kronecker.sweep import Demoted, Sweep
from curvops.kronecker.uses import OneHot


@dataclass(frozen=True)
class LayerRows:
    """One use of a layer in one backward pass.

    The gradient of datum n in the weight (out × in; with a joint bias appended to ``in``) is
    ``einsum("pgo,pgi->goi", output_gradients[n], inputs[n])``; with ``transposed`` the weight is in × out.

    Attributes:
        names: The parameters.
        inputs: ``[data, positions, groups, in]``; for an embedding the ids ``[data, positions, groups]``.
        output_gradients: ``[data, positions, groups, out]``, without the risk's constant c.
        transposed: Whether the weight is stored as in × out.
        batch: Place of the batch in the data.
        datum: Place in the batch of the first of the data. Where a model mixes the data of a batch, they are one.
        column: Place of the backward pass among those of the batch (or of the datum, where it is seen alone). The
            gradients of a layer's several uses in one pass add up; those of different passes are squared first.
    """

    names: tuple[str, ...]
    inputs: Tensor
    output_gradients: Tensor
    transposed: bool
    batch: int
    datum: int
    column: int


def layer_rows(sweep: Sweep, title: str) -> Iterator[LayerRows]:
    """The rows of all linear layers, batch by batch."""
    seen = 0
    while True:
        try:
            for found in _layer_rows(sweep, title, seen):
                yield found
                seen = found.batch + 1
            return
        except Demoted:
            # the batch after those that were seen refuted what was certified; it starts anew
            continue


def _layer_rows(sweep: Sweep, title: str, skip: int) -> Iterator[LayerRows]:
    batch, datum, column = -1, -1, 0
    for place, captured in sweep.captures(title, skip, joined=False):
        if place != batch:
            batch, datum = place, -1
        column = 0 if captured.first else column + 1
        if captured.first and captured.route == "datum":
            datum += 1
        for key, several in rows_of(sweep, captured).items():
            for piece in several:
                a = piece.inputs.ids if isinstance(piece.inputs, OneHot) else piece.inputs
                names, transposed = sweep.groups[key].names, piece.input_side == "left"
                yield LayerRows(names, a, piece.outputs, transposed, place, max(datum, 0), column)
