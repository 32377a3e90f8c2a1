"""What a forward pass did: its operations, to tell whether a proof covers it, and how much work they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import parametrize

from curvops.substitutions import Substitutions
from curvops.tree import nodes_of, shape_of

CONVOLUTIONS = {
    *(F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
}
PRODUCTS = {
    *(F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm),
    *(torch.addmm, Tensor.addmm, torch.baddbmm, torch.mv, Tensor.mv),
}
# operations whose derivative in forward mode costs more than their second backward pass: `make calibrate` shows it
DEAR_IN_FORWARD_MODE = {
    *(F.layer_norm, torch.layer_norm, F.group_norm, torch.group_norm, F.rms_norm, F.instance_norm),
    *(F.scaled_dot_product_attention, F.multi_head_attention_forward, F.softmax, torch.softmax, Tensor.softmax),
    *(torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu),
}


class Recorder(Substitutions):
    """Sees the operations of one forward pass.

    Args:
        size: Number of data in the batch.

    Attributes:
        work: Multiplications and additions of the products with parameters and among data, roughly.
        entries: Entries of all operations' results.
        convolves: Whether there are convolutions.
        dear: Whether there are operations that are dear in forward mode.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.work, self.entries, self.convolves, self.dear = size, 0, 0, False, False
        self._steps: list[tuple[Any, Sequence[int]]] = []
        self._nodes: list[str] = []
        self._begun = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
        # whether the graph belongs to this pass alone, so that its memory may go as soon as it is used
        self.fresh = not parametrize._cache_enabled

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_function__(func, types, args, kwargs)
        if isinstance(out, Tensor):
            shape = shape_of(out)
            entries = math.prod(shape[1:] if out.is_nested else shape)
            self._steps.append((func, shape))
            self.entries += entries
            named = kwargs or {}
            if func in CONVOLUTIONS:
                self.convolves = True
                weight = args[1] if len(args) > 1 else named["weight"]
                self.work += entries * weight[0].numel()
            elif func in PRODUCTS:
                first = args[0] if args else next(t for t in named.values() if isinstance(t, Tensor))
                self.work += entries * first.size(-1)
        self.dear = self.dear or func in DEAR_IN_FORWARD_MODE
        return out

    def finish(self, z: Tensor) -> Tensor:
        """Note what the graph of the output holds besides, such as a model's own `torch.autograd.Function`s."""
        for node in nodes_of(z):
            self._nodes.append(node.name())
            self.fresh = self.fresh and node._sequence_nr() >= self._begun
        return z

    def covers(self, other: Recorder) -> bool:
        """Whether another pass made the same operations, of the same shapes but for the data's axis."""
        if len(self._steps) != len(other._steps) or self._nodes != other._nodes:
            return False
        return all(
            one is two and len(a) == len(b) and all(map(lambda m, n: self._alike(m, n, other.size), a, b))
            for (one, a), (two, b) in zip(self._steps, other._steps, strict=True)
        )

    def _alike(self, m: int, n: int, size: int) -> bool:
        return m == n or m * size == n * self.size
