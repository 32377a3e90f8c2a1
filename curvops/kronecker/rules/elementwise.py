"""Parameters that enter entry by entry: scales, shifts, tables and tokens, broadcast over the rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from curvops.kronecker.operations import EXPANDS, named
from curvops.kronecker.taps import Rule, Taps


def _arithmetic(kind: str, first: Callable[..., Tensor], second: Callable[..., Tensor]) -> Rule:
    """The rule of an operation on two terms, from the gradients ``(input, other, g)`` in each."""

    def run(taps: Taps, func: Any, input: Any, other: Any, **options: Any) -> Tensor:
        out: Tensor = func(input, other, **options)
        for term, slope in ((input, first), (other, second)):
            if term in taps.lookups:
                taps.lookups.add(out, term, plain=bool(options))
            elif options:  # a factor, or a rounding
                taps.unknown(term)
            else:
                _spread(taps, out, term, partial(slope, input, other), kind)
        return out

    return run


def where(taps: Taps, func: Any, first: Any, second: Any, third: Any) -> Tensor:
    out: Tensor = func(first, second, third)
    # the function takes the condition first, the method second
    condition, chosen = (first, second) if func is torch.where else (second, first)
    _spread(taps, out, chosen, lambda g: g * condition, "where")
    _spread(taps, out, third, lambda g: g * ~condition, "where")
    return out


def expand(taps: Taps, func: Any, input: Tensor, *args: Any, **options: Any) -> Tensor:
    out: Tensor = func(input, *args, **options)
    if input in taps.lookups:
        taps.lookups.add(out, input)
    else:
        _spread(taps, out, input, lambda g: g, "expand")
    return out


def prelu(taps: Taps, func: Any, input: Tensor, weight: Tensor) -> Tensor:
    out: Tensor = func(input, weight)
    if weight.numel() > 1:  # one for each channel
        with taps:
            weight = weight.view(-1, *(1,) * (input.ndim - 2))
    _spread(taps, out, weight, lambda g: g * input.clamp(max=0), "prelu")
    return out


def _spread(taps: Taps, out: Tensor, vector: Any, slope: Callable[[Tensor], Tensor], kind: str) -> None:
    """Record a parameter that is broadcast to the output; ``slope`` is its gradient before it is summed.

    The axes along which it is broadcast are the rows.
    """
    if taps.view(vector) is None:
        return
    shape = (1,) * (out.ndim - vector.ndim) + tuple(vector.shape)
    own = [k for k, size in enumerate(shape) if size > 1]
    rest = [k for k in range(out.ndim) if k not in own]
    if out.is_complex() or not rest or any(out.shape[k] != shape[k] for k in own):
        taps.unknown(vector)
        return
    lead = torch.Size(out.shape[k] for k in rest)
    size = vector.numel()
    taps.vector(out, vector, lambda g: slope(g).permute(rest + own).reshape(*lead, size), lead, kind)


ARITHMETIC = {
    "add add_ __add__ __radd__ __iadd__": _arithmetic("add", lambda a, b, g: g, lambda a, b, g: g),
    "sub sub_ __sub__ __isub__": _arithmetic("sub", lambda a, b, g: g, lambda a, b, g: -g),
    "mul __mul__ __rmul__": _arithmetic("mul", lambda a, b, g: g * b, lambda a, b, g: g * a),
    "div true_divide __truediv__": _arithmetic("div", lambda a, b, g: g / b, lambda a, b, g: -g * a / b.square()),
}
RULES: dict[Any, Rule] = {
    **{function: rule for names, rule in ARITHMETIC.items() for function in named(names)},
    **dict.fromkeys(named("where"), where),
    **dict.fromkeys(EXPANDS | {Tensor.repeat}, expand),
    **dict.fromkeys({F.prelu} | named("prelu"), prelu),
}
