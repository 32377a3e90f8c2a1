"""What a Kronecker operator knows of each group, apart from model and data: to merge, average and save."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from curvops.kronecker.combine import kronecker_block
from curvops.kronecker.factors import Factors, Side
from curvops.kronecker.groups import Group
from curvops.operators.blocks import Block, EigenBlock, KroneckerBlock
from curvops.space import TensorSpace, describe


class Entry(ABC):
    """What is known of one group, without the risk's constant c."""

    @abstractmethod
    def block(self, constant: float) -> Block | None:
        """The group's block; ``None`` if no row was seen."""

    @property
    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What is saved."""

    @property
    def numbers(self) -> dict[str, Any]:
        """What is saved beside the tensors."""
        return {}

    def combined(self, other: Entry, mine: float, its: float) -> Entry:
        """``mine`` · this + ``its`` · the other.

        Raises:
            ValueError: If such entries cannot be combined exactly.
        """
        raise ValueError(
            f"{type(self).__name__}: eigenvalues in two different eigenbases, or nearest products, do not add. "
            "Merge or average a KFACLinearOperator or a GGNDiagonalLinearOperator instead."
        )


@dataclass
class Moment(Entry):
    """Second moments of a linear group: the block is c · B ⊗ A.

    Attributes:
        factors: Sums over rows.
        outputs_known: Whether B was accumulated; otherwise it is the identity.
        units: What A is divided by, if not by its rows: ``"data"`` or ``"batches"``, all of them, whether they
            reached the layer or not.
    """

    factors: Factors
    outputs_known: bool = True
    units: str | None = None

    def block(self, constant: float) -> KroneckerBlock | None:
        return kronecker_block(self.factors, constant, self.outputs_known)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {
            f"{side}.{name}": tensor
            for side, moments in self.factors.sides.items()
            for name, tensor in (("inputs", moments.inputs), ("outputs", moments.outputs))
        }

    @property
    def numbers(self) -> dict[str, Any]:
        rows = {side: moments.rows for side, moments in self.factors.sides.items()}
        return {"rows": rows, "outputs_known": self.outputs_known, "units": self.units}

    def combined(self, other: Entry, mine: float, its: float) -> Entry:
        assert isinstance(other, Moment)
        sides = {}
        for name in {**self.factors.sides, **other.factors.sides}:
            a, b = self.factors.sides.get(name), other.factors.sides.get(name)
            if a is not None and b is not None:
                inputs, outputs = _mixed(a.inputs, b.inputs, mine, its), _mixed(a.outputs, b.outputs, mine, its)
                sides[name] = Side(inputs, outputs, mine * a.rows + its * b.rows)
            elif a is not None:
                sides[name] = Side(mine * a.inputs, mine * a.outputs, mine * a.rows)
            elif b is not None:
                sides[name] = Side(its * b.inputs, its * b.outputs, its * b.rows)
        return Moment(Factors(sides), self.outputs_known, self.units)

    def divided_by(self, units: float) -> Moment:
        """The same with A over a number of units."""
        sides = {name: replace(side, rows=units) for name, side in self.factors.sides.items()}
        return Moment(Factors(sides), self.outputs_known, self.units)

    def normalised(self, constant: float) -> Moment:
        """The same with A and c · B in the place of sums."""
        c = constant if self.outputs_known else 1.0
        sides = {
            name: Side(side.inputs / side.rows, side.outputs * c, 1)
            for name, side in self.factors.sides.items()
            if side.rows
        }
        return Moment(Factors(sides), self.outputs_known, self.units)


@dataclass
class Whole(Entry):
    """Σ G Gᵀ over whole gradients, or its diagonal: the block is c times it."""

    moment: Tensor
    scaled: bool = True

    def block(self, constant: float) -> Block:
        one = torch.ones(1, 1, dtype=self.moment.dtype, device=self.moment.device)
        return KroneckerBlock(self.moment[None], one, (constant if self.scaled else 1.0, 1.0))

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"moment": self.moment}

    @property
    def numbers(self) -> dict[str, Any]:
        return {"scaled": self.scaled}

    def combined(self, other: Entry, mine: float, its: float) -> Entry:
        assert isinstance(other, Whole)
        total = 1.0 if self.scaled else mine + its  # the identity of forward-only stays what it is
        return Whole(_mixed(self.moment, other.moment, mine / total, its / total), self.scaled)

    def normalised(self, constant: float) -> Whole:
        """The same with the constant inside."""
        return Whole(self.moment * (constant if self.scaled else 1.0), self.scaled)


@dataclass
class Eigen(Entry):
    """Eigenvectors of the factors, and Σ of squares in that basis: the values are c times it."""

    left: Tensor | None
    right: Tensor | None
    total: Tensor

    def block(self, constant: float) -> Block:
        return EigenBlock(self.left, self.right, self.total * constant)

    @property
    def tensors(self) -> dict[str, Tensor]:
        bases = {"left": self.left, "right": self.right}
        return {"total": self.total, **{name: basis for name, basis in bases.items() if basis is not None}}

    def combined(self, other: Entry, mine: float, its: float) -> Entry:
        assert isinstance(other, Eigen)
        if any(basis is not None for basis in (self.left, self.right, other.left, other.right)):
            return super().combined(other, mine, its)
        return Eigen(None, None, mine * self.total + its * other.total)

    def normalised(self, constant: float) -> Eigen:
        """The same with the constant inside."""
        return Eigen(self.left, self.right, self.total * constant)


@dataclass
class Product(Entry):
    """Factors of a nearest Kronecker product: the block is c · left ⊗ right."""

    left: Tensor
    right: Tensor

    def block(self, constant: float) -> Block:
        return KroneckerBlock(self.left * constant, self.right)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"left": self.left, "right": self.right}


def entry_from(kind: str, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> Entry:
    """The entry of a kind from what was saved of it."""
    if kind == "Moment":
        sides = {
            side: Side(tensors[f"{side}.inputs"], tensors[f"{side}.outputs"], rows)
            for side, rows in numbers["rows"].items()
        }
        return Moment(Factors(sides), numbers["outputs_known"], numbers["units"])
    if kind == "Whole":
        return Whole(tensors["moment"], numbers["scaled"])
    if kind == "Eigen":
        return Eigen(tensors.get("left"), tensors.get("right"), tensors["total"])
    if kind == "Product":
        return Product(tensors["left"], tensors["right"])
    raise ValueError(f"expected an entry of kind Moment, Whole, Eigen or Product, got {kind!r}.")


@dataclass
class State:
    """What a Kronecker operator is made of.

    Attributes:
        kind: Name of the operator's class.
        space: The space of the parameters.
        groups: The groups, and what is known of each.
        reduction: ``"mean"`` or ``"sum"``.
        count: Denominator of the mean, so that c = 1/count.
        units: Number of data and of batches.
        settings: Options that the state was computed with.
        averaged: Whether the constant is inside already, after a moving average.
    """

    kind: str
    space: TensorSpace
    groups: list[tuple[Group, Entry]]
    reduction: str
    count: float
    units: dict[str, int]
    settings: dict[str, Any] = field(default_factory=dict)
    averaged: bool = False

    @property
    def constant(self) -> float:
        """The risk's constant c."""
        return 1.0 if self.reduction == "sum" else 1.0 / self.count

    def merged(self, other: State) -> State:
        """The state of both data sets together, exactly.

        Raises:
            ValueError: If the states are of different kinds, parameters or options, or do not add.
        """
        if self.averaged or other.averaged:
            raise ValueError(
                "merge: a moving average no longer knows how many data it stands for. Use moving_average, or merge first."
            )
        units = {name: self.units[name] + other.units[name] for name in self.units}

        def add(a: Entry, b: Entry) -> Entry:
            both = a.combined(b, 1.0, 1.0)
            return both.divided_by(units[both.units]) if isinstance(both, Moment) and both.units else both

        return replace(self, groups=self._paired(other, add, "merge"), count=self.count + other.count, units=units)

    def average(self, other: State, decay: float) -> State:
        """``decay`` · this + (1 − ``decay``) · the other, of the factors as they enter the blocks."""
        if not 0 <= decay <= 1:
            raise ValueError(f"decay: expected a number from 0 to 1, got {decay!r}.")

        def mix(a: Entry, b: Entry) -> Entry:
            if isinstance(a, Product) or isinstance(b, Product):
                return a.combined(b, decay, 1.0 - decay)
            assert isinstance(a, (Moment, Whole, Eigen)) and isinstance(b, (Moment, Whole, Eigen))
            return a.normalised(self.constant).combined(b.normalised(other.constant), decay, 1.0 - decay)

        return replace(self, groups=self._paired(other, mix, "moving_average"), count=1.0, averaged=True)

    def _paired(self, other: State, combine: Callable[[Entry, Entry], Entry], title: str) -> list[tuple[Group, Entry]]:
        for what in ("kind", "space", "reduction", "settings"):
            if getattr(self, what) != getattr(other, what):
                raise ValueError(
                    f"{title}: expected the same {what}, got {getattr(self, what)} and {getattr(other, what)}."
                )
        groups, rest = [], {_identity(group): (group, entry) for group, entry in other.groups}
        for group, entry in self.groups:
            pair = rest.pop(_identity(group), None)
            if pair is None:
                groups.append((group, combine(entry, _nothing(entry))))
                continue
            if type(pair[1]) is not type(entry):
                raise ValueError(
                    f"{title}: {describe(group.names)} has blocks of different kinds in the two operators."
                )
            groups.append((group, combine(entry, pair[1])))
        groups += [(group, combine(_nothing(entry), entry)) for group, entry in rest.values()]
        return groups


def _mixed(a: Tensor, b: Tensor, mine: float, its: float) -> Tensor:
    if a.shape != b.shape:
        # a diagonal would be added to each row of a matrix
        raise ValueError("a factor is dense in one operator and diagonal in the other. Use the same rule=BlockRule(…).")
    return mine * a + its * b


def _identity(group: Group) -> tuple[object, ...]:
    first = group.places.first
    return (group.names, group.kind, group.shape, first)


def _nothing(entry: Entry) -> Entry:
    """What a data set that never reaches a group knows of it."""
    if isinstance(entry, Moment):
        return Moment(Factors({}), entry.outputs_known, entry.units)
    if isinstance(entry, Whole):
        return Whole(torch.zeros_like(entry.moment), True) if entry.scaled else entry
    if isinstance(entry, Eigen):
        return Eigen(entry.left, entry.right, torch.zeros_like(entry.total))
    return entry
