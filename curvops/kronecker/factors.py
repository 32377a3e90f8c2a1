"""Second moments of a layer's inputs and output gradients, and of whole gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvops.gram import add_moment, mirrored
from curvops.kronecker.groups import Group, Key
from curvops.kronecker.options import Options
from curvops.kronecker.rows import Pass, Rows
from curvops.kronecker.state import Entry
from curvops.kronecker.uses import OneHot, Windows
from curvops.spill import Spill


@dataclass
class Moments:
    """Σ a aᵀ ``[groups, in, in]``, or its diagonal ``[groups, in]``, Σ g gᵀ likewise, and the number of rows a."""

    inputs: Tensor
    outputs: Tensor
    rows: float = 0


class Factors:
    """Kronecker factors of linear groups, ``"expand"`` or ``"reduce"`` (Eschenhagen et al. 2023, arXiv 2311.00636).

    On the ``meta`` device they are shapes only.
    """

    def __init__(self, options: Options, dtype: torch.dtype, spill: Spill) -> None:
        self._expands, self._rule = options.kfac_approx == "expand", options.rule
        self._kind = "inputs" if options.fisher_type == "forward-only" else "moments"
        self._dtype, self._spill = dtype, spill
        self._moments: dict[Key, dict[str, Moments]] = {}  # by the side of the inputs: a tied weight has both
        self._groups: dict[Key, Group] = {}

    def add(self, group: Group, uses: list[Rows], found: Pass) -> None:
        """Add the rows of a layer in a pass, and the inputs if it is the first one of the forward pass."""
        self._groups[group.key] = group
        sides = self._moments.setdefault(group.key, {})
        for side in sorted({rows.input_side for rows in uses}):
            mine = [rows for rows in uses if rows.input_side == side]
            if side not in sides:
                sides[side] = self._zeros(group, side, any(rows.one_hot for rows in mine))
            moments = sides[side]
            if self._spill.device.type == "meta":
                moments.rows = 1
            else:
                add = self._expand if self._expands else self._reduce
                add(moments, mine, found.first == 0, group.weight is None)

    def entries(self, data: Mapping[str, int]) -> dict[Key, Entry]:
        """What was added, and what `data` says of each parameter under ``"reduce"``; the factors are given away."""
        found = {}
        for key, sides in self._moments.items():
            group = self._groups[key]
            tensors: dict[str, Tensor] = {}
            rows: dict[str, float] = {}
            for side, moments in sides.items():
                # a bias that always enters with its weight has the same outputs
                own = moments if group.weight is None else next(iter(self._moments[group.weight].values()))
                tensors |= {f"{side}.inputs": mirrored(moments.inputs), f"{side}.outputs": mirrored(own.outputs)}
                # inputs that were averaged over positions are divided by the number of data, those included that
                # never reached the layer
                rows[side] = moments.rows if self._expands else data[group.names[0]]
            found[key] = Entry(self._kind, tensors, {"rows": rows})
        self._moments = {}
        return found

    def parts(self) -> dict[Key, Entry]:
        """What was added so far, as `put` takes it again."""
        return {
            key: Entry(
                self._kind,
                {f"{s}.{name}": getattr(m, name) for s, m in sides.items() for name in ("inputs", "outputs")},
                {"rows": {s: m.rows for s, m in sides.items()}},
            )
            for key, sides in self._moments.items()
        }

    def put(self, group: Group, part: Entry) -> None:
        """Go on from a part."""
        self._groups[group.key], t, put = group, part.tensors, self._spill.put
        self._moments[group.key] = {
            s: Moments(put(t[f"{s}.inputs"]), put(t[f"{s}.outputs"]), rows) for s, rows in part.numbers["rows"].items()
        }

    def _zeros(self, group: Group, side: str, one_hot: bool) -> Moments:
        groups, left, right = group.shape
        a, g = (right, left) if side == "right" else (left, right)
        dense = [not one_hot and self._rule.factor(a, group.names), self._rule.factor(g, group.names)]
        shapes = [(groups, size, size) if d else (groups, size) for d, size in zip(dense, (a, g), strict=True)]
        if group.weight is not None:  # the outputs of a bias that always enters with its weight are the weight's
            shapes[1] = (0, 0)
        inputs, outputs = (self._spill.zeros(shape, self._dtype) for shape in shapes)
        return Moments(inputs, outputs)

    def _expand(self, moments: Moments, uses: list[Rows], first: bool, outputs: bool) -> None:
        for rows in uses:
            if first:
                self._add_inputs(moments, rows)
            for g in rows.outputs if outputs else ():
                add_moment(moments.outputs, g.to(self._dtype))

    def _add_inputs(self, moments: Moments, rows: Rows) -> None:
        windows = rows.use.inputs
        positions = rows.positions
        moments.rows += int(positions.sum()) if isinstance(positions, Tensor) else rows.count
        if rows.role == "bias":
            moments.inputs += rows.count
        elif isinstance(windows, Windows) and moments.inputs.ndim == 3 and windows.correlates:
            moments.inputs += windows.moment(self._dtype, rows.role == "joint")
        elif isinstance(a := rows.inputs, OneHot):
            ids = a.ids.flatten()
            moments.inputs += torch.bincount(ids[ids >= 0], minlength=a.width).to(self._dtype)
        else:
            add_moment(moments.inputs, a.to(self._dtype))

    def _reduce(self, moments: Moments, uses: list[Rows], first: bool, outputs: bool) -> None:
        """Rows of a datum are added over its uses before they are squared; inputs are averaged."""
        if first:
            positions = sum(rows.positions for rows in uses)
            positions = positions.clamp(min=1).view(-1, 1, 1) if isinstance(positions, Tensor) else max(positions, 1)
            total = torch.stack([_sum(rows.inputs, self._dtype) for rows in uses]).sum(0)
            add_moment(moments.inputs, (total / positions).unsqueeze(1))
        reached = [rows.outputs for rows in uses if rows.outputs] if outputs else []
        for column in zip(*reached, strict=True):
            add_moment(moments.outputs, torch.stack([g.to(self._dtype).sum(1) for g in column]).sum(0).unsqueeze(1))


class WholeGradients:
    """Blocks Σ G Gᵀ of whole gradients, or their diagonals if not ``dense``; identities for ``"forward-only"``."""

    def __init__(self, options: Options, dense: bool, dtype: torch.dtype, spill: Spill) -> None:
        self._identity, self._rule, self._dense = options.fisher_type == "forward-only", options.rule, dense
        self._dtype, self._spill = dtype, spill
        self._blocks: dict[Key, Tensor] = {}

    def add(self, group: Group, gradients: Sequence[Tensor]) -> None:
        """Add gradients ``[data, size]`` of some backward passes."""
        if not (gradients or self._identity or self._spill.device.type == "meta"):
            return
        if group.key not in self._blocks:
            size = len(group.places)
            dense = not self._identity and self._dense and self._rule.block(size, group.names)
            shape = (size, size) if dense else (size,)
            self._blocks[group.key] = self._spill.zeros(shape, self._dtype)
        block = self._blocks[group.key]
        for rows in (g.to(self._dtype) for g in gradients):
            if block.ndim == 2:
                block.addmm_(rows.T, rows)
            else:
                block += rows.square().sum(0)

    def parts(self) -> dict[Key, Entry]:
        """What was added so far, as `put` takes it again."""
        return {key: Entry("block", {"block": block}) for key, block in self._blocks.items()}

    def put(self, group: Group, part: Entry) -> None:
        """Go on from a part."""
        self._blocks[group.key] = self._spill.put(part.tensors["block"])

    def entries(self) -> dict[Key, Entry]:
        """What was added."""
        if self._identity:
            return {key: Entry("identity", {"block": torch.ones_like(b)}) for key, b in self._blocks.items()}
        return self.parts()


def _sum(rows: Tensor | OneHot, dtype: torch.dtype) -> Tensor:
    """Sum over positions, ``[data, groups, c]``."""
    if not isinstance(rows, OneHot):
        return rows.to(dtype).sum(1)
    total = torch.zeros(rows.ids.shape[0], rows.width + 1, dtype=dtype, device=rows.ids.device)
    ids = rows.places.flatten(1)
    total.scatter_add_(1, ids, torch.ones_like(ids, dtype=dtype))
    return total[:, None, :-1]
