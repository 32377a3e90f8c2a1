"""What was, or would be, done for each parameter: the source of `explain()` and `plan()`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvops.kronecker.collect import current_groups
from curvops.kronecker.factors import BlockRule
from curvops.kronecker.groups import Group
from curvops.kronecker.state import State
from curvops.kronecker.sweep import Sweep
from curvops.operators.block_diagonal import Placed
from curvops.operators.blocks import Block, EigenBlock, KroneckerBlock
from curvops.operators.places import Places
from curvops.space import TensorSpace


@dataclass(frozen=True)
class ParameterRow:
    """How one block is made.

    Attributes:
        names: Its parameters.
        size: Number of rows.
        block: What the block is.
        operation: What uses the parameters.
        memory: Bytes.
        why: Why it is treated so.
    """

    names: tuple[str, ...]
    size: int
    block: str
    operation: str
    memory: int
    why: str


@dataclass(frozen=True)
class Explanation:
    """A table that prints.

    Attributes:
        title: What it is about.
        rows: One for each block.
        notes: Totals and remarks.
    """

    title: str
    rows: tuple[ParameterRow, ...]
    notes: tuple[str, ...]

    @property
    def memory(self) -> int:
        """Bytes of all blocks."""
        return sum(row.memory for row in self.rows)

    def __str__(self) -> str:
        table = [("parameters", "size", "block", "used by", "memory", "why")]
        table += [
            (", ".join(r.names), f"{r.size:,}", r.block, r.operation, byte_size(r.memory), r.why) for r in self.rows
        ]
        widths = [max(len(line[k]) for line in table) for k in range(5)]
        lines = [
            "  ".join([*(c.ljust(w) for c, w in zip(line[:5], widths, strict=True)), line[5]]).rstrip()
            for line in table
        ]
        return "\n".join([self.title, *lines, f"total: {byte_size(self.memory)}", *self.notes])

    __repr__ = __str__


def explain_state(
    title: str, state: State, blocks: Sequence[Placed], reasons: Mapping[str, str], notes: Sequence[str]
) -> Explanation:
    """The account of blocks that exist."""
    operations = {id(group.places): group.operation for group, _ in state.groups}
    rows = []
    for placed in blocks:
        operation, names, block = operations.get(id(placed.places)), placed.names, placed.block
        if operation is None:
            rows.append(ParameterRow(names, block.size, "zero", "nothing", block.memory, "never used"))
        else:
            why = "; ".join(dict.fromkeys(reasons.get(name, "") for name in names))
            rows.append(ParameterRow(names, block.size, describe_block(block), operation, block.memory, why))
    own = {t.data_ptr(): t.numel() * t.itemsize for _, entry in state.groups for t in entry.tensors.values()}
    shared = {t.data_ptr() for placed in blocks for t in placed.block.tensors.values()}
    beside = sum(size for place, size in own.items() if place not in shared)
    return Explanation(title, tuple(rows), (*notes, f"beside the blocks, for merging and saving: {byte_size(beside)}"))


def describe_block(block: Block) -> str:
    """A block in words."""
    groups, left, right = block.shape
    prefix = _many(groups)
    if isinstance(block, EigenBlock):
        a, b = (
            f"{size}" if basis is not None else f"diag {size}"
            for basis, size in ((block.left, left), (block.right, right))
        )
        if block.left is None and block.right is None:
            return f"diagonal {block.size}"
        return f"{prefix}eigen {a} ⊗ {b}" if right > 1 else f"{prefix}eigen {a}"
    assert isinstance(block, KroneckerBlock)
    a, b = (f"{size}" if f.ndim == 3 else f"diag {size}" for f, size in ((block.left, left), (block.right, right)))
    if right == 1:
        return f"{prefix}dense {left}" if block.left.ndim == 3 else f"{prefix}diagonal {left}"
    return f"{prefix}Kronecker {a} ⊗ {b}"


def uncovered(space: TensorSpace, places: Iterable[Places]) -> Iterator[tuple[str, Tensor]]:
    """The parameters with entries at none of the places, and where those entries are."""
    several = list(places)
    if sum(len(where) for where in several) == space.dim:
        return  # blocks do not overlap
    missing = torch.ones(space.dim, dtype=torch.bool, device=space.device)
    for where in several:
        missing[where.index] = False
    for name in space.names:
        own = space.slice(name)
        left = missing[own].nonzero().squeeze(1) + own.start
        if len(left):
            yield name, left


@dataclass(frozen=True)
class Form:
    """What a block will be: in words as `describe_block` gives, and its number of entries."""

    block: str
    entries: int


def kronecker_form(group: Group, rule: BlockRule, fisher_type: str) -> Form:
    """The form of a Kronecker product, or of the block of whole gradients."""
    if group.kind != "linear":
        dense = fisher_type != "forward-only" and rule.block(len(group.places), group)
        return _whole_form(len(group.places), dense)
    groups, left, right = group.shape
    (left_dense, left_text), (right_dense, right_text) = _sides(group, rule)
    entries = groups * ((left**2 if left_dense else left) + (right**2 if right_dense else right))
    if right == 1:
        return Form(f"{_many(groups)}{'dense' if left_dense else 'diagonal'} {left}", entries)
    return Form(f"{_many(groups)}Kronecker {left_text} ⊗ {right_text}", entries)


def eigen_form(group: Group, rule: BlockRule) -> Form:
    """The form of a Kronecker product's eigenbasis with eigenvalues, or of the block of whole gradients."""
    if group.kind != "linear":
        return _whole_form(len(group.places), rule.block(len(group.places), group))
    groups, left, right = group.shape
    (left_dense, left_text), (right_dense, right_text) = _sides(group, rule)
    entries = groups * (left * right + (left**2 if left_dense else 0) + (right**2 if right_dense else 0))
    if not (left_dense or right_dense):
        return Form(f"diagonal {len(group.places)}", entries)
    return Form(f"{_many(groups)}eigen {left_text}{f' ⊗ {right_text}' if right > 1 else ''}", entries)


def diagonal_form(group: Group) -> Form:
    """The form of a diagonal."""
    size = len(group.places)
    return Form(f"diagonal {size}", size) if group.kind == "linear" else _whole_form(size, dense=False)


def _whole_form(size: int, dense: bool) -> Form:
    # the one that is the other factor counts
    return Form(f"dense {size}", size * size + 1) if dense else Form(f"diagonal {size}", size + 1)


def _sides(group: Group, rule: BlockRule) -> list[tuple[bool, str]]:
    """For each side whether its factor is dense, and the factor in words."""
    _, left, right = group.shape
    dense = [rule.factor(left, group) and not group.one_hot, rule.factor(right, group)]
    return [(d, f"{size}" if d else f"diag {size}") for d, size in zip(dense, (left, right), strict=True)]


def _many(groups: int) -> str:
    return f"{groups} × " if groups > 1 else ""


def plan(
    title: str, sweep: Sweep, form: Callable[[Group], Form], dtype: torch.dtype, again: int, budget: int
) -> Explanation:
    """The account of blocks that would be, from the first batch.

    Args:
        title: What it is about.
        sweep: The sweep that would be made.
        form: What a group's block would be.
        dtype: Precision of the blocks.
        again: Further sweeps, at most, where the rows of the first are not kept.
        budget: Bytes that may be kept.
    """
    first, space = sweep.first(), sweep.risk.space
    groups = list(current_groups(sweep).values())
    rows = []
    for group in groups:
        planned = form(group)
        why = "; ".join(dict.fromkeys(sweep.routes[name].why for name in group.names))
        memory = planned.entries * dtype.itemsize
        rows.append(ParameterRow(group.names, len(group.places), planned.block, group.operation, memory, why))
    for name, where in uncovered(space, [group.places for group in groups]):
        memory = (len(where) + 1) * dtype.itemsize
        rows.append(ParameterRow((name,), len(where), "zero", "nothing", memory, "never used"))
    backward = first.backward_passes
    notes = [
        f"batch of {first.batch_size}: {first.forward_passes} forward and {backward} backward passes to the layers' outputs, "
        f"about {(first.forward_passes + backward) / 3:.1f} gradients",
        *sweep.notes(),
    ]
    if again:
        notes.append(
            f"rows of this batch: {byte_size(first.row_bytes)}; where those of all batches exceed {byte_size(budget)} "
            f"(memory_budget=), the data is swept {'again' if again == 1 else f'up to {again} times again'}"
        )
    if backward > 10:
        notes.append("fewer backward passes: fisher_type='mc' takes mc_samples, 'empirical' one for each loss term")
    if any(row.why.startswith("the rows") for row in rows):
        notes.append(
            "parameters whose rows are not certified are seen one datum at a time; leave them out to save that"
        )
    notes.append("less memory: rule=BlockRule(largest_factor=…, largest_block=…)")
    return Explanation(title, tuple(rows), tuple(notes))


def byte_size(number: int) -> str:
    """A number of bytes in words."""
    size = float(number)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
