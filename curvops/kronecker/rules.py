"""One rule for each operation that takes parameters: which rows it makes of its inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from curvops.kronecker.uses import Windows, channels_last, patches
from curvops.substitutions import batch_norm as batch_norm_without_statistics

if TYPE_CHECKING:
    from curvops.kronecker.taps import Taps

Rule = Callable[..., Any]
RULES: dict[Any, Rule] = {}


def rule(*functions: Any) -> Callable[[Rule], Rule]:
    """Register a rule ``(taps, func, *args, **kwargs) -> output`` for some operations."""

    def register(function: Rule) -> Rule:
        RULES.update({f: function for f in functions if f is not None})
        return function

    return register


def _rows(x: Tensor) -> Tensor:
    """``[*rows, c]`` to ``[*rows, 1, c]``: one group."""
    return x.unsqueeze(-2)


@rule(F.linear)
def linear(taps: Taps, func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if weight.ndim == 1:
        with taps:
            return input @ weight if bias is None else input @ weight + bias
    out: Tensor = func(input, weight, bias)
    taps.linear(out, weight, bias, lambda: _rows(input), _rows, "right", "linear")
    return out


@rule(F.conv1d, F.conv2d, F.conv3d)
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
    steps, spread = _tuple(stride, order), _tuple(dilation, order)
    pads = _padding(padding, kernel, spread)
    taps.linear(
        out,
        weight,
        bias,
        Windows(input, kernel, steps, pads, spread, groups),
        lambda g: channels_last(g, groups),
        "right",
        f"conv{order}d",
    )
    return out


@rule(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
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
    pads = tuple((p, p) for p in _tuple(padding, order))
    crop = tuple(input.shape[2:])

    def outputs(g: Tensor) -> Tensor:
        # the adjoint convolution's windows, one for each input position
        windows = patches(g, kernel, steps, pads, spread, groups)
        grid = [
            (g.shape[2 + k] + 2 * pads[k][0] - spread[k] * (kernel[k] - 1) - 1) // steps[k] + 1 for k in range(order)
        ]
        if tuple(grid) != crop:
            windows = windows.unflatten(1, grid)
            for axis, size in enumerate(crop):
                windows = windows.narrow(1 + axis, 0, size)
            windows = windows.flatten(1, order)
        return windows

    taps.linear(out, weight, None, lambda: channels_last(input, groups), outputs, "left", f"conv_transpose{order}d")
    taps.bias(out, bias, channels_last, f"conv_transpose{order}d")
    return out


@rule(torch.embedding)
def embedding(
    taps: Taps, func: Any, weight: Tensor, input: Tensor, padding_idx: int = -1, *rest: Any, **options: Any
) -> Tensor:
    out: Tensor = func(weight, input, padding_idx, *rest, **options)
    # rows of the padding index get no gradient
    ids = input if padding_idx < 0 else input.masked_fill(input == padding_idx, -1)
    view = taps.view(weight)
    if view is not None and out.requires_grad:
        taps.lookups.start(out, view, ids, weight.shape[0])
    return out


@rule(torch.bilinear, F.bilinear)
def bilinear(
    taps: Taps, func: Any, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    out: Tensor = func(input1, input2, weight, bias)

    def inputs() -> Tensor:
        return _rows((input1.unsqueeze(-1) * input2.unsqueeze(-2)).flatten(-2))

    taps.linear(out, weight, bias, inputs, _rows, "right", "bilinear")
    return out


@rule(F.layer_norm, torch.layer_norm)
def layer_norm(
    taps: Taps,
    func: Any,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    normal = func(input, normalized_shape, None, None, *args, **kwargs)
    return _affine(taps, normal, weight, bias, normal.ndim - len(normalized_shape), "layer_norm")


@rule(F.rms_norm, torch.rms_norm)
def rms_norm(
    taps: Taps, func: Any, input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    normal = func(input, normalized_shape, None, eps)
    return _affine(taps, normal, weight, None, normal.ndim - len(normalized_shape), "rms_norm")


@rule(F.group_norm, torch.group_norm)
def group_norm(
    taps: Taps,
    func: Any,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    normal = func(input, num_groups, None, None, *args, **kwargs)
    return _affine_of_channels(taps, normal, weight, bias, "group_norm")


@rule(F.batch_norm)
def batch_norm(
    taps: Taps,
    func: Any,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    normal = batch_norm_without_statistics(input, running_mean, running_var, None, None, *args, **kwargs)
    return _affine_of_channels(taps, normal, weight, bias, "batch_norm")


@rule(F.instance_norm)
def instance_norm(
    taps: Taps,
    func: Any,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    normal = func(input, running_mean, running_var, None, None, *args, **kwargs)
    return _affine_of_channels(taps, normal, weight, bias, "instance_norm")


def _affine_of_channels(taps: Taps, normal: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str) -> Tensor:
    last = normal.movedim(1, -1)
    return _affine(taps, last, weight, bias, last.ndim - 1, kind).movedim(-1, 1)


def _affine(taps: Taps, normal: Tensor, weight: Tensor | None, bias: Tensor | None, rows: int, kind: str) -> Tensor:
    """``normal * weight + bias`` over the trailing axes, tapped entry by entry."""
    out = normal
    if weight is not None:
        out = out * weight
    if bias is not None:
        out = out + bias
    out = out.to(normal.dtype)
    taps.vector(out, weight, lambda g: (g * normal).flatten(rows), out.shape[:rows], kind)
    taps.vector(out, bias, lambda g: g.flatten(rows), out.shape[:rows], kind)
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
