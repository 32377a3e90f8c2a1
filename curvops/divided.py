"""Parameters that are cut over the very processes that divide the data: whole for each of them, with gradients summed over all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from curvops.ranks import Ranks
from curvops.sharding import Sharding
from curvops.tree import nodes_of


class Parts(NamedTuple):
    """Of a parameter, how it is cut, the processes that have the parts, and a name that is the same in each of them."""

    how: Sharding
    ranks: Ranks
    name: str

    def whole(self, tensor: Any) -> Tensor:
        """It whole, or another tensor that is cut like it, as a tensor of its own; its gradient is the sum over the processes."""
        found: Tensor = _Whole.apply(tensor, self)  # type: ignore[no-untyped-call]
        return found


class _Whole(Function):
    """From parts to the whole; its adjoint is the sum, in parts, of what the processes have, and that one's adjoint is this."""

    @staticmethod
    def forward(ctx: Any, tensor: Any, parts: Parts) -> Tensor:
        ctx.parts = parts
        with torch._C.DisableTorchFunction():
            # processes that do something else, or failed, are seen here: then none waits for another
            parts.ranks.meet(f"a use of {parts.name}")
            return tensor.full_tensor().detach()

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> Any:
        return _Sum.apply(*gradient, ctx.parts), None  # type: ignore[no-untyped-call]


class _Sum(Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, parts: Parts) -> Any:
        ctx.parts = parts
        with torch._C.DisableTorchFunction():
            parts.ranks.meet(f"the gradient in {parts.name}")
            return parts.how.summed(gradient)

    @staticmethod
    def backward(ctx: Any, *vector: Any) -> Any:
        return _Whole.apply(*vector, ctx.parts), None  # type: ignore[no-untyped-call]


def expect_summed(output: Tensor, cut: Iterable[Tensor]) -> Tensor:
    """A graph's output; a RuntimeError where it reaches a parameter past `Parts.whole`, so that a gradient would be no sum."""
    known = {id(tensor) for tensor in cut}
    for node in nodes_of(output):
        reached = (getattr(following, "variable", None) for following, _ in node.next_functions)
        if any(id(leaf) in known for leaf in reached) and not isinstance(node, _Whole._backward_cls):
            raise RuntimeError(
                f"a parameter that is cut over the processes is taken by {node.name()} in a way that is not seen, as by its own full_tensor() or "
                "to_local(), so that gradients would not be summed over the data of all processes. Take the parameter itself, or pass the "
                "whole data in each process, without process_group=."
            )
    return output


class Silent(Function):
    """An output as it is, with gradients of zero, whose backward passes do what they would do otherwise."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> Any:
        return gradient[0] * 0
