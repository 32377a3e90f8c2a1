"""A forward pass on tape: the uses of the parameters, and certificates of what is known about their rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import grad

from curvops.kronecker.layout import ONE_UNIT, Layout, candidates
from curvops.kronecker.taps import Taps
from curvops.kronecker.uses import LinearUse, OneHot, Use, VectorUse, View
from curvops.products.account import relative_difference, tolerance
from curvops.risk.empirical_risk import EmpiricalRisk

Part = tuple[Use, View, Tensor]  # a use of a parameter, which part it uses, and the gradient at its output

PROJECTIONS = 8  # random numbers that stand for a row when its scale is looked at


@dataclass
class Tape:
    """One forward pass.

    Attributes:
        z: The output, carrying the graph.
        leaves: The parameters that it was run with.
        uses: The applications of parameters that the taps know.
        unknowns: Parameters that also enter otherwise, and an operation where they do.
        data_dependent: Whether rows may be ordered by the data's values.
        units: Number of units (data, or one for the whole pass) that rows are attributed to.
        precision: The lowest that the model computes in.
        activations: Bytes of the operations' results, about what the graph holds.
        layouts: For each use the layout of its rows; ``None`` where they could not be attributed.
        inputs: Inputs already arranged, by use and role.
    """

    z: Tensor
    leaves: Mapping[str, Tensor]
    uses: Sequence[Use]
    unknowns: Mapping[str, str]
    data_dependent: bool
    units: int
    precision: torch.dtype
    activations: int
    layouts: list[Layout | None] = field(default_factory=list)
    inputs: dict[tuple[int, str], Any] = field(default_factory=dict)

    def gradients(
        self, cotangent: Tensor, uses: Sequence[int], leaves: Sequence[str] = (), last: bool = False
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Gradients at the outputs of some uses, and in some leaves, for one cotangent of the output.

        After the ``last`` one the graph's memory is free.
        """
        targets: Any = [self.uses[k].edge for k in uses] + [self.leaves[n] for n in leaves]
        if not targets or not self.z.requires_grad:
            return [None] * len(uses), [None] * len(leaves)
        found = grad(self.z, targets, cotangent.to(self.z.dtype), retain_graph=not last, allow_unused=True)
        return list(found[: len(uses)]), list(found[len(uses) :])

    def signature(self) -> tuple[object, ...]:
        """What must stay the same from batch to batch for certificates to hold."""
        return tuple((use.kind, *((view.name, *view.key) for view in views(use))) for use in self.uses)


def record(risk: EmpiricalRisk, X: Any, units: int) -> Tape:
    """Run the model under the taps."""
    leaves = risk.model.leaves()
    taps = Taps(leaves)
    z = risk.forward(leaves, X, taps)
    precision = taps.precision or z.dtype
    tape = Tape(z, leaves, taps.uses, taps.unknowns, taps.data_dependent, units, precision, taps.activations)
    tape.layouts = [ONE_UNIT if units == 1 else None] * len(taps.uses)
    return tape


def views(use: Use) -> list[View]:
    """The parameters of a use."""
    if isinstance(use, VectorUse):
        return [use.vector]
    return [view for view in (use.weight, use.bias) if view is not None]


def certify_twins(tape: Tape, unit_weights: Tensor, cotangent: Tensor, names: Sequence[str]) -> bool:
    """Find the layouts of the rows of data that come twice, in one backward pass.

    A row that belongs to one unit comes back scaled by that unit's weight, so that twins' rows differ by the ratio of
    their weights.

    Args:
        tape: The forward pass, whose second half of data equals the first; its layouts are set.
        unit_weights: One weight for each unit, all different.
        cotangent: Of the output's shape: the same for both halves, but for the weights.
        names: The parameters to look at.

    Returns:
        Whether all parameters are explained by their uses; if not, `certify` tells which are not, and why.
    """
    if tape.unknowns:
        return False
    found, totals = tape.gradients(cotangent, range(len(tape.uses)), names)
    for k, (use, slope) in enumerate(zip(tape.uses, found, strict=True)):
        tape.layouts[k] = _twins_layout(_projected(use, slope), unit_weights, tape.precision)
        if tape.layouts[k] is None:
            return False
    parts, allowed = _parts(tape, found), _allowed(tape, found)
    return all(
        _explained(tape.leaves[name], parts.get(name, ()), total, allowed)
        for name, total in zip(names, totals, strict=True)
    )


def _twins_layout(rows: Tensor | None, units: Tensor, precision: torch.dtype) -> Layout | None:
    """The layout in which projected rows of twins differ by the ratio of their weights; ``None`` if all are zero."""
    if rows is None:
        return None
    half = len(units) // 2
    ratios = (units[half:] / units[:half]).to(rows).view(-1, 1, 1)
    allowed = max(tolerance(rows.dtype), tolerance(precision))
    for layout in candidates(tuple(rows.shape[:-1]), len(units)):
        first, second = layout.arrange(rows, 1, len(units)).split(half)
        if relative_difference(second, first * ratios) <= allowed and rows.any():
            return layout
    return None


def certify(tape: Tape, unit_weights: Tensor, weights: Tensor, names: Sequence[str]) -> dict[str, str]:
    """Find the layouts of a tape's rows, and which parameters are explained by their uses.

    Each unit's cotangent is scaled by a weight of its own. A row that belongs to one unit comes back
    scaled by that unit's weight; and a parameter is explained if its gradient is the sum over its uses' rows.

    Args:
        tape: The forward pass; its layouts are set.
        unit_weights: One weight for each unit, all different.
        weights: The same, spread over the output: of its shape.
        names: The parameters to look at.

    Returns:
        The parameters that are not explained, and why.
    """
    generator = torch.Generator().manual_seed(0)
    dtype = torch.promote_types(tape.z.dtype, torch.float32)
    cotangent = torch.empty_like(tape.z, dtype=dtype, device="cpu").normal_(generator=generator).to(tape.z)
    every = range(len(tape.uses))
    plain: list[Tensor | None] = []
    if tape.units > 1:
        plain = [_projected(use, g) for use, g in zip(tape.uses, tape.gradients(cotangent, every)[0], strict=True)]
    # an output may be as wide as a vocabulary: one cotangent at a time is held
    scaled, totals = tape.gradients(cotangent.mul_(weights), every, names)
    failed: dict[str, str] = {}
    for k, (use, before) in enumerate(zip(tape.uses, plain, strict=False)):
        tape.layouts[k] = _layout(before, _projected(use, scaled[k]), unit_weights, tape.precision)
        if tape.layouts[k] is None:
            failed.update({view.name: f"the rows of {use.kind} do not belong to one datum each" for view in views(use)})
    parts, allowed = _parts(tape, scaled), _allowed(tape, scaled)
    for k, name in enumerate(names):
        total, totals[k] = totals[k], None
        if name in tape.unknowns and total is not None:
            failed[name] = f"it enters {tape.unknowns[name]}"
        elif name not in failed and not _explained(tape.leaves[name], parts.get(name, ()), total, allowed):
            failed[name] = "its gradient is not the sum over the operations that were seen"
    return failed


def _layout(before: Tensor | None, after: Tensor | None, units: Tensor, precision: torch.dtype) -> Layout | None:
    """The layout in which projected rows come back scaled by their unit's weight."""
    if before is None or after is None:
        return ONE_UNIT if len(units) == 1 else Layout(0)
    for layout in candidates(tuple(before.shape[:-1]), len(units)):
        a, b = (layout.arrange(t, 1, len(units)) for t in (before, after))
        if relative_difference(b, a * units.to(a).view(-1, 1, 1)) <= max(tolerance(a.dtype), tolerance(precision)):
            return layout
    return None


def _projected(use: Use, slope: Tensor | None) -> Tensor | None:
    """Random projections ``[*rows, PROJECTIONS]`` of a use's output rows: enough to see that they are scaled."""
    if slope is None:
        return None
    rows = use.outputs(slope).flatten(-2) if isinstance(use, LinearUse) else use.rows(slope)
    dtype = torch.promote_types(rows.dtype, torch.float32)
    return (rows.detach().to(dtype) @ _directions(rows.shape[-1]).to(rows.device, dtype)).to(rows.dtype)


@lru_cache(maxsize=64)
def _directions(size: int) -> Tensor:
    return torch.randn(size, PROJECTIONS, generator=torch.Generator().manual_seed(0))


def _parts(tape: Tape, slopes: Sequence[Tensor | None]) -> dict[str, list[Part]]:
    """What makes up the gradient of each parameter."""
    found: dict[str, list[Part]] = {}
    for use, g in zip(tape.uses, slopes, strict=True):
        if g is not None:
            for view in views(use):
                found.setdefault(view.name, []).append((use, view, g))
    return found


def _allowed(tape: Tape, slopes: Sequence[Tensor | None]) -> float:
    """The difference that rounding explains in the lowest precision of a pass."""
    return max(tolerance(dtype) for dtype in {tape.precision, *(g.dtype for g in slopes if g is not None)})


def _explained(leaf: Tensor, parts: Sequence[Part], total: Tensor | None, allowed: float) -> bool:
    """Whether a parameter's gradient is the sum over its uses."""
    found: Tensor | None = None
    dtype = torch.promote_types(leaf.dtype, torch.float32)
    for use, view, g in parts:
        part = _pooled(use, view, g).to(dtype).flatten()
        if view.index is None:
            found = part if found is None else found.add_(part)
        else:
            found = torch.zeros(leaf.numel(), dtype=dtype, device=leaf.device) if found is None else found
            found.index_add_(0, view.index.flatten(), part)
    if found is None:
        return total is None or not total.any()
    scale = 0.0 if total is None else float(torch.linalg.vector_norm(total.detach()))
    difference = float(torch.linalg.vector_norm(found if total is None else found.sub_(total.detach().flatten())))
    return difference <= allowed * scale if scale > 0 else difference <= allowed


def _pooled(use: Use, view: View, g: Tensor) -> Tensor:
    """The gradient of one view, summed over all rows."""
    if isinstance(use, VectorUse):
        rows = use.rows(g)
        return rows.reshape(-1, rows.shape[-1]).sum(0)
    out = use.outputs(g)
    out = out.reshape(-1, *out.shape[-2:])
    if view is use.bias:
        return out.sum(0)
    a = use.inputs()
    if isinstance(a, OneHot):
        total = torch.zeros(a.width + 1, out.shape[-1], dtype=out.dtype, device=out.device)
        return total.index_add_(0, a.ids.flatten() % (a.width + 1), out.flatten(0, 1))[:-1]
    a = a.reshape(-1, *a.shape[-2:]).to(out.dtype)
    pair = (out, a) if use.input_side == "right" else (a, out)
    return torch.einsum("mgl,mgr->glr", *pair)
