"""What a tap keeps of one application of a parameter: the two sides of its gradient, row by row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from curvops.kronecker.autocorrelation import window_moment, window_sum, worthwhile


@dataclass(frozen=True)
class View:
    """A parameter, or a part or rearrangement of it, as an operation saw it."""

    name: str
    key: tuple[object, ...]  # tells views of one parameter apart
    index: Tensor | None  # place of each entry in the flattened parameter; `None` for the parameter as it is
    shape: torch.Size
    repeats: bool = False  # whether it holds an entry several times


ABSENT = -2  # in the place of a row that is not there, as those that fill up shorter bags


@dataclass(frozen=True)
class OneHot:
    """Rows that are unit vectors: ``ids`` of any shape, each the place of the one; −1 for a zero row, or `ABSENT`."""

    ids: Tensor
    width: int

    @property
    def places(self) -> Tensor:
        """The place of the one, or one behind the last for a row without."""
        return torch.where(self.ids < 0, self.width, self.ids)

    @property
    def there(self) -> Tensor:
        """Which rows are there."""
        return self.ids != ABSENT

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The rows as a tensor ``[*ids.shape, width]``."""
        rows = torch.zeros(*self.ids.shape, self.width + 1, dtype=dtype, device=self.ids.device)
        rows.scatter_(-1, self.places.unsqueeze(-1), 1.0)
        return rows[..., :-1]


Rows = Tensor | OneHot


@dataclass(frozen=True)
class LinearUse:
    """One application of a weight as a linear map of rows, ``g = W a`` up to the order of the axes.

    The gradient in the weight, arranged as ``[groups, left, right]``, is Σ_rows left ⊗ right, where one side
    holds the inputs a and the other the gradients g at the outputs.
    """

    weight: View | None
    bias: View | None  # added to the same rows
    edge: GradientEdge  # where the gradient at the output is read
    inputs: Callable[[], Rows]  # gives a, [*rows, groups, in]
    outputs: Callable[[Tensor], Tensor]  # gives g from the gradient at the output, [*rows, groups, out]
    input_side: str  # "right" for a weight stored as out × in, "left" for in × out
    joint: bool  # whether the bias can join the weight by a one that is appended to a
    kind: str  # the operation's name
    shape: torch.Size  # of the output
    one_hot: bool = False  # whether the inputs are unit vectors

    @cached_property
    def _output_shape(self) -> torch.Size:
        shape = self.shape
        if self.outputs is one_group:
            return torch.Size((*shape[:-1], 1, shape[-1]))
        if isinstance(self.inputs, Windows):  # the outputs are maps
            return torch.Size((shape[0], shape[2:].numel(), self.inputs.groups, shape[1] // self.inputs.groups))
        return self.outputs(torch.empty(self.shape, device="meta")).shape

    @property
    def lead(self) -> torch.Size:
        """The axes of the rows."""
        return self._output_shape[:-2]

    @property
    def input_shape(self) -> tuple[int, int]:
        """Groups, and entries of a row of inputs in one; no inputs are formed to know it."""
        groups, outputs = self._output_shape[-2:]
        return groups, 1 if self.weight is None else self.weight.shape.numel() // (groups * outputs)


@dataclass(frozen=True)
class VectorUse:
    """One application of a vector entry by entry, such as a norm's scale."""

    vector: View
    edge: GradientEdge
    rows: Callable[[Tensor], Tensor]  # gives the vector's gradient from that at the output, [*rows, size]
    kind: str
    lead: torch.Size  # the axes of the rows


Use = LinearUse | VectorUse


def patches(
    x: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    """Windows of a map: ``[N, C, *space]`` to ``[N, windows, groups, C/groups · kernel]``.

    In memory the places of a window come before the windows, as they are copied in long runs.
    """
    amounts = [amount for pair in reversed(padding) for amount in pair]
    if any(amounts):
        x = torch.nn.functional.pad(x, amounts)
    for axis, (size, step, spread) in enumerate(zip(kernel, stride, dilation, strict=True)):
        x = x.unfold(2 + axis, (size - 1) * spread + 1, step)
        x = x if spread == 1 else x[..., ::spread]
    n, channels = x.shape[:2]
    order = len(kernel)
    x = x.permute(0, 1, *range(2 + order, 2 + 2 * order), *range(2, 2 + order))
    size = channels // groups * torch.Size(kernel).numel()
    return x.reshape(n, groups, size, -1).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Windows:
    """The inputs of a convolution: called, its windows as rows; or their second moment without forming them."""

    input: Tensor  # the map, [N, C, *space]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int

    def __call__(self) -> Tensor:
        return patches(self.input.detach(), self.kernel, self.stride, self.padding, self.dilation, self.groups)

    @property
    def correlates(self) -> bool:
        """Whether the map's autocorrelation gives the second moment with less work."""
        plain = set(self.stride) == set(self.dilation) == {self.groups} == {1} and len(self.kernel) == 2
        return plain and worthwhile(self.input, self.kernel)

    def moment(self, dtype: torch.dtype, joint: bool) -> Tensor:
        """Σ a aᵀ ``[in, in]`` over all windows, with a one appended to a if ``joint``; only where it `correlates`."""
        x = self.input.detach().to(dtype)
        moment = window_moment(x, self.kernel, self.padding)
        if not joint:
            return moment
        total, rows = window_sum(x, self.kernel, self.padding)
        edge = torch.cat([total, total.new_full((1,), rows)])
        return torch.cat([torch.cat([moment, total[None]]), edge[:, None]], 1)


def one_group(x: Tensor) -> Tensor:
    """``[*rows, c]`` to ``[*rows, 1, c]``."""
    return x.unsqueeze(-2)


def channels_last(x: Tensor, groups: int = 1) -> Tensor:
    """``[N, C, *space]`` to ``[N, positions, groups, C/groups]``."""
    rows = x.flatten(2).mT
    return rows.unsqueeze(2) if groups == 1 else rows.unflatten(2, (groups, -1))
