"""Products of one batch by reverse over reverse: the reference that every fast way is measured by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.autograd import grad

from curvops.losses import OutputCurvature
from curvops.products.count import counted
from curvops.space import TensorSpace


class OutputLinearization:
    """The Jacobian of a model's output at one batch, as products.

    Args:
        z: The output, carrying the graph of the forward pass.
        leaves: The parameters at the graph's end, by name.
        space: The space of the parameters.

    Attributes:
        z, space: As given.
        double_bytes: Bytes of the graph of u ↦ Jᵀu, once it is there.
    """

    def __init__(self, z: Tensor, leaves: Mapping[str, Tensor], space: TensorSpace) -> None:
        self.z = z
        self._leaves = list(leaves.values())
        self.space = space
        self._dummy: Tensor | None = None
        self._pulled: list[Tensor | None] = []
        self.double_bytes = 0

    def vjp(self, u: Tensor, batched: bool = False) -> Tensor:
        """Jᵀ u as a flat vector ``[D]``, for u of the output's shape; batched, ``[K, *output]`` to ``[K, D]``."""
        found = self.pull(u, batched)
        return _join_batched(found, self.space, u.shape[0]) if batched else self.space.join(drained(found))

    def pull(self, u: Tensor, batched: bool = False, last: bool = False) -> list[Tensor | None]:
        """The same by parameter, ``None`` for zeros; the ``last`` one frees the graphs."""
        if last:
            self._dummy, self._pulled = None, []
        return _pull([self.z], self._leaves, [u.to(self.z.dtype)], batched, last)

    def jvp(self, v: Tensor, batched: bool = False) -> Tensor:
        """J v, of the output's shape, for a flat vector ``[D]``: the derivative of u ↦ ⟨Jᵀu, v⟩.

        Batched, ``[K, D]`` to ``[K, *output]``.
        """
        zero = torch.zeros_like(self.z, requires_grad=False)
        if not self.z.requires_grad:
            return zero.expand(len(v), *zero.shape) if batched else zero
        if self._dummy is None:
            self._dummy = zero.clone().requires_grad_()
            pull = partial(grad, self.z, self._leaves, self._dummy, create_graph=True, allow_unused=True)
            found, held = counted(pull)
            self._pulled, self.double_bytes = list(found), held or 0
        (product,) = _pull(self._pulled, [self._dummy], tangents(v, self.space), batched)
        if product is None:
            return zero.expand(len(v), *zero.shape) if batched else zero
        return product.detach()


class GradientLinearization:
    """The Hessian of a scalar at one batch.

    Args:
        output: The scalar, or the tensor that it is a function of, carrying the graph of the forward pass.
        leaves: The parameters at the graph's end, by name.
        space: The space of the parameters.
        slope: The scalar's gradient in the output, as a function of the output.
    """

    def __init__(
        self, output: Tensor, leaves: Mapping[str, Tensor], space: TensorSpace, slope: Tensor | None = None
    ) -> None:
        self._leaves = list(leaves.values())
        self.space = space
        self.curvature: OutputCurvature | None = None
        self._slopes: list[Tensor | None] = [None] * len(self._leaves)
        if output.requires_grad:
            self._slopes = list(grad(output, self._leaves, slope, create_graph=True, allow_unused=True))

    @classmethod
    def of_loss(
        cls, z: Tensor, at: Callable[[Tensor], OutputCurvature], leaves: Mapping[str, Tensor], space: TensorSpace
    ) -> GradientLinearization:
        """The Hessian of a loss at a model's output ``z``, by the loss's closed forms where it has them."""
        curvature = at(z)
        if not curvature.closed_form:
            return cls(curvature.value(), leaves, space)
        curvature = at(z.detach())
        found = cls(z, leaves, space, curvature.gradient_at(z))
        found.curvature = curvature
        return found

    def product(self, v: Tensor) -> Tensor:
        """The product with a flat vector ``[D]``."""
        return self.space.join(drained(self.parts(v)))

    def parts(self, v: Tensor, last: bool = False) -> list[Tensor | None]:
        """The same by parameter, ``None`` for zeros; the ``last`` one frees the graph."""
        return _pull(self._slopes, self._leaves, tangents(v, self.space), False, last)

    def products(self, rows: Tensor) -> Tensor:
        """The products with several, ``[K, D]`` to ``[K, D]``, in one batched backward pass."""
        found = _pull(self._slopes, self._leaves, tangents(rows, self.space), True)
        return _join_batched(found, self.space, len(rows))


def tangents(v: Tensor, space: TensorSpace) -> list[Tensor]:
    """Parts by parameter of a flat vector ``[D]``, or of several ``[K, D]``, in the parameters' dtypes."""
    named = zip(v.split(space.sizes, -1), space.shapes.values(), space.dtypes.values(), strict=True)
    return [part.reshape((*v.shape[:-1], *shape)).to(dtype) for part, shape, dtype in named]


def drained(found: list[Tensor | None]) -> Iterator[Tensor | None]:
    """The entries of a list, each of which is let go before the next one is asked for."""
    while found:
        yield found.pop(0)


def _join_batched(found: list[Tensor | None], space: TensorSpace, rows: int) -> Tensor:
    parts = [
        torch.zeros(rows, size, dtype=space.dtype, device=space.device)
        if tensor is None
        else tensor.reshape(rows, size).to(space.dtype)
        for tensor, size in zip(found, space.sizes, strict=True)
    ]
    return torch.cat(parts, 1)


def _pull(
    outputs: list[Tensor | None], inputs: list[Tensor], cotangents: list[Tensor], batched: bool, last: bool = False
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
    return list(grad(outs, inputs, us, retain_graph=not last, allow_unused=True, is_grads_batched=batched))
