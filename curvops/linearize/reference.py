"""Products of one batch by reverse over reverse: the reference that every fast way is measured by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.autograd import grad

from curvops.space import TensorSpace


class BatchProduct(ABC):
    """A batch's symmetric matrix, known by its products."""

    @abstractmethod
    def product(self, v: Tensor) -> Tensor:
        """The product with a flat vector ``[D]``."""

    @abstractmethod
    def products(self, columns: Tensor) -> Tensor:
        """The products with columns ``[D, K]``, in one batched backward pass."""


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

    def vjp(self, u: Tensor, batched: bool = False) -> Tensor:
        """Jᵀ u as a flat vector ``[D]``, for u of the output's shape; batched, ``[K, *output]`` to ``[D, K]``."""
        if not self.z.requires_grad:
            columns = u.shape[:1] if batched else ()
            return torch.zeros(self._space.dim, *columns, dtype=self._space.dtype, device=self._space.device)
        found = _pull([self.z], self._leaves, [u.to(self.z.dtype)], batched)
        return _join_batched(found, self._space, u.shape[0]) if batched else self._space.join(found)

    def jvp(self, v: Tensor, batched: bool = False) -> Tensor:
        """J v, of the output's shape, for a flat vector ``[D]``: the derivative of u ↦ ⟨Jᵀu, v⟩.

        Batched, ``[D, K]`` to ``[K, *output]``.
        """
        zero = torch.zeros_like(self.z, requires_grad=False)
        if not self.z.requires_grad:
            return zero.expand(v.shape[1], *zero.shape) if batched else zero
        if self._dummy is None:
            self._dummy = zero.clone().requires_grad_()
            self._pulled = list(grad(self.z, self._leaves, self._dummy, create_graph=True, allow_unused=True))
        (product,) = _pull(self._pulled, [self._dummy], _cotangents(v, self._space, batched), batched)
        if product is None:
            return zero.expand(v.shape[1], *zero.shape) if batched else zero
        return product.detach()


class OutputProduct(BatchProduct):
    """Jᵀ (output matrix) J of one batch.

    Args:
        jacobian: The Jacobian.
        output_product: The product with the output matrix, both of the output's shape.
        push: J v, of the output's shape; the Jacobian's own way if not given.
    """

    def __init__(
        self,
        jacobian: OutputLinearization,
        output_product: Callable[[Tensor], Tensor],
        push: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._jacobian, self._output_product = jacobian, output_product
        self._push = jacobian.jvp if push is None else push

    def product(self, v: Tensor) -> Tensor:
        return self._jacobian.vjp(self._output_product(self._push(v)))

    def products(self, columns: Tensor) -> Tensor:
        pushed = self._jacobian.jvp(columns, batched=True)
        return self._jacobian.vjp(torch.stack([self._output_product(u) for u in pushed]), batched=True)


class GradientLinearization(BatchProduct):
    """The Hessian of a scalar at one batch.

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

    def product(self, v: Tensor) -> Tensor:
        return self._space.join(_pull(self._slopes, self._leaves, _cotangents(v, self._space, False), False))

    def products(self, columns: Tensor) -> Tensor:
        found = _pull(self._slopes, self._leaves, _cotangents(columns, self._space, True), True)
        return _join_batched(found, self._space, columns.shape[1])


def _cotangents(v: Tensor, space: TensorSpace, batched: bool) -> list[Tensor]:
    """Parts of a vector by parameter; of columns with the columns first."""
    parts = space.split(v)
    return [part.movedim(-1, 0) for part in parts] if batched else parts


def _join_batched(found: list[Tensor | None], space: TensorSpace, columns: int) -> Tensor:
    parts = [
        torch.zeros(columns, size, dtype=space.dtype, device=space.device)
        if tensor is None
        else tensor.reshape(columns, size).to(space.dtype)
        for tensor, size in zip(found, space.sizes, strict=True)
    ]
    return torch.cat(parts, 1).T


def _pull(
    outputs: list[Tensor | None], inputs: list[Tensor], cotangents: list[Tensor], batched: bool
) -> list[Tensor | None]:
    """Products of those outputs that depend on something; a missing dependence is a zero, not an error."""
    used = [
        (out, u.to(out.dtype))
        for out, u in zip(outputs, cotangents, strict=True)
        if out is not None and out.requires_grad
    ]
    if not used:
        return [None] * len(inputs)
    outs, us = zip(*used, strict=True)
    return list(grad(outs, inputs, us, retain_graph=True, allow_unused=True, is_grads_batched=batched))
