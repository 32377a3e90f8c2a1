"""Products of one batch by reverse over reverse: the reference that every fast way is measured by."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.autograd import grad

from curvops.space import TensorSpace


class OutputLinearization:
    """The Jacobian of a model's output at one batch, as products.

    Args:
        z: The output, carrying the graph of the forward pass.
        leaves: The parameters at the graph's end, by name.
        space: The space of the parameters.
    """

    def __init__(self, z: Tensor, leaves: Mapping[str, Tensor], space: TensorSpace) -> None:
        self.z = z
        self._leaves = list(leaves.values())
        self._space = space
        self._dummy: Tensor | None = None
        self._pulled: list[Tensor | None] = []

    def vjp(self, u: Tensor) -> Tensor:
        """Jᵀ u as a flat vector ``[D]``, for u of the output's shape."""
        if not self.z.requires_grad:
            return self._space.join([None] * len(self._leaves))
        slopes = grad(self.z, self._leaves, u.to(self.z.dtype), retain_graph=True, allow_unused=True)
        return self._space.join(slopes)

    def jvp(self, v: Tensor) -> Tensor:
        """J v, of the output's shape, for a flat vector ``[D]``: the derivative of u ↦ ⟨Jᵀu, v⟩."""
        if not self.z.requires_grad:
            return torch.zeros_like(self.z)
        if self._dummy is None:
            self._dummy = torch.zeros_like(self.z).requires_grad_()
            self._pulled = list(grad(self.z, self._leaves, self._dummy, create_graph=True, allow_unused=True))
        (product,) = _pull(self._pulled, [self._dummy], self._space.split(v))
        return torch.zeros_like(self.z) if product is None else product.detach()


class GradientLinearization:
    """The Hessian of a scalar at one batch, as products.

    Args:
        value: The scalar, carrying the graph of the forward pass.
        leaves: The parameters at the graph's end, by name.
        space: The space of the parameters.
    """

    def __init__(self, value: Tensor, leaves: Mapping[str, Tensor], space: TensorSpace) -> None:
        self._leaves = list(leaves.values())
        self._space = space
        self._slopes: list[Tensor | None] = [None] * len(self._leaves)
        if value.requires_grad:
            self._slopes = list(grad(value, self._leaves, create_graph=True, allow_unused=True))

    def hvp(self, v: Tensor) -> Tensor:
        """∇² v as a flat vector ``[D]``, for a flat vector ``[D]``."""
        return self._space.join(_pull(self._slopes, self._leaves, self._space.split(v)))


def _pull(outputs: list[Tensor | None], inputs: list[Tensor], cotangents: list[Tensor]) -> list[Tensor | None]:
    """Products of those outputs that depend on something; a missing dependence is a zero, not an error."""
    used = [
        (out, u.to(out.dtype))
        for out, u in zip(outputs, cotangents, strict=True)
        if out is not None and out.requires_grad
    ]
    if not used:
        return [None] * len(inputs)
    outs, us = zip(*used, strict=True)
    return list(grad(outs, inputs, us, retain_graph=True, allow_unused=True))
