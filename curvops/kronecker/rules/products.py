"""Products of a parameter with data: matmul, einsum and their kin, each as a linear map of rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from string import ascii_lowercase, ascii_uppercase
from typing import Any

import torch
from torch import Tensor

from curvops.kronecker.operations import named
from curvops.kronecker.taps import Rule, Taps
from curvops.kronecker.uses import one_group


def einsum(taps: Taps, func: Any, equation: Any, *operands: Any) -> Tensor:
    out: Tensor = func(equation, *operands)
    tensors = list(operands[0]) if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else list(operands)
    labels = _labels(equation, tensors) if isinstance(equation, str) else None
    if labels is None:
        taps.unknown(*[t for t in tensors if isinstance(t, Tensor)])
    else:
        _contract(taps, out, labels[:-1], tensors, labels[-1], "einsum")
    return out


def matmul(taps: Taps, func: Any, input: Tensor, other: Tensor) -> Tensor:
    out: Tensor = func(input, other)
    pair, labels = [input, other], []
    order = max(out.ndim - (input.ndim > 1) - (other.ndim > 1), 0)
    for k, (operand, own) in enumerate(((input, "MK"[-min(input.ndim, 2) :]), (other, "KN"[: min(other.ndim, 2)]))):
        batch = ascii_lowercase[:order][max(order - operand.ndim + 2, 0) :]
        lone = [axis for axis, c in enumerate(batch) if operand.shape[axis] < out.shape[ascii_lowercase.index(c)]]
        for axis in reversed(lone):  # broadcast over the other operand
            with taps:
                pair[k] = pair[k].squeeze(axis)
        labels.append("".join(c for axis, c in enumerate(batch) if axis not in lone) + own)
    ends = ("M" if input.ndim > 1 else "") + ("N" if other.ndim > 1 else "")
    _contract(taps, out, labels, pair, ascii_lowercase[:order] + ends, "matmul")
    return out


def sum_with_product(
    taps: Taps, func: Any, input: Tensor, one: Tensor, other: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    if one.ndim == other.ndim == 2 and input.ndim == 1 and taps.view(one) is None and beta == alpha == 1:
        out: Tensor = func(input, one, other)
        taps.linear(out, other, input, lambda: one_group(one), one_group, "left", "addmm")
        return out
    with taps:
        product = one @ other
        product = product if alpha == 1 else product * alpha
        return product + (input if beta == 1 else input * beta)


def _contract(
    taps: Taps, out: Tensor, labels: Sequence[str], operands: Sequence[Tensor], result: str, kind: str
) -> None:
    """Record Σ over labels of a product, in which one operand is a parameter.

    Its labels that the result and the other operands share number the groups, those that it shares with the other
    operands alone are inputs, with the result alone outputs; the result's other labels are rows.
    """
    places = [k for k, t in enumerate(operands) if taps.view(t) is not None]
    sizes: dict[str, int] = {}
    clash = any(
        sizes.setdefault(c, size) != size
        for several, t in zip(labels, operands, strict=True)
        for c, size in zip(several, t.shape, strict=True)
    )
    repeated = any(len(set(several)) < len(several) for several in labels)
    if len(places) != 1 or clash or repeated or out.is_complex():
        taps.unknown(*operands)
        return
    own, weight = labels[places[0]], operands[places[0]]
    others = [k for k in range(len(operands)) if k != places[0]]
    seen = "".join(labels[k] for k in others)
    groups = "".join(c for c in own if c in seen and c in result)
    inputs = "".join(c for c in own if c in seen and c not in result)
    outputs = "".join(c for c in own if c not in seen and c in result)
    rows = "".join(c for c in result if c not in own)
    if len(groups + inputs + outputs) < len(own):  # an axis that is summed on its own
        taps.unknown(*operands)
        return
    shape = tuple(sizes[c] for c in rows)
    counts = [torch.Size(sizes[c] for c in part).numel() for part in (groups, inputs, outputs)]
    side = "left" if own == groups + inputs + outputs else "right"
    if own not in (groups + inputs + outputs, groups + outputs + inputs):
        with taps:
            weight = weight.permute([own.index(c) for c in groups + outputs + inputs])
            weight = weight.reshape(counts[0], counts[2], counts[1])
    equation = f"{','.join(labels[k] for k in others)}->{rows}{groups}{inputs}"
    factors = [operands[k] for k in others]
    order = [result.index(c) for c in rows + groups + outputs]

    def arranged() -> Tensor:
        return torch.einsum(equation, *factors).reshape(*shape, counts[0], counts[1])

    taps.linear(
        out, weight, None, arranged, lambda g: g.permute(order).reshape(*shape, counts[0], counts[2]), side, kind
    )


def _labels(equation: str, operands: Sequence[Tensor]) -> list[str] | None:
    """One string of labels for each operand and the result, dots and the result written out."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    parts = left.split(",")
    if len(parts) != len(operands):
        return None
    spare = "".join(c for c in ascii_uppercase + ascii_lowercase if c not in equation)
    hidden = [t.ndim - len(part) + 3 if "..." in part else 0 for part, t in zip(parts, operands, strict=True)]
    dots = spare[: max(hidden)]
    parts = [part.replace("...", dots[len(dots) - n :]) for part, n in zip(parts, hidden, strict=True)]
    if not arrow:
        right = "..." + "".join(sorted(c for c, n in Counter(left).items() if n == 1 and c.isalpha()))
    return [*parts, right.replace("...", dots)]


RULES: dict[Any, Rule] = {
    torch.einsum: einsum,
    **dict.fromkeys(named("matmul __matmul__ mm bmm mv"), matmul),
    **dict.fromkeys(named("addmm baddbmm addmv"), sum_with_product),
}
