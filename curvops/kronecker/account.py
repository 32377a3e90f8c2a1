"""What was, or would be, done for each parameter: the source of `explain()` and `plan()`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from curvops.kronecker.factors import BlockRule
from curvops.kronecker.groups import Group
from curvops.kronecker.state import State
from curvops.kronecker.sweep import Sweep
from curvops.operators.block_diagonal import Placed
from curvops.operators.blocks import Block, EigenBlock, KroneckerBlock


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
        table += [(", ".join(r.names), f"{r.size:,}", r.block, r.operation, _bytes(r.memory), r.why) for r in self.rows]
        widths = [max(len(line[k]) for line in table) for k in range(5)]
        lines = [
            "  ".join([*(c.ljust(w) for c, w in zip(line[:5], widths, strict=True)), line[5]]).rstrip()
            for line in table
        ]
        return "\n".join([self.title, *lines, f"total: {_bytes(self.memory)}", *self.notes])

    __repr__ = __str__


def explain_state(
    title: str, state: State, blocks: Sequence[Placed], reasons: Mapping[str, str], notes: Sequence[str]
) -> Explanation:
    """The account of blocks that exist."""
    operations = {group.names: group.operation for group, _ in state.groups}
    rows = []
    for placed in blocks:
        known = placed.names in operations
        why = "; ".join(dict.fromkeys(reasons.get(name, "") for name in placed.names)) if known else "never used"
        what = describe_block(placed.block) if known else "zero"
        rows.append(
            ParameterRow(
                placed.names, placed.block.size, what, operations.get(placed.names, "nothing"), placed.block.memory, why
            )
        )
    return Explanation(title, tuple(rows), tuple(notes))


def describe_block(block: Block) -> str:
    """A block in words."""
    groups, left, right = block.shape
    prefix = f"{groups} × " if groups > 1 else ""
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


def plan(title: str, sweep: Sweep, rule: BlockRule, dtype: torch.dtype, passes: int) -> Explanation:
    """The account of blocks that would be, from the first batch."""
    first = sweep.first()
    rows = []
    for group in first.groups:
        what, entries = _planned(group, rule)
        why = "; ".join(dict.fromkeys(sweep.routes[name].why for name in group.names))
        rows.append(
            ParameterRow(group.names, len(group.positions), what, group.operation, entries * dtype.itemsize, why)
        )
    backward = first.backward_passes
    notes = [
        f"batch of {first.batch_size}: {first.forward_passes} forward and {backward} backward passes to the layers' outputs, "
        f"about {(first.forward_passes + backward) / 3:.1f} gradients; {passes} sweep{'s' if passes > 1 else ''} over the data",
    ]
    if backward > 10:
        notes.append("fewer backward passes: fisher_type='mc' takes mc_samples, 'empirical' one for each loss term")
    if any(row.why.startswith("the rows") for row in rows):
        notes.append(
            "parameters whose rows are not certified are seen one datum at a time; leave them out to save that"
        )
    notes.append("less memory: rule=BlockRule(largest_factor=…, largest_block=…)")
    return Explanation(title, tuple(rows), tuple(notes))


def _planned(group: Group, rule: BlockRule) -> tuple[str, int]:
    """A block in words, and its number of entries."""
    groups, left, right = group.shape
    if group.kind != "linear":
        dense = rule.block(left, group)
        return (f"dense {left}", left * left) if dense else (f"diagonal {left}", left)
    left_dense = rule.factor(left, group) and not group.one_hot
    right_dense = rule.factor(right, group)
    entries = groups * ((left**2 if left_dense else left) + (right**2 if right_dense else right))
    a, b = (f"{size}" if dense else f"diag {size}" for size, dense in ((left, left_dense), (right, right_dense)))
    prefix = f"{groups} × " if groups > 1 else ""
    return f"{prefix}Kronecker {a} ⊗ {b}" if right > 1 else f"{prefix}dense {a}", entries


def _bytes(number: int) -> str:
    size = float(number)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
