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
        # copied, as the cotangent itself may be among them, and is scaled in place
        plain = [
            g if g is None else _projected(use, g, directions).clone() for use, g in zip(tape.uses, slopes, strict=True)
        ]
        del slopes
    # an output may be as wide as a vocabulary: one cotangent at a time is held
    scaled, totals = tape.gradients(cotangent.mul_(spread), every, names)
    weights = scale.to(torch.promote_types(tape.z.dtype, torch.float32)).view(-1, 1, 1, 1)
    failed: dict[str, str] = {}
    parts: dict[str, list[tuple[Use, View, Tensor]]] = {}
    for k, (use, g) in enumerate(zip(tape.uses, scaled, strict=True)):
        if plain:
            # what no gradient reaches, or no row does, may be arranged in any way that there is
            before, tape.layouts[k] = plain[k], next(iter(candidates(use.lead, tape.size)), None)
            if before is not None and g is not None:
                after = _projected(use, g, directions)
                tape.layouts[k], size = _layout(before, after, weights, tape.precision)
                tape.tested = tape.tested and size > 0
        for view in views(use):
            if tape.layouts[k] is None:
                failed[view.name] = f"the rows of {use.kind} do not belong to one datum each"
            if g is not None:
                parts.setdefault(view.name, []).append((use, view, g))
    allowed = max(tolerance(dtype) for dtype in {tape.precision, *(g.dtype for g in scaled if g is not None)})
    norms: list[Tensor] = []
    seen: list[str] = []
    for k, name in enumerate(names):
        total, totals[k] = totals[k], None
        if name in tape.taps.unknowns and total is not None:
            failed[name] = f"it enters {tape.taps.unknowns[name]}"
        elif name not in failed:
            norms += _norms(_over_uses(tape.params[name], parts.get(name, ())), total)
            seen.append(name)
    numbers, reached = torch.stack(norms).tolist() if norms else [], tape.reached()
    for name, *pair in zip(seen, numbers[::2], numbers[1::2], strict=True):
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


def _layout(before: Tensor, after: Tensor, weights: Tensor, precision: torch.dtype) -> tuple[Layout | None, float]:
    """The layout in which projected rows come back scaled by their datum's weight, and their size."""
    for layout in candidates(before.shape[:-2], len(weights)):
        a, b = (layout.arrange(t, 2, len(weights)) for t in (before, after))
        pair = torch.stack(_norms(b, a * weights)).tolist()
        if _small(pair, max(tolerance(a.dtype), tolerance(precision))):
            return layout, pair[1]
    return None, float(torch.linalg.vector_norm(before))


def rows_of(use: Use, g: Tensor) -> Tensor:
    """A use's output rows ``[*rows, groups, out]``, a vector's gradients ``[*rows, 1, size]``."""
    return use.outputs(g) if isinstance(use, LinearUse) else use.rows(g).unsqueeze(-2)


def _projected(use: Use, g: Tensor, directions: dict[tuple[int, torch.dtype], Tensor]) -> Tensor:
    """Random projections ``[*rows, 1, PROJECTIONS]`` of output rows, or these: enough to see that they are scaled."""
    rows = rows_of(use, g)
    if rows.numel() <= FEW:
        return rows
    rows = rows.flatten(-2)
    size, dtype = rows.shape[-1], torch.promote_types(rows.dtype, torch.float32)
    if (size, dtype) not in directions:
        made = torch.randn(size, PROJECTIONS, generator=torch.Generator().manual_seed(0), device="cpu")
        directions[size, dtype] = made.to(rows.device, dtype)
    return (rows.to(dtype) @ directions[size, dtype]).to(rows.dtype).unsqueeze(-2)


def _norms(found: Tensor, expected: Tensor | None) -> list[Tensor]:
    """Norms of a difference, and of what was expected."""
    expected = torch.zeros_like(found) if expected is None else expected.reshape(found.shape)
    return [torch.linalg.vector_norm(t) for t in (found - expected, expected)]


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
    rows = rows_of(use, g)
    out = rows.reshape(-1, *rows.shape[-2:])  # there may be no axis of rows
    if isinstance(use, VectorUse) or view is use.bias:
        return out.sum(0)
    a = use.inputs()
    if isinstance(a, OneHot):
        total = torch.zeros(a.width + 1, out.shape[-1], dtype=out.dtype, device=out.device)
        return total.index_add_(0, a.places.flatten(), out.flatten(0, 1))[:-1]
    a = a.reshape(-1, *a.shape[-2:]).to(out.dtype)
    left, right = (out, a) if use.input_side == "right" else (a, out)
    return left.permute(1, 2, 0) @ right.movedim(0, 1)
