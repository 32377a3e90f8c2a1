"""What a Kronecker operator knows of each group, apart from model and data: to merge, average and save."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from curvops.kronecker.groups import Group, joined, overlap
from curvops.operators.block_diagonal import Placed
from curvops.operators.blocks import Block, Decomposed, EigenBlock, KroneckerBlock
from curvops.operators.places import Places
from curvops.space import TensorSpace, describe

_CAUSE = (
    "Does the model mix the data of the batches of one of them only, as batch norm does in train mode, but not in eval mode, nor of a batch "
    "of one datum? Keep the mode, leave such batches out (drop_last=True), or begin a new average. "
)


@dataclass(frozen=True)
class Entry:
    """What is known of one group, without the risk's constant c.

    Attributes:
        kind: ``"moments"``: the block is c · B ⊗ A, from sums over rows by the side of the inputs. ``"inputs"``: the
            same with B = I and without c. ``"block"``: c times a matrix or diagonal. ``"identity"``: without c.
            ``"diagonal"``: c times ``total``. ``"eigen"``: the same in an eigenbasis. ``"product"``: c · left ⊗ right.
        tensors: What it is made of.
        rows: For moments the number of rows that A is divided by, on each side.
    """

    kind: str
    tensors: dict[str, Tensor]
    rows: dict[str, float] = field(default_factory=dict)

    def block(self, constant: float) -> Block | None:
        """The group's block; ``None`` if no row was seen."""
        t = self.tensors
        if self.kind in ("moments", "inputs"):
            return self._kronecker(constant)
        if self.kind in ("block", "identity"):
            one = t["block"].new_ones(1, 1)
            return KroneckerBlock(t["block"][None], one, (constant if self.kind == "block" else 1.0, 1.0))
        if self.kind in ("diagonal", "eigen"):
            return EigenBlock(t.get("left"), t.get("right"), t["total"] * constant)
        if self.kind == "product":
            return KroneckerBlock(t["left"] * constant, t["right"])
        raise ValueError(f"expected an entry of a known kind, got {self.kind!r}.")

    def combined(self, other: Entry, mine: float, its: float) -> Entry:
        """``mine`` · this + ``its`` · the other; an error if such entries cannot be combined exactly."""
        self.expect_addable()
        if self.kind == "identity":
            return self
        tensors = {
            name: _sum(self.tensors.get(name), other.tensors.get(name), mine, its)
            for name in {**self.tensors, **other.tensors}
        }
        sides = {**self.rows, **other.rows}
        return Entry(self.kind, tensors, {s: mine * self.rows.get(s, 0) + its * other.rows.get(s, 0) for s in sides})

    def expect_addable(self) -> None:
        """A ValueError for what cannot be combined."""
        if self.kind in ("eigen", "product"):
            raise ValueError(
                "eigenvalues in two different eigenbases, or nearest products, do not add. "
                "Merge or average a KFACLinearOperator or a GGNDiagonalLinearOperator instead."
            )

    def spread(self, places: Tensor, size: int, dense: bool) -> Entry:
        """The matrix or diagonal of so many entries, of which these have its places and the others gradients of zero."""
        own = self.tensors["block"]
        own = own if dense or own.ndim == 1 else own.diagonal()
        block = own.new_zeros([size] * own.ndim)
        block[torch.meshgrid(*[places] * own.ndim, indexing="ij")] = own
        return replace(self, tensors={"block": block})

    def normalised(self, constant: float) -> Entry:
        """The same with the constant inside, and A in the place of its sum."""
        if self.kind == "identity":
            return self
        if self.kind not in ("moments", "inputs"):
            return Entry(self.kind, {name: tensor * constant for name, tensor in self.tensors.items()})
        c, old = constant if self.kind == "moments" else 1.0, self.tensors
        new: dict[str, Tensor] = {}
        rows = {s: number for s, number in self.rows.items() if number and f"{s}.inputs" in old}
        for s, number in rows.items():
            new |= {f"{s}.inputs": old[f"{s}.inputs"] / number, f"{s}.outputs": old[f"{s}.outputs"] * c}
        return Entry(self.kind, new, dict.fromkeys(rows, 1))

    def _kronecker(self, constant: float) -> Block | None:
        """c · B ⊗ A in the order of the weight; for one that is used in both directions, the product nearest to the sum."""
        found = []
        for side, rows in self.rows.items():
            if rows:
                outputs = self.tensors[f"{side}.outputs"]
                known = (outputs, constant) if self.kind == "moments" else (_identity(outputs), 1.0)
                pair = (known, (self.tensors[f"{side}.inputs"], 1 / rows))
                (left, a), (right, b) = pair if side == "right" else pair[::-1]
                found.append(KroneckerBlock(left, right, (a, b)))
        if len(found) < 2:
            return found[0] if found else None
        return KroneckerBlock(*nearest_product([(block.left, block.right) for block in found]))


@dataclass(frozen=True)
class State:
    """What a Kronecker operator is made of."""

    kind: str  # name of the operator's class
    space: TensorSpace
    groups: list[tuple[Group, Entry]]
    reduction: str
    count: float  # denominator of the mean, so that c = 1/count
    data: dict[str, int]  # for each parameter the number of data, of batches where the model mixes their data
    settings: dict[str, Any] = field(default_factory=dict)  # the options
    averaged: bool = False  # whether the constant is inside already, after a moving average

    @property
    def constant(self) -> float:
        """The risk's constant c."""
        return 1.0 if self.reduction == "sum" else 1.0 / self.count

    def blocks(self) -> list[Placed]:
        """Blocks that cover all parameters; what the model never uses is exactly zero."""
        placed = []
        decomposed: list[tuple[Tensor, Decomposed]] = []
        for group, entry in self.groups:
            if (block := entry.block(self.constant)) is not None:
                if isinstance(block, KroneckerBlock):
                    block.decomposed = decomposed  # a bias has its weight's B
                placed.append(Placed(group.names, group.places, block))
        if sum(len(one.places) for one in placed) == self.space.dim:
            return placed  # blocks do not overlap
        missing = torch.ones(self.space.dim, dtype=torch.bool, device=self.space.device)
        for one in placed:
            missing[one.places.index] = False
        dtype = torch.promote_types(self.space.dtype, torch.float32)
        for name in self.space.names:
            own = self.space.slice(name)
            left = missing[own].nonzero().squeeze(1) + own.start
            if len(left):
                zeros = torch.zeros(1, len(left), dtype=dtype, device=left.device)
                placed.append(Placed((name,), Places(left, left.device), KroneckerBlock(zeros, zeros.new_ones(1, 1))))
        return placed

    def merged(self, other: State) -> State:
        """The state of both data sets together, exactly."""
        if self.averaged or other.averaged:
            raise ValueError(
                "merge: a moving average no longer knows how many data it stands for. Use moving_average, or merge first."
            )
        groups = self._paired(other, lambda a, b: a.combined(b, 1.0, 1.0), "merge")
        data = {name: number + other.data[name] for name, number in self.data.items()}
        return replace(self, groups=groups, count=self.count + other.count, data=data)

    def average(self, other: State, decay: float) -> State:
        """``decay`` · this + (1 − ``decay``) · the other, of the factors as they enter the blocks."""
        self.expect_average(decay)

        def mix(a: Entry, b: Entry) -> Entry:
            return a.normalised(self.constant).combined(b.normalised(other.constant), decay, 1.0 - decay)

        return replace(self, groups=self._paired(other, mix, "moving_average"), count=1.0, averaged=True)

    def expect_average(self, decay: float) -> None:
        """A ValueError where there is no such average."""
        if not isinstance(decay, (int, float)) or not 0 <= decay <= 1:
            raise ValueError(f"decay: expected a number from 0 to 1, got {decay!r}.")
        for _, entry in self.groups:
            entry.expect_addable()

    def _paired(self, other: State, combine: Callable[[Entry, Entry], Entry], title: str) -> list[tuple[Group, Entry]]:
        for what in ("kind", "space", "reduction", "settings"):
            if getattr(self, what) != getattr(other, what):
                raise ValueError(
                    f"{title}: expected the same {what}, got {getattr(self, what)} and {getattr(other, what)}."
                )
        groups, rest = [], {_mark(group): (group, entry) for group, entry in other.groups}
        for group, entry in self.groups:
            its = rest.pop(_mark(group), (group, other._nothing(group, entry)))[1]
            if its.kind != entry.kind:
                raise ValueError(
                    f"{title}: {describe(group.names)} has blocks of different kinds in the two operators."
                )
            groups.append((group, combine(entry, its)))
        for mark, (group, entry) in list(rest.items()):
            if met := [k for k, (own, _) in enumerate(self.groups) if overlap(own, group)]:
                own, mine = self.groups[met[0]]
                # between several parts of the one there is nothing in the other
                alone = len(met) == 1 == sum(overlap(own, its) for its, _ in other.groups)
                if not (alone and mine.kind == entry.kind == "block"):
                    here, there = (f"{one.kind} ({one.operation})" for one in (own, group))
                    raise ValueError(
                        f"{title}: {describe(group.names)} has blocks that overlap, here {here} and there {there}, which "
                        f"do not add. {_CAUSE * (own.kind != group.kind)}Make one operator of all the data."
                    )
                both, *places = joined(own, group)
                # the larger part may be too large for a matrix
                dense = all(one.tensors["block"].ndim == 2 for one in (mine, entry))
                pair = (
                    one.spread(its, len(both.places), dense) for one, its in zip((mine, entry), places, strict=True)
                )
                groups[met[0]] = both, combine(*pair)
                del rest[mark]
        return groups + [(group, combine(self._nothing(group, entry), entry)) for group, entry in rest.values()]

    def _nothing(self, group: Group, entry: Entry) -> Entry:
        """What data that never reach a group, which other data reached, know of it."""
        if entry.kind in ("eigen", "product", "identity"):
            return entry
        rows = self.data[group.names[0]] if self.settings.get("kfac_approx") == "reduce" else 0
        return Entry(entry.kind, {}, dict.fromkeys(entry.rows, rows))


def nearest_product(products: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The Kronecker product nearest to a sum of two, in Frobenius norm (Van Loan & Pitsianis 1993).

    The sum rearranged is Σ vec(L_i) vec(R_i)ᵀ, of rank two; its leading singular pair lies in the spans
    of the L_i and of the R_i, and follows from their Gram matrices. A factor that is diagonal in one term
    is made diagonal in both, since it was found too large for a matrix.
    """
    lefts, rights = (_stack([pair[k] for pair in products]) for k in (0, 1))
    gram_left, gram_right = (f.flatten(2) @ f.flatten(2).mT for f in (lefts, rights))
    # leading eigenvector x of G_R G_L gives L = Σ x_i L_i up to scale
    values, vectors = torch.linalg.eig(gram_right @ gram_left)
    x = vectors[torch.arange(len(vectors), device=vectors.device), :, values.real.argmax(1)].real.abs()
    y = (gram_left @ x.unsqueeze(-1)).squeeze(-1)
    y = y / (x * y).sum(1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    return torch.einsum("gi,gi...->g...", x, lefts), torch.einsum("gi,gi...->g...", y, rights)


def _stack(factors: list[Tensor]) -> Tensor:
    if len({f.ndim for f in factors}) > 1:
        factors = [f if f.ndim == 2 else f.diagonal(dim1=1, dim2=2) for f in factors]
    return torch.stack(factors, 1)


def _identity(like: Tensor) -> Tensor:
    if like.ndim == 2:
        return torch.ones_like(like)
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device).expand_as(like).contiguous()


def _sum(a: Tensor | None, b: Tensor | None, mine: float, its: float) -> Tensor:
    if a is None or b is None:
        return mine * a if a is not None else its * b if b is not None else torch.empty(0, device="cpu")
    if a.shape != b.shape:
        # a diagonal would be added to each row of a matrix
        raise ValueError("a factor is dense in one operator and diagonal in the other. Use the same rule=BlockRule(…).")
    return mine * a + its * b


def _mark(group: Group) -> tuple[object, ...]:
    """The same for a group of both data sets."""
    where = group.places.index
    ramp = torch.arange(1, len(group.places) + 1, device=group.places.device)
    # exact, up to overflow that is the same everywhere
    place = where.start if isinstance(where, slice) else (int(where[:1].sum()), int((where * ramp**3).sum()))
    return (group.names, group.kind, group.shape, place)
