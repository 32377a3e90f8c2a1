"""Certificates of a forward pass: which rows are whose, and which parameters their uses explain."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from curvops.kronecker.tape import TOGETHER, Layout, Tape, views
from curvops.kronecker.uses import LinearUse, OneHot, Use, VectorUse, View
from curvops.products.account import tolerance

PROJECTIONS = 8  # random numbers that stand for a row when its scale is looked at
FEW = 2**15  # entries of rows that are looked at as they are


def certify(tape: Tape, scale: Tensor, spread: Tensor, names: Sequence[str]) -> dict[str, str]:
    """Find the layouts of a tape's rows, and which parameters are explained by their uses.

    Each datum's cotangent is scaled by a number of its own. A row that belongs to one datum comes back
    scaled by that number; and a parameter is explained if its gradient is the sum over its uses' rows.
    ``spread`` is the ``scale`` of each datum in the shape of the output. The tape's layouts are set; the parameters
    that are not explained are returned, and why. It holds for this pass alone unless the tape is ``tested``.
    """
    cotangent, every = tape.random_cotangent(), range(len(tape.uses))
    directions: dict[tuple[int, torch.dtype], Tensor] = {}
    plain: list[Tensor | None] = []
    if tape.size > 1:
        slopes = tape.gradients(cotangent, every)[0]
        plain = [_projected(use, g, directions) for use, g in zip(tape.uses, slopes, strict=True)]
        del slopes
    # an output may be as wide as a vocabulary: one cotangent at a time is held
    scaled, totals = tape.gradients(cotangent.mul_(spread), every, names)
    failed: dict[str, str] = {}
    parts: dict[str, list[tuple[Use, View, Tensor]]] = {}
    for k, (use, g) in enumerate(zip(tape.uses, scaled, strict=True)):
        if plain:
            tape.layouts[k] = _layout(plain[k], _projected(use, g, directions), scale, tape.precision)
            tape.tested = tape.tested and ((before := plain[k]) is None or bool(before.any()))
        for view in views(use):
            if tape.layouts[k] is None:
                failed[view.name] = f"the rows of {use.kind} do not belong to one datum each"
            if g is not None:
                parts.setdefault(view.name, []).append((use, view, g))
    allowed = max(tolerance(dtype) for dtype in {tape.precision, *(g.dtype for g in scaled if g is not None)})
    norms: dict[str, Tensor] = {}
    reached = tape.reached()
    for k, name in enumerate(names):
        total, totals[k] = totals[k], None
        if name in tape.taps.unknowns and total is not None:
            failed[name] = f"it enters {tape.taps.unknowns[name]}"
        elif name not in failed:
            norms[name] = _norms(_over_uses(tape.params[name], parts.get(name, ())), total)
    for name, pair in zip(norms, torch.stack([*norms.values()]).tolist() if norms else (), strict=True):
        tape.tested = tape.tested and (pair[1] > 0 or name not in reached)
        if not _small(pair, allowed):
            failed[name] = "its gradient is not the sum over the operations that were seen"
    return failed


def candidates(lead: Sequence[int], size: int) -> list[Layout]:
    """Layouts that rows with these axes may have, the most usual first."""
    if size == 1:
        return [TOGETHER]
    exact = [Layout(k) for k, length in enumerate(lead) if length == size]
    longer = [k for k, length in enumerate(lead) if length > size and length % size == 0]
    return exact + [Layout(k, order) for order in ("major", "minor") for k in longer]


def _layout(before: Tensor | None, after: Tensor | None, scale: Tensor, precision: torch.dtype) -> Layout | None:
    """The layout in which projected rows come back scaled by their datum's number."""
    if before is None or after is None:
        return Layout(0)
    for layout in candidates(before.shape[:-1], len(scale)):
        a, b = (layout.arrange(t, 1, len(scale)) for t in (before, after))
        pair = _norms(b, a * scale.to(a).view(-1, 1, 1)).tolist()
        if _small(pair, max(tolerance(a.dtype), tolerance(precision))):
            return layout
    return None


def _projected(use: Use, g: Tensor | None, directions: dict[tuple[int, torch.dtype], Tensor]) -> Tensor | None:
    """Random projections ``[*rows, PROJECTIONS]`` of a use's output rows, or these: enough to see that they are scaled."""
    if g is None:
        return None
    rows = use.outputs(g).flatten(-2) if isinstance(use, LinearUse) else use.rows(g)
    if rows.numel() <= FEW:
        return rows.detach().clone()  # the cotangent itself may be among them, and is scaled in place
    size, dtype = rows.shape[-1], torch.promote_types(rows.dtype, torch.float32)
    if (size, dtype) not in directions:
        made = torch.randn(size, PROJECTIONS, generator=torch.Generator().manual_seed(0))
        directions[size, dtype] = made.to(rows.device, dtype)
    return (rows.detach().to(dtype) @ directions[size, dtype]).to(rows.dtype)


def _norms(found: Tensor, expected: Tensor | None) -> Tensor:
    """Norms of a difference, and of what was expected."""
    expected = torch.zeros_like(found) if expected is None else expected.detach().reshape(found.shape)
    return torch.stack([torch.linalg.vector_norm(t) for t in (found - expected, expected)])


def _small(norms: Sequence[float], allowed: float) -> bool:
    difference, norm = norms
    return difference <= allowed * (norm if norm > 0 else 1.0)


def _over_uses(param: Tensor, parts: Sequence[tuple[Use, View, Tensor]]) -> Tensor:
    """A parameter's gradient as the sum over its uses, flat."""
    dtype = torch.promote_types(param.dtype, torch.float32)
    plain = [_summed(use, view, g).to(dtype).flatten() for use, view, g in parts if view.index is None]
    found = sum(plain[1:], plain[0]) if plain else torch.zeros(param.numel(), dtype=dtype, device=param.device)
    for use, view, g in parts:
        if view.index is not None:
            found = found.index_add(0, view.index.flatten(), _summed(use, view, g).to(dtype).flatten())
    return found


def _summed(use: Use, view: View, g: Tensor) -> Tensor:
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
    left, right = (out, a) if use.input_side == "right" else (a, out)
    return left.permute(1, 2, 0) @ right.movedim(0, 1)
