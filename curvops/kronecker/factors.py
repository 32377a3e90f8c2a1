"""Accumulates what a sweep gives: Kronecker factors, and blocks of whole gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from curvops.gram import add_moment, mirrored
from curvops.kronecker.captured import Captured
from curvops.kronecker.groups import Group, arranged_inputs, arranged_outputs, vector_gradients
from curvops.kronecker.uses import LinearUse, OneHot, Windows
from curvops.products.account import relative_difference, tolerance
from curvops.space import describe

Slopes = Mapping[int, Tensor | None]  # gradients at the outputs of uses, by their index
# for each form of convolution seen so far, whether the autocorrelation gave the windows' moment on one datum
CERTIFIED: dict[tuple[object, ...], bool] = {}


@dataclass(frozen=True)
class BlockRule:
    """When a block or a factor is kept as its diagonal.

    Attributes:
        largest_factor: Side of a Kronecker factor up to which it is dense. (The inputs of an embedding are unit
            vectors, so their factor is diagonal by nature, whatever its side.)
        largest_block: Entries of a parameter without Kronecker structure up to which its block is dense.
        allow_diagonal: Whether diagonals may be kept at all; otherwise an error names the parameter.
    """

    largest_factor: int = 10_000
    largest_block: int = 1_024
    allow_diagonal: bool = True

    def factor(self, size: int, group: Group) -> bool:
        """Whether a factor is dense."""
        return self._dense(size, self.largest_factor, "largest_factor", "Kronecker factor of side", group)

    def block(self, size: int, group: Group) -> bool:
        """Whether a block is dense."""
        return self._dense(size, self.largest_block, "largest_block", "block of side", group)

    def _dense(self, size: int, largest: int, option: str, what: str, group: Group) -> bool:
        if size > largest and not self.allow_diagonal:
            raise ValueError(
                f"{describe(group.names)}: a {what} {size:,} is beyond {option}={largest:,}, and diagonals are not "
                f"allowed. Pass rule=BlockRule({option}={size}), allow_diagonal=True, or leave the parameter out."
            )
        return size <= largest


@dataclass
class Side:
    """Second moments of the rows on one side, for one way of using the weight.

    Attributes:
        inputs: Σ a aᵀ ``[groups, in, in]``, or its diagonal ``[groups, in]``.
        outputs: Σ g gᵀ likewise; a lone bias may hold its weight's.
        rows: Number of rows in ``inputs``.
    """

    inputs: Tensor
    outputs: Tensor
    rows: float = 0


@dataclass
class Factors:
    """Second moments of one group, by the side that the inputs are on (a tied weight has both)."""

    sides: dict[str, Side] = field(default_factory=dict)

    def finished(self) -> Factors:
        """The same after the last row."""
        for side in self.sides.values():
            mirrored(side.inputs)
            mirrored(side.outputs)
        return self


@dataclass(frozen=True)
class Moments:
    """Adds a backward pass's rows to the Kronecker factors of its groups.

    Args:
        approximation: ``"expand"`` or ``"reduce"`` (Eschenhagen et al. 2023, arXiv 2311.00636).
        dtype: Precision of the accumulation.
        rule: When a factor is kept as its diagonal.
    """

    approximation: str
    dtype: torch.dtype
    rule: BlockRule

    def add(self, group: Group, factors: Factors, captured: Captured, outputs: bool = True) -> None:
        """Add the rows of one backward pass, those of the ``outputs`` too if they are not added elsewhere."""
        slopes = captured.slopes if outputs else {}
        if self.approximation == "expand":
            self._expand(group, factors, captured, slopes)
        else:
            self._reduce(group, factors, captured, slopes)

    def _expand(self, group: Group, factors: Factors, captured: Captured, slopes: Slopes) -> None:
        tape = captured.tape
        for k, role in captured.uses[group.key]:
            if role == "bias":
                self._add_ones(group, factors, captured, k)
            elif not (captured.first and self._add_windows(group, factors, captured, k, role)):
                a = arranged_inputs(tape, k, role)
                side = self.side(group, factors, _input_side(captured, k, role), isinstance(a, OneHot))
                if captured.first:
                    side.rows += _count(a)
                    _add_moment(side.inputs, a, self.dtype)
            side = factors.sides[_input_side(captured, k, role)]
            g = slopes.get(k)
            if g is not None:
                _add_moment(side.outputs, arranged_outputs(tape, k, role, g), self.dtype)

    def _add_ones(self, group: Group, factors: Factors, captured: Captured, k: int) -> None:
        """Add Σ a aᵀ of a lone bias, whose inputs are ones."""
        use = captured.tape.uses[k]
        assert isinstance(use, LinearUse)
        side = self.side(group, factors, "right", False)
        if captured.first:
            side.inputs += use.lead.numel()
            side.rows += use.lead.numel()

    def _add_windows(self, group: Group, factors: Factors, captured: Captured, k: int, role: str) -> bool:
        """Add a convolution's Σ a aᵀ by autocorrelation, if that is certified and the windows are not needed anyway."""
        use = captured.tape.uses[k]
        assert isinstance(use, LinearUse)
        windows = use.inputs
        if not isinstance(windows, Windows) or (k, role) in captured.tape.inputs:
            return False
        side = self.side(group, factors, "right", False)
        if side.inputs.ndim == 2 or not windows.correlates:
            return False
        joint = role == "joint"
        x = windows.input
        form = (windows.kernel, windows.padding, x.shape[1:], x.dtype, self.dtype, x.device, joint)
        if form not in CERTIFIED:
            CERTIFIED[form] = _equal_on_one(windows, self.dtype, joint)
        if not CERTIFIED[form]:
            return False
        side.inputs[0] += windows.moment(self.dtype, joint)
        side.rows += use.lead.numel()
        return True

    def _reduce(self, group: Group, factors: Factors, captured: Captured, slopes: Slopes) -> None:
        """Rows of a unit are added over its uses before they are squared; inputs are averaged."""
        tape, uses = captured.tape, captured.uses[group.key]
        for input_side in sorted({_input_side(captured, k, role) for k, role in uses}):
            mine = [(k, role) for k, role in uses if _input_side(captured, k, role) == input_side]
            inputs = [arranged_inputs(tape, k, role) for k, role in mine]
            side = self.side(group, factors, input_side, any(isinstance(a, OneHot) for a in inputs))
            if captured.first:
                rows = sum(_count(a) for a in inputs) // tape.units
                total = sum(_summed(a, self.dtype) for a in inputs)
                assert isinstance(total, Tensor)
                _add_moment(side.inputs, total.unsqueeze(1) / max(rows, 1), self.dtype)
            found = [(k, role, g) for k, role in mine if (g := slopes.get(k)) is not None]
            if found:
                total = sum(arranged_outputs(tape, k, role, g).to(self.dtype).sum(1) for k, role, g in found)
                assert isinstance(total, Tensor)
                _add_moment(side.outputs, total.unsqueeze(1), self.dtype)

    def side(
        self, group: Group, factors: Factors, input_side: str, one_hot: bool, outputs: Tensor | None = None
    ) -> Side:
        """The moments of one side, zero at first, or with ``outputs`` that another group adds to."""
        if input_side not in factors.sides:
            count, left, right = group.shape
            a, g = (right, left) if input_side == "right" else (left, right)
            inputs = self._zeros(count, a, not one_hot and self.rule.factor(a, group), group)
            if outputs is None:
                outputs = self._zeros(count, g, self.rule.factor(g, group), group)
            factors.sides[input_side] = Side(inputs, outputs)
        return factors.sides[input_side]

    def _zeros(self, count: int, size: int, dense: bool, group: Group) -> Tensor:
        shape = (count, size, size) if dense else (count, size)
        return torch.zeros(shape, dtype=self.dtype, device=group.places.device)


class WholeGradients:
    """Adds whole gradients to a dense block Σ G Gᵀ, or to its diagonal."""

    def __init__(self, size: int, dense: bool, dtype: torch.dtype, device: torch.device) -> None:
        self.moment = torch.zeros((size, size) if dense else (size,), dtype=dtype, device=device)

    def add(self, gradients: Tensor) -> None:
        """Add gradients ``[units, size]``."""
        rows = gradients.to(self.moment.dtype)
        if self.moment.ndim == 2:
            self.moment.addmm_(rows.T, rows)
        else:
            self.moment += rows.square().sum(0)


def whole_gradients(group: Group, captured: Captured) -> Tensor | None:
    """Gradients ``[units, size]`` of a vector or leaf group, if the pass reached it."""
    if group.kind == "leaf":
        return captured.leaves.get(group.key)
    if group.key not in captured.uses:
        return None
    return vector_gradients(captured.uses[group.key], captured.tape, captured.slopes)


def _add_moment(moment: Tensor, rows: Tensor | OneHot, dtype: torch.dtype) -> None:
    """Add Σ rows rowsᵀ, or its diagonal, for rows ``[units, positions, groups, c]``."""
    if isinstance(rows, OneHot):
        ids = rows.ids.flatten()
        moment += torch.bincount(ids[ids >= 0], minlength=rows.width).to(dtype)
    else:
        add_moment(moment, rows.to(dtype))


def _summed(rows: Tensor | OneHot, dtype: torch.dtype) -> Tensor:
    """Sum over positions, ``[units, groups, c]``."""
    if not isinstance(rows, OneHot):
        return rows.to(dtype).sum(1)
    total = torch.zeros(rows.ids.shape[0], rows.width + 1, dtype=dtype, device=rows.ids.device)
    ids = rows.ids.flatten(1) % (rows.width + 1)
    total.scatter_add_(1, ids, torch.ones_like(ids, dtype=dtype))
    return total[:, None, :-1]


def _count(rows: Tensor | OneHot) -> int:
    return rows.ids.numel() if isinstance(rows, OneHot) else rows.shape[0] * rows.shape[1]


def _equal_on_one(windows: Windows, dtype: torch.dtype, joint: bool) -> bool:
    """Whether autocorrelation and windows give the same moment on the first datum."""
    rows = windows(1).to(dtype).flatten(0, 2)
    if joint:
        rows = torch.cat([rows, torch.ones_like(rows[:, :1])], 1)
    return relative_difference(windows.moment(dtype, joint, 1), rows.T @ rows) <= tolerance(dtype)


def _input_side(captured: Captured, k: int, role: str) -> str:
    use = captured.tape.uses[k]
    assert isinstance(use, LinearUse)
    return "right" if role == "bias" else use.input_side
