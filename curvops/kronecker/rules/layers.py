"""Linear layers, convolutions and embeddings: which rows they make of their inputs and outputs."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from curvops import substitutions
from curvops.kronecker.taps import Rule, Taps
from curvops.kronecker.uses import Windows, channels_last, one_group, patches


def linear(taps: Taps, func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if weight.ndim == 1:
        with taps:
            return input @ weight if bias is None else input @ weight + bias
    out: Tensor = func(input, weight, bias)
    taps.linear(out, weight, bias, lambda: one_group(input), one_group, "right", "linear")
    return out


def convolution(
    taps: Taps,
    func: Any,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    out: Tensor = func(input, weight, bias, stride, padding, dilation, groups)
    if input.ndim != weight.ndim:  # a map without an axis of data
        taps.unknown(weight, bias)
        return out
    kernel = tuple(weight.shape[2:])
    order = len(kernel)
    spread = _tuple(dilation, order)
    windows = Windows(input, kernel, _tuple(stride, order), _padding(padding, kernel, spread), spread, groups)
    taps.linear(out, weight, bias, windows, lambda g: channels_last(g, groups), "right", f"conv{order}d")
    return out


def transposed_convolution(
    taps: Taps,
    func: Any,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Tensor:
    out: Tensor = func(input, weight, bias, stride, padding, output_padding, groups, dilation)
    if input.ndim != weight.ndim:
        taps.unknown(weight, bias)
        return out
    kernel = tuple(weight.shape[2:])
    order = len(kernel)
    steps, spread = _tuple(stride, order), _tuple(dilation, order)
    # the windows of the adjoint convolution, one for each input position; none reaches what is padded to the output
    pads = tuple((p, p - q) for p, q in zip(_tuple(padding, order), _tuple(output_padding, order), strict=True))

    def outputs(g: Tensor) -> Tensor:
        return patches(g, kernel, steps, pads, spread, groups)

    kind = f"conv_transpose{order}d"
    taps.linear(out, weight, None, lambda: channels_last(input, groups), outputs, "left", kind)
    # it cannot join the weight
    taps.linear(out, None, bias, lambda: channels_last(input), channels_last, "right", kind)
    return out


def embedding(
    taps: Taps, func: Any, weight: Tensor, input: Tensor, padding_idx: int = -1, *rest: Any, **options: Any
) -> Tensor:
    out: Tensor = func(weight, input, padding_idx, *rest, **options)
    # rows of the padding index get no gradient
    ids = input if padding_idx < 0 else input.masked_fill(input == padding_idx, -1)
    taps.lookup(out, weight, ids)
    return out


def embedding_bag(taps: Taps, func: Any, *args: Any, **options: Any) -> Tensor:
    with taps:
        return partial(substitutions.embedding_bag, noted=taps.lookups.leave_out)(*args, **options)


def bilinear(
    taps: Taps, func: Any, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    out: Tensor = func(input1, input2, weight, bias)

    def inputs() -> Tensor:
        return one_group((input1.unsqueeze(-1) * input2.unsqueeze(-2)).flatten(-2))

    taps.linear(out, weight, bias, inputs, one_group, "right", "bilinear")
    return out


def _tuple(value: Any, order: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * order if len(values) == 1 else values


def _padding(padding: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    amounts = (0,) * len(kernel) if padding == "valid" else _tuple(padding, len(kernel))
    return tuple((p, p) for p in amounts)


RULES: dict[Any, Rule] = {
    F.linear: linear,
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), convolution),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), transposed_convolution),
    torch.embedding: embedding,
    F.embedding_bag: embedding_bag,
    **dict.fromkeys((torch.bilinear, F.bilinear), bilinear),
}
