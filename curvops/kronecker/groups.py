"""Groups of parameters that share one block, found in the uses of a forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from curvops.kronecker.tape import Tape
from curvops.kronecker.uses import LinearUse, Use, VectorUse, View
from curvops.operators.places import Places
from curvops.space import TensorSpace

Key = tuple[tuple[object, ...], ...]
Roles = list[tuple[int, str]]  # uses of a group, each as its index and "joint", "weight", "bias" or "vector"


@dataclass(frozen=True)
class Group:
    """Parameters with one block of the matrix, the weight first.

    Of kind ``"linear"`` gradients are sums of left ⊗ right; a ``"whole"`` parameter is known by its gradients only;
    the other kind is ``"vector"``. For a bias that enters with one weight and nowhere else, Σ g gᵀ is the weight's.
    """

    key: Key  # the same from batch to batch
    names: tuple[str, ...]
    kind: str
    shape: tuple[int, int, int]  # (groups, left, right), or (1, size, 1)
    places: Places  # of its entries in the flat vector of all parameters
    operation: str  # what the parameters are used by
    weight: Key | None = None  # the group of a bias's weight


class Grouping:
    """Assigns uses to groups, the same way in every batch; where a batch does not allow it, `again` is set."""

    def __init__(self, space: TensorSpace, joint: bool) -> None:
        self.space, self.joint = space, joint
        # parameters that enter different batches in ways that no block-diagonal form fits, and why
        self.refuted: dict[str, str] = {}
        # of weights and biases, what they always come together with, and the side of the inputs; None if there is none
        self.partners: dict[Key, tuple[Key, str] | None] = {}
        self.restart()

    def restart(self) -> None:
        """Begin anew with what was learnt."""
        self.groups: dict[Key, Group] = {}
        self.of: dict[str, list[Key]] = {}  # the groups that a parameter is seen in by the taps
        self.again = False  # whether the data must be walked again

    def assign(self, tape: Tape, names: set[str]) -> dict[Key, Roles]:
        """For each group the uses of a tape that belong to it, of the parameters with these names."""
        self._pair(tape, names)
        found: dict[Key, Roles] = {}
        for k, use in enumerate(tape.uses):
            for role, parts in self._roles(use, names):
                key = tuple(_identity(part)[0] for part in parts)
                self._add(self._group(key, use, role, parts), use.kind)
                found.setdefault(key, []).append((k, role))
        return found

    def whole(self, name: str, reason: str) -> Group:
        """The group of a parameter that is known by its gradients only."""
        key, places = (("whole", name),), Places(self.space.slice(name), self.space.device)
        return self.groups.setdefault(key, Group(key, (name,), "whole", (1, len(places), 1), places, reason))

    def add(self, group: Group) -> None:
        """Add a group that other data have shown."""
        if group.kind == "whole":
            self.groups.setdefault(group.key, group)
            return
        for kind in group.operation.split(", "):
            self._add(group, kind)

    def _add(self, group: Group, kind: str) -> None:
        known = self.groups.get(group.key)
        if known is None:
            for several in (self.of.setdefault(name, []) for name in group.names):
                if any(overlap(self.groups[other], group) for other in several):
                    self._refute(group)
                several.append(group.key)
        elif (known.kind, known.shape) != (group.kind, group.shape):
            self._refute(group)
        elif kind not in known.operation.split(", "):
            # such as a head that is tied to an embedding
            group = replace(known, operation=f"{known.operation}, {kind}")
        else:
            return
        self.groups[group.key] = group

    def _refute(self, group: Group) -> None:
        if not self.again:  # pairs that were parted explain themselves
            self.refuted |= dict.fromkeys(group.names, "it is used in overlapping parts")
            self.again = True

    def _pair(self, tape: Tape, names: set[str]) -> None:
        """Note which weights and biases come together, and only so."""
        met: dict[Key, set[tuple[Key, str] | None]] = {}
        for use in tape.uses:
            if isinstance(use, LinearUse):
                ends = [_identity(v) if v is not None and v.name in names else None for v in (use.weight, use.bias)]
                for one, other in (ends, ends[::-1]):
                    if one is not None:
                        met.setdefault(one, set()).add((other, use.input_side) if use.joint and other else None)
        self.learn({one: next(iter(others)) if len(others) == 1 else None for one, others in met.items()})

    def learn(self, partners: Mapping[Key, tuple[Key, str] | None]) -> None:
        """Take over what weights and biases come together with; those that also come otherwise are parted."""
        for one, partner in partners.items():
            if self.partners.setdefault(one, partner) != partner and self.partners[one] is not None:
                self.partners[one], self.again = None, True

    def _partner(self, one: Key) -> Key | None:
        """What a weight or bias always comes together with, and that with it."""
        partner = self.partners[one]
        return partner[0] if partner and self.partners.get(partner[0]) == (one, partner[1]) else None

    def _roles(self, use: Use, names: set[str]) -> Iterator[tuple[str, list[View]]]:
        if isinstance(use, VectorUse):
            if use.vector.name in names:
                yield "vector", [use.vector]
            return
        own = {
            role: view
            for role, view in (("weight", use.weight), ("bias", use.bias))
            if view is not None and view.name in names
        }
        if self.joint and len(own) == 2 and self._partner(_identity(own["weight"])):
            yield "joint", list(own.values())
        else:
            yield from ((role, [view]) for role, view in own.items())

    def _group(self, key: Key, use: Use, role: str, parts: Sequence[View]) -> Group:
        where, names = self._places(parts[0]), tuple(part.name for part in parts)
        if isinstance(use, VectorUse):
            return Group(key, names, "vector", (1, len(where), 1), where, use.kind)
        if role == "bias":
            weight = self._partner(key) if use.weight is not None and use.input_shape[0] == 1 else None
            return Group(key, names, "linear", (1, len(where), 1), where, use.kind, weight)
        groups, width = use.input_shape
        rest = len(where) // max(groups * width, 1)
        shape = (groups, rest, width) if use.input_side == "right" else (groups, width, rest)
        if role == "joint":
            axis = 2 if use.input_side == "right" else 1
            bias = self._places(parts[1])
            make = partial(_interleaved, where, bias, shape, axis)
            where = Places(make, self.space.device, len(where) + len(bias))
            shape = (groups, shape[1] + (axis == 1), shape[2] + (axis == 2))
        return Group(key, names, "linear", shape, where, use.kind)

    def _places(self, view: View) -> Places:
        """Places of a view's entries in the flat vector, in the view's order."""
        own = self.space.slice(view.name)
        return Places(own if view.index is None else view.index.flatten() + own.start, self.space.device)


def _identity(view: View) -> Key:
    return ((view.name, *view.key),)


def overlap(one: Group, other: Group) -> bool:
    """Whether two groups share entries of a parameter."""
    return bool(set(one.names) & set(other.names)) and bool(torch.isin(one.places.tensor, other.places.tensor).any())


def joined(one: Group, other: Group) -> tuple[Group, Tensor, Tensor]:
    """The group of all entries that two groups of one parameter have, and the places of each one's among them."""
    here, there = one.places.tensor, other.places.tensor
    union = torch.cat([here, there]).unique()
    both = max(one, other, key=lambda group: len(group.places))
    if len(both.places) < len(union):
        key, places = (*one.key, *other.key), Places(union, union.device)
        both = replace(both, key=key, shape=(1, len(union), 1), places=places)
    ordered, among = both.places.tensor.sort()

    def places_of(own: Tensor) -> Tensor:
        return among[torch.searchsorted(ordered, own)]

    return both, places_of(here), places_of(there)


def _interleaved(weight: Places, bias: Places, shape: tuple[int, int, int], axis: int) -> Tensor:
    """The places of a weight with its bias appended to the inputs."""
    return torch.cat([weight.tensor.view(shape), bias.tensor.view(shape[0], -1).unsqueeze(axis)], axis).flatten()
