"""The rows of each layer in a pass: its inputs and output gradients, datum by datum."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from curvops.kronecker.groups import Group, Key, Roles
from curvops.kronecker.tape import Tape
from curvops.kronecker.uses import LinearUse, OneHot, VectorUse

Slopes = Mapping[int, Tensor | None]  # gradients at the outputs of uses, by their index


class Rows:
    """The rows of one use of a layer in some backward passes, each side arranged when it is asked for."""

    def __init__(self, tape: Tape, k: int, role: str, columns: Sequence[Slopes]) -> None:
        use, layout = tape.uses[k], tape.layouts[k]
        assert isinstance(use, LinearUse) and layout is not None
        self.use, self.role, self.size = use, role, tape.size
        self.input_side = "right" if role == "bias" else use.input_side
        self.one_hot = role != "bias" and use.one_hot
        self._z, self._layout = tape.z, layout
        self._slopes = [g for slopes in columns if (g := slopes.get(k)) is not None]

    @property
    def count(self) -> int:
        """Number of rows."""
        return self.use.lead.numel()

    @property
    def positions(self) -> Tensor | int:
        """Number of rows of each datum that are there, ``[data]``, or of all of them alike."""
        if self.one_hot and isinstance(self.inputs, OneHot):
            return self.inputs.there.flatten(1).sum(1)
        return self.count // self.size

    @cached_property
    def inputs(self) -> Tensor | OneHot:
        """``[data, positions, groups, in]``, with a one appended for a joint bias; ones for a lone one."""
        if self.role == "bias":
            return self._z.new_ones(self.size, self.count // self.size, 1, 1)
        a = self.use.inputs()
        if isinstance(a, OneHot):
            return OneHot(self._layout.arrange(a.ids, 1, self.size), a.width)
        a = self._layout.arrange(a, 2, self.size)
        if self.role == "joint":
            ones = a.new_ones(*a.shape[:-1], 1)
            if a.stride(1) == 1 < a.stride(3):  # positions come last in memory, and stay there
                return torch.cat([a.movedim(1, 3), ones.movedim(1, 3)], 2).movedim(3, 1)
            a = torch.cat([a, ones], -1)
        return a

    @cached_property
    def outputs(self) -> list[Tensor]:
        """Gradients at the output ``[data, positions, groups, out]`` in each backward pass that reached the use."""
        rows = [self._layout.arrange(self.use.outputs(g), 2, self.size) for g in self._slopes]
        return [r.flatten(2).unsqueeze(2) for r in rows] if self.role == "bias" else rows

    def formed(self) -> Rows:
        """Form both sides, and let go of what they are made of."""
        _ = self.inputs, self.outputs
        del self.use, self._z, self._layout, self._slopes
        return self

    @property
    def tensors(self) -> list[Tensor]:
        """The inputs, or what tells of them, and the output gradients."""
        return [self.inputs.ids if isinstance(self.inputs, OneHot) else self.inputs, *self.outputs]

    def replace(self, inputs: Tensor, outputs: list[Tensor]) -> None:
        """Put others in the place of formed `tensors`."""
        self.inputs = OneHot(inputs, self.inputs.width) if isinstance(self.inputs, OneHot) else inputs
        self.outputs = outputs

    def bytes(self, columns: int, outputs: bool) -> int:
        """What the rows take, with the ``outputs`` of some backward passes or without."""
        groups, width = (1, 1) if self.role == "bias" or self.one_hot else self.use.input_shape
        inputs = self.count * groups * (width + (self.role == "joint"))
        size = self.use.outputs(torch.empty(self.use.shape, device="meta")).numel() * columns
        return inputs * (8 if self.one_hot else self._z.itemsize) + outputs * size * self._z.itemsize


@dataclass(frozen=True)
class Pass:
    """One forward pass, and some of its backward passes."""

    tape: Tape
    groups: Mapping[Key, Group]  # that it reached, and those of whole gradients
    roles: Mapping[Key, Roles]
    columns: Sequence[Slopes]  # of each backward pass
    totals: Sequence[Mapping[Key, Tensor]]  # whole gradients [size] in each, of parameters that are not tapped
    first: int  # place of the first backward pass among the ``count`` of this forward pass
    count: int
    batch: int  # its place in the data
    datum: int  # place of the first datum in the batch

    def rows(self) -> Iterator[tuple[Group, list[Rows]]]:
        """The rows of each linear group, a group at a time."""
        for key, uses in self.roles.items():
            if self.groups[key].kind == "linear":
                yield self.groups[key], [Rows(self.tape, k, role, self.columns) for k, role in uses]

    def gradients(self) -> Iterator[tuple[Group, list[Tensor]]]:
        """Whole gradients ``[data, size]`` of all other groups in each backward pass that reached them."""
        for group in self.groups.values():
            if group.kind == "whole":
                yield group, [t[group.key].unsqueeze(0) for t in self.totals if group.key in t]
        for key, uses in self.roles.items():
            if self.groups[key].kind == "vector":
                found = [self._gradient(uses, slopes) for slopes in self.columns]
                yield self.groups[key], [g for g in found if g is not None]

    def _gradient(self, roles: Roles, slopes: Slopes) -> Tensor | None:
        found = [
            layout.arrange(use.rows(g), 1, self.tape.size).sum(1)
            for use, layout, g in ((self.tape.uses[k], self.tape.layouts[k], slopes.get(k)) for k, _ in roles)
            if isinstance(use, VectorUse) and layout is not None and g is not None
        ]
        return torch.stack(found).sum(0) if found else None


@dataclass(frozen=True)
class LayerRows:
    """One use of a layer in one backward pass, for optimizers that users build of them.

    The gradient of datum n in the weight (out × in; with a joint bias appended to ``in``) is
    ``einsum("pgo,pgi->goi", output_gradients[n], inputs[n])``; with ``transposed`` the weight is in × out.

    Attributes:
        names: The parameters.
        inputs: ``[data, positions, groups, in]``; for an embedding the ids ``[data, positions, groups]``, −1 for none.
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


def layer_rows(passes: Iterator[Pass]) -> Iterator[LayerRows]:
    """The rows of all linear layers, batch by batch."""
    for found in passes:
        for group, uses in found.rows():
            for rows in uses:
                a = rows.inputs.ids.clamp(min=-1) if isinstance(rows.inputs, OneHot) else rows.inputs
                for k, g in enumerate(rows.outputs):
                    side = rows.input_side == "left"
                    yield LayerRows(group.names, a, g, side, found.batch, found.datum, found.first + k)
