"""What was, or would be, done for each parameter: the source of `explain()` and `plan()`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from curvops.display import card, table
from curvops.kronecker.collect import Collection
from curvops.kronecker.state import State
from curvops.kronecker.sweep import Sweep
from curvops.memory import byte_size
from curvops.operators.block_diagonal import Placed
from curvops.operators.blocks import Block, EigenBlock
from curvops.space import describe

HEADER = ("parameters", "size", "block", "used by", "memory", "why")


@dataclass(frozen=True)
class ParameterRow:
    """How one block is made: its parameters, number of rows, form, what uses them, bytes, and why so."""

    names: tuple[str, ...]
    size: int
    block: str
    operation: str
    memory: int
    why: str

    @property
    def cells(self) -> tuple[str, ...]:
        """It in words, under `HEADER`."""
        return ", ".join(self.names), f"{self.size:,}", self.block, self.operation, byte_size(self.memory), self.why


@dataclass(frozen=True)
class Explanation:
    """A table that prints: one row for each block, and remarks."""

    title: str
    rows: tuple[ParameterRow, ...]
    notes: tuple[str, ...]

    @property
    def memory(self) -> int:
        """Bytes of all blocks."""
        return sum(row.memory for row in self.rows)

    def __str__(self) -> str:
        lines = [HEADER, *(row.cells for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
        return "\n".join([self.title, *text, f"total: {byte_size(self.memory)}", *self.notes])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = [row.cells for row in self.rows]
        notes = [("total", byte_size(self.memory)), *(("", note) for note in self.notes)]
        return card(self.title, more=table(HEADER, rows) + table((), notes))


def explained(
    title: str, state: State, blocks: Sequence[Placed], reasons: Mapping[str, str], notes: Sequence[str]
) -> Explanation:
    """The account of some blocks, which may be on the ``meta`` device."""
    operations = {id(group.places): group.operation for group, _ in state.groups}
    rows = []
    for placed in blocks:
        operation, names, block = operations.get(id(placed.places)), placed.names, placed.block
        if operation is None:
            rows.append(ParameterRow(names, block.size, "zero", "nothing", block.memory, "never used"))
        else:
            why = "; ".join(dict.fromkeys(reasons.get(name, "") for name in names))
            rows.append(ParameterRow(names, block.size, _described(block), operation, block.memory, why))
    shared = {id(tensor) for placed in blocks for tensor in placed.block.tensors.values()}
    own = {id(t): t.numel() * t.itemsize for _, entry in state.groups for t in entry.tensors.values()}
    beside = sum(size for place, size in own.items() if place not in shared)
    met = Counter(name for group, _ in state.groups for name in group.names)
    if parts := [name for name, number in met.items() if number > 1]:
        notes = [*notes, f"used in parts, each with a block of its own and none between them: {describe(parts)}"]
    return Explanation(title, tuple(rows), (*notes, f"beside the blocks, for merging and saving: {byte_size(beside)}"))


SIGNED = (
    "more than rule.most_passes={:,} backward passes a batch would keep all loss terms apart; terms of a datum share one "
    "with random signs, so that cross terms vanish in expectation only: blocks are estimates, which depend on seed="
)
MINGLED = (
    "samples of data whose rows cannot be told apart share a backward pass: their cross terms vanish in expectation only, "
    "so that the matrix depends on the batches"
)
GATHERED = "parameters are cut over processes: rows of a layer are gathered, and each process has all blocks whole"


def signed_note(sweep: Sweep) -> list[str]:
    """What is not exact where loss terms share backward passes."""
    return [SIGNED.format(sweep.options.rule.most_passes)] if sweep.signed else []


def notes_of(collection: Collection, further_walks: int) -> list[str]:
    """Remarks on what was done."""
    sweep = collection.sweep
    notes = [f"{sweep.backward_passes:,} backward passes to the layers' outputs", *signed_note(sweep)]
    notes += [f"batches {choice}: {why}" for choice, why in sweep.division.account.rows.values()]
    notes += [MINGLED] * sweep.mingled + [GATHERED] * bool(sweep.risk.space.shards)
    notes += [f"rows kept for the second look: {byte_size(collection.kept_bytes)}"] * (further_walks > 0)
    return notes + [f"taken in files of spill=: {byte_size(collection.spill.bytes)}"] * collection.spill.active


def plan_notes(collection: Collection, further_walks: int) -> list[str]:
    """Remarks on what a first batch would take."""
    sweep = collection.sweep
    forward, backward = sweep.forward_passes, sweep.backward_passes
    notes = [
        f"batch of {sweep.size}: {forward} forward and {backward} backward passes to the layers' outputs, "
        f"about {(forward + backward) / 3:.1f} gradients",
        *signed_note(sweep),
        *[MINGLED] * sweep.mingled,
        *[GATHERED] * bool(sweep.risk.space.shards),
    ]
    if further_walks:
        again = "again" if further_walks == 1 else f"up to {further_walks} times again"
        notes.append(
            f"rows of this batch: {byte_size(collection.kept_bytes)}; where those of all batches exceed "
            f"{byte_size(collection.budget)} (memory_budget=), the data is swept {again}"
        )
    if backward > 10:
        notes.append("fewer backward passes: fisher_type='mc' takes mc_samples, 'empirical' one for each loss term")
    if any(why.startswith("the rows") for whys in sweep.reasons.values() for why in whys):
        notes.append(
            "parameters whose rows are not certified are seen one datum at a time; leave them out to save that"
        )
    return [*notes, "less memory: rule=BlockRule(largest_factor=…, largest_block=…)"]


def _described(block: Block) -> str:
    """A block in words."""
    groups, left, right = block.shape
    many, eigen = f"{groups} × " if groups > 1 else "", isinstance(block, EigenBlock)
    factors = (block.left, block.right) if isinstance(block, EigenBlock) else tuple(block.tensors.values())
    dense = [factor is not None and factor.ndim == 3 for factor in factors]
    a, b = (f"{size}" if d or size == 1 else f"diag {size}" for d, size in zip(dense, (left, right), strict=True))
    if eigen and not any(dense):
        return f"diagonal {block.size}"
    if right == 1:
        return f"{many}{'eigen' if eigen else 'dense' if dense[0] else 'diagonal'} {left}"
    return f"{many}{'eigen' if eigen else 'Kronecker'} {a} ⊗ {b}"
