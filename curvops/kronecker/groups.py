"""Groups of parameters that share one block, and their rows in one backward pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from curvops.kronecker.tape import Tape, views
from curvops.kronecker.uses import LinearUse, OneHot, VectorUse, View
from curvops.operators.places import Places
from curvops.space import TensorSpace

Key = tuple[tuple[object, ...], ...]


@dataclass(frozen=True)
class Group:
    """Parameters with one block of the matrix.

    Attributes:
        key: Its identity from batch to batch.
        names: The parameters, the weight first.
        kind: ``"linear"`` (gradients are sums of left ⊗ right), ``"vector"`` or ``"leaf"`` (whole gradients).
        shape: ``(groups, left, right)``; ``(1, size, 1)`` for the others.
        places: Where the entries of the block sit in the flat vector of all parameters.
        operation: What the parameters are used by.
        one_hot: Whether the inputs are unit vectors.
    """

    key: Key
    names: tuple[str, ...]
    kind: str
    shape: tuple[int, int, int]
    places: Places
    operation: str
    one_hot: bool = False


@dataclass(frozen=True)
class Piece:
    """The rows of a group in one use: inputs ``[units, positions, groups, in]`` and output gradients likewise."""

    inputs: Tensor | OneHot
    outputs: Tensor
    input_side: str

    @property
    def sides(self) -> tuple[Tensor | OneHot, Tensor | OneHot]:
        """Left and right."""
        return (self.outputs, self.inputs) if self.input_side == "right" else (self.inputs, self.outputs)


def places_of(space: TensorSpace, view: View) -> Places:
    """Places of a view's entries in the flat vector, in the view's order."""
    own = space.slice(view.name)
    if view.index is None:
        return Places.range(own.start, own.stop, space.device)
    return Places.listed(view.index.flatten() + own.start)


class Grouping:
    """Assigns uses to groups, the same way in every batch.

    Args:
        space: The space of the parameters.
        joint: Whether a bias joins its weight's block.
    """

    def __init__(self, space: TensorSpace, joint: bool) -> None:
        self.space, self.joint = space, joint
        self.groups: dict[Key, Group] = {}
        self._partners: dict[tuple[object, ...], set[tuple[object, ...] | None]] = {}

    def learn(self, tape: Tape) -> None:
        """Note which weights and biases come together; only exclusive pairs join."""
        for use in tape.uses:
            if isinstance(use, LinearUse):
                w, b = _identity(use.weight), _identity(use.bias)
                for one, other in ((w, b), (b, w)):
                    if one is not None:
                        self._partners.setdefault(one, set()).add(other)

    def overlapping(self, tape: Tape) -> dict[str, str]:
        """Parameters whose parts in different uses overlap, so that no block-diagonal form fits."""
        parts: dict[str, dict[tuple[object, ...], View]] = {}
        for use in tape.uses:
            for view in views(use):
                parts.setdefault(view.name, {})[view.key] = view
        found = {}
        for name, several in parts.items():
            kinds = {isinstance(use, LinearUse) for use in tape.uses if any(v.name == name for v in views(use))}
            if len(kinds) > 1 or (len(several) > 1 and self._overlap(several.values())):
                found[name] = "it is used in overlapping parts"
        return found

    def _overlap(self, several: Iterable[View]) -> bool:
        places = torch.cat([places_of(self.space, view).tensor for view in several])
        return places.unique().numel() < places.numel()

    def assign(self, tape: Tape, names: set[str]) -> dict[Key, list[tuple[int, str]]]:
        """For each group the uses of a tape that belong to it, each as ``(index, role)``.

        Roles: ``"joint"``, ``"weight"``, ``"bias"``, ``"vector"``.
        """
        found: dict[Key, list[tuple[int, str]]] = {}
        for k, use in enumerate(tape.uses):
            for role, parts in self._roles(use, names):
                key = tuple((part.name, *part.key) for part in parts)
                if key not in self.groups:
                    self.groups[key] = self._create(key, use, role, parts)
                elif use.kind not in self.groups[key].operation.split(", "):
                    self.groups[key] = _also(self.groups[key], use)
                found.setdefault(key, []).append((k, role))
        return found

    def leaf(self, name: str, reason: str) -> Group:
        """The group of a parameter that is known by its whole gradients only."""
        size = self.space.shapes[name].numel()
        where = self.space.slice(name)
        key: Key = (("leaf", name),)
        places = Places.range(where.start, where.stop, self.space.device)
        return self.groups.setdefault(key, Group(key, (name,), "leaf", (1, size, 1), places, reason))

    def _roles(self, use: LinearUse | VectorUse, names: set[str]) -> Iterator[tuple[str, list[View]]]:
        if isinstance(use, VectorUse):
            if use.vector.name in names:
                yield "vector", [use.vector]
            return
        weight = use.weight if use.weight is not None and use.weight.name in names else None
        bias = use.bias if use.bias is not None and use.bias.name in names else None
        if weight is not None and bias is not None and self._joined(use):
            yield "joint", [weight, bias]
            return
        if weight is not None:
            yield "weight", [weight]
        if bias is not None:
            yield "bias", [bias]

    def _joined(self, use: LinearUse) -> bool:
        w, b = _identity(use.weight), _identity(use.bias)
        if not (self.joint and use.joint) or w is None or b is None:
            return False
        return self._partners.get(w, {b}) == {b} and self._partners.get(b, {w}) == {w}

    def _create(self, key: Key, use: LinearUse | VectorUse, role: str, parts: list[View]) -> Group:
        places = [places_of(self.space, part) for part in parts]
        names = tuple(part.name for part in parts)
        if isinstance(use, VectorUse):
            return Group(key, names, "vector", (1, len(places[0]), 1), places[0], use.kind)
        if role == "bias":
            return Group(key, names, "linear", (1, len(places[0]), 1), places[0], use.kind)
        shape, one_hot = _shape(use, parts[0])
        where = places[0]
        if role == "joint":
            axis = 2 if use.input_side == "right" else 1
            together = partial(_interleaved, places[0], places[1], shape, axis)
            where = Places(len(places[0]) + len(places[1]), self.space.device, together)
            shape = (shape[0], shape[1] + (axis == 1), shape[2] + (axis == 2))
        return Group(key, names, "linear", shape, where, use.kind, one_hot)


def _interleaved(weight: Places, bias: Places, shape: tuple[int, int, int], axis: int) -> Tensor:
    """The places of a weight with its bias appended to the inputs."""
    return torch.cat([weight.tensor.view(shape), bias.tensor.view(shape[0], -1).unsqueeze(axis)], axis).flatten()


def pieces(uses: Sequence[tuple[int, str]], tape: Tape, slopes: Mapping[int, Tensor | None]) -> list[Piece]:
    """Rows of a linear group in one backward pass, one piece for each use that the pass reached."""
    found = []
    for k, role in uses:
        use, g = tape.uses[k], slopes.get(k)
        assert isinstance(use, LinearUse)
        if g is not None:
            side = "right" if role == "bias" else use.input_side
            found.append(Piece(arranged_inputs(tape, k, role), arranged_outputs(tape, k, role, g), side))
    return found


def arranged_outputs(tape: Tape, k: int, role: str, g: Tensor) -> Tensor:
    """The output gradients of a use unit by unit, ``[units, positions, groups, out]``."""
    use, layout = tape.uses[k], tape.layouts[k]
    assert isinstance(use, LinearUse) and layout is not None
    rows = layout.arrange(use.outputs(g), 2, tape.units)
    return rows.flatten(2).unsqueeze(2) if role == "bias" else rows


def arranged_inputs(tape: Tape, k: int, role: str) -> Tensor | OneHot:
    """The inputs of a use unit by unit, with a one appended for a joint bias, and ones for a lone one."""
    if (k, role) not in tape.inputs:
        tape.inputs[k, role] = _arranged_inputs(tape, k, role)
    return tape.inputs[k, role]


def _arranged_inputs(tape: Tape, k: int, role: str) -> Tensor | OneHot:
    use, layout = tape.uses[k], tape.layouts[k]
    assert isinstance(use, LinearUse) and layout is not None
    if role == "bias":
        return torch.ones(tape.units, use.lead.numel() // tape.units, 1, 1, dtype=tape.z.dtype, device=tape.z.device)
    a = use.inputs()
    if isinstance(a, OneHot):
        return OneHot(layout.arrange(a.ids, 1, tape.units), a.width)
    a = layout.arrange(a, 2, tape.units)
    if role == "joint":
        ones = torch.ones(*a.shape[:-1], 1, dtype=a.dtype, device=a.device)
        if a.stride(1) == 1 < a.stride(3):  # positions come last in memory, and stay there
            return torch.cat([a.movedim(1, 3), ones.movedim(1, 3)], 2).movedim(3, 1)
        a = torch.cat([a, ones], -1)
    return a


def vector_gradients(uses: Sequence[tuple[int, str]], tape: Tape, slopes: Mapping[int, Tensor | None]) -> Tensor | None:
    """Whole gradients ``[units, size]`` of a vector group, summed over its uses."""
    total: Tensor | None = None
    for k, _ in uses:
        use, g, layout = tape.uses[k], slopes.get(k), tape.layouts[k]
        assert isinstance(use, VectorUse) and layout is not None
        if g is not None:
            part = layout.arrange(use.rows(g), 1, tape.units).sum(1)
            total = part if total is None else total + part
    return total


def _identity(view: View | None) -> tuple[object, ...] | None:
    return None if view is None else (view.name, *view.key)


def _also(group: Group, use: LinearUse | VectorUse) -> Group:
    """A group that is used by another kind of operation as well, such as a head that is tied to an embedding."""
    one_hot = group.one_hot or (isinstance(use, LinearUse) and use.one_hot)
    return replace(group, operation=f"{group.operation}, {use.kind}", one_hot=one_hot)


def _shape(use: LinearUse, weight: View) -> tuple[tuple[int, int, int], bool]:
    """``(groups, left, right)`` of a weight, and whether its inputs are unit vectors."""
    groups, width = use.input_shape
    rest = weight.shape.numel() // (groups * width)
    return ((groups, rest, width) if use.input_side == "right" else (groups, width, rest)), use.one_hot
