"""The captured inputs and output gradients of each layer, for optimizers that users build of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from curvops.kronecker.replay import rows_of
from curvops.kronecker.sweep import Sweep
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
    """

    names: tuple[str, ...]
    inputs: Tensor
    output_gradients: Tensor
    transposed: bool
    batch: int


def layer_rows(sweep: Sweep) -> Iterator[LayerRows]:
    """The rows of all linear layers, batch by batch."""
    for place, captured in sweep.captures("Layers"):
        for key, several in rows_of(sweep, captured).items():
            for piece in several:
                a = piece.inputs.ids if isinstance(piece.inputs, OneHot) else piece.inputs
                yield LayerRows(sweep.groups[key].names, a, piece.outputs, piece.input_side == "left", place)
