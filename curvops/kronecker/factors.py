"""Second moments of a layer's inputs and output gradients, and of whole gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from curvops.gram import add_moment, mirrored
from curvops.kronecker.groups import Group, Key
from curvops.kronecker.options import Options
from curvops.kronecker.rows import Pass, Rows
from curvops.kronecker.state import Entry
from curvops.kronecker.uses import OneHot, Windows
from curvops.spill import Spill


class Factors:
    """Kronecker factors of linear groups, ``"expand"`` or ``"reduce"`` (Eschenhagen et al. 2023, arXiv 2311.00636).

    On the ``meta`` device they are shapes only.

    Attributes:
        parts: What was added so far: Σ a aᵀ ``[groups, in, in]``, or its diagonal ``[groups, in]``, Σ g gᵀ likewise,
            and the number of rows a, by the side of the inputs: a tied weight has both.
    """

    def __init__(self, options: Options, dtype: torch.dtype, spill: Spill) -> None:
        self._expands, self._rule = options.kfac_approx == "expand", options.rule
        self._kind = "inputs" if options.fisher_type == "forward-only" else "moments"
        self._dtype, self._spill = dtype, spill
        self.parts: dict[Key, Entry] = {}

    def add(self, group: Group, uses: list[Rows], found: Pass) -> None:
        """Add the rows of a layer in a pass, and the inputs if it is the first one of the forward pass."""
        part = self.parts.setdefault(group.key, Entry(self._kind, {}))
        for side in sorted({rows.input_side for rows in uses}):
            mine = [rows for rows in uses if rows.input_side == side]
            if side not in part.rows:
                part.tensors.update(self._zeros(group, side, any(rows.one_hot for rows in mine)))
                part.rows[side] = 0
            if self._spill.device.type == "meta":
                part.rows[side] = 1
            else:
                inputs, outputs = part.tensors[f"{side}.inputs"], part.tensors[f"{side}.outputs"]
                add = self._expand if self._expands else self._reduce
                part.rows[side] += add(inputs, outputs if group.weight is None else None, mine, found.first == 0)

    def entries(self, groups: Mapping[Key, Group], data: Mapping[str, int]) -> dict[Key, Entry]:
        """The parts, complete, with what `data` says of each parameter under ``"reduce"``."""
        for key, part in self.parts.items():
            for side in part.rows:
                if (weight := groups[key].weight) is not None:  # the bias has the same outputs
                    its = self.parts[weight]
                    part.tensors[f"{side}.outputs"] = its.tensors[f"{next(iter(its.rows))}.outputs"]
                if not self._expands:
                    # inputs that were averaged over positions are divided by the number of data, those included that
                    # never reached the layer
                    part.rows[side] = data[groups[key].names[0]]
            for tensor in part.tensors.values():
                mirrored(tensor)
        return self.parts

    def _zeros(self, group: Group, side: str, one_hot: bool) -> dict[str, Tensor]:
        groups, left, right = group.shape
        a, g = (right, left) if side == "right" else (left, right)
        dense = [not one_hot and self._rule.factor(a, group.names), self._rule.factor(g, group.names)]
        shapes = [(groups, size, size) if d else (groups, size) for d, size in zip(dense, (a, g), strict=True)]
        if group.weight is not None:  # the outputs of a bias that always enters with its weight are the weight's
            shapes[1] = (0, 0)
        names = (f"{side}.inputs", f"{side}.outputs")
        return {name: self._spill.zeros(shape, self._dtype) for name, shape in zip(names, shapes, strict=True)}

    def _expand(self, inputs: Tensor, outputs: Tensor | None, uses: list[Rows], first: bool) -> int:
        """Add rows one by one; returns their number, if they are the ``first`` ones of their inputs."""
        if outputs is not None:
            for g in (g for rows in uses for g in rows.outputs):
                add_moment(outputs, g.to(self._dtype))
        return sum(self._add_inputs(inputs, rows) for rows in uses) if first else 0

    def _add_inputs(self, moment: Tensor, rows: Rows) -> int:
        windows = rows.use.inputs
        if rows.role == "bias":
            moment += rows.count
        elif isinstance(windows, Windows) and moment.ndim == 3 and windows.correlates:
            moment += windows.moment(self._dtype, rows.role == "joint")
        elif isinstance(a := rows.inputs, OneHot):
            ids = a.ids.flatten()
            moment += torch.bincount(ids[ids >= 0], minlength=a.width).to(self._dtype)
        else:
            add_moment(moment, a.to(self._dtype))
        positions = rows.positions
        return int(positions.sum()) if isinstance(positions, Tensor) else rows.count

    def _reduce(self, inputs: Tensor, outputs: Tensor | None, uses: list[Rows], first: bool) -> int:
        """Rows of a datum are added over its uses before they are squared; inputs are averaged, and not counted."""
        if first:
            positions = sum(rows.positions for rows in uses)
            positions = positions.clamp(min=1).view(-1, 1, 1) if isinstance(positions, Tensor) else max(positions, 1)
            total = torch.stack([_sum(rows.inputs, self._dtype) for rows in uses]).sum(0)
            add_moment(inputs, (total / positions).unsqueeze(1))
        if outputs is not None:
            for column in zip(*(rows.outputs for rows in uses if rows.outputs), strict=True):
                add_moment(outputs, torch.stack([g.to(self._dtype).sum(1) for g in column]).sum(0).unsqueeze(1))
        return 0


class WholeGradients:
    """Blocks Σ G Gᵀ of whole gradients, or their diagonals if not ``dense``; identities for ``"forward-only"``."""

    def __init__(self, options: Options, dense: bool, dtype: torch.dtype, spill: Spill) -> None:
        self._identity, self._rule, self._dense = options.fisher_type == "forward-only", options.rule, dense
        self._dtype, self._spill = dtype, spill
        self.parts: dict[Key, Entry] = {}  # what was added so far

    def add(self, group: Group, gradients: Sequence[Tensor]) -> None:
        """Add gradients ``[data, size]`` of some backward passes."""
        if not (gradients or self._identity or self._spill.device.type == "meta"):
            return
        if group.key not in self.parts:
            size = len(group.places)
            dense = not self._identity and self._dense and self._rule.block(size, group.names)
            shape = (size, size) if dense else (size,)
            block, kind = self._spill.zeros(shape, self._dtype), "identity" if self._identity else "block"
            self.parts[group.key] = Entry(kind, {"block": block.fill_(1) if self._identity else block})
        block = self.parts[group.key].tensors["block"]
        for rows in (g.to(self._dtype) for g in gradients):
            if block.ndim == 2:
                block.addmm_(rows.T, rows)
            else:
                block += rows.square().sum(0)


def _sum(rows: Tensor | OneHot, dtype: torch.dtype) -> Tensor:
    """Sum over positions, ``[data, groups, c]``."""
    if not isinstance(rows, OneHot):
        return rows.to(dtype).sum(1)
    total = torch.zeros(rows.ids.shape[0], rows.width + 1, dtype=dtype, device=rows.ids.device)
    ids = rows.places.flatten(1)
    total.scatter_add_(1, ids, torch.ones_like(ids, dtype=dtype))
    return total[:, None, :-1]
