"""What curvature should be, from first-order autodiff and central differences alone."""

from __future__ import annotations

import copy
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from zoo.entries import Entry

STEPS = (1e-4, 1e-5, 1e-6)


class Problem:
    """A model of the zoo with its data in batches, and dense references.

    Args:
        entry: What the zoo knows of it.
    """

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        torch.manual_seed(0)
        self.model, self.X, self.y, self.loss = self._build()
        self.params = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        for p in self.model.parameters():
            p.grad = torch.ones_like(p)
        self.size = next(iter(_leaves(self.X))).shape[entry.axis]
        self.sizes = [p.numel() for p in self.params.values()]
        self.v = torch.randn(sum(self.sizes), dtype=entry.dtype)

    @property
    def data(self) -> list[tuple[Any, Any]]:
        """Two batches of different size, or one if the model mixes the data."""
        cut = self.size if self.entry.mixes else self.size // 2 + 1
        parts = [slice(0, cut)] + ([slice(cut, self.size)] if cut < self.size else [])
        axis = self.entry.axis
        return [
            (
                _tree(lambda t, p=part: t[(slice(None),) * axis + (p,)], self.X),
                _tree(lambda t, p=part: t[p], self.y),
            )
            for part in parts
        ]

    def tolerance(self, tight: float) -> float:
        """The tolerance, or what single precision allows."""
        single = self.entry.rounds or self.entry.dtype != torch.float64
        return 2e-4 if single else tight

    def state(self) -> list[Tensor | tuple[bool, ...]]:
        """All that a product may not change."""
        tensors = [t for p in self.model.parameters() for t in (p, p.grad)] + list(self.model.buffers())
        modes = tuple(m.training for m in self.model.modules())
        return [*(t.detach().clone() for t in tensors), torch.get_rng_state(), modes]

    @cached_property
    def _double(self) -> tuple[nn.Module, Any, Any, Any]:
        """The same problem in double precision, with parameters of its own."""
        torch.manual_seed(0)
        model, X, y, loss = self._build()
        model.load_state_dict(self.model.state_dict())
        loss = copy.deepcopy(loss).double() if isinstance(loss, nn.Module) else loss
        return model.double(), _double(X), _double(y), loss

    def _build(self) -> tuple[nn.Module, Any, Any, Any]:
        """The entry's model, built in its precision."""
        default = torch.get_default_dtype()
        try:
            torch.set_default_dtype(self.entry.dtype)
            return self.entry.build()
        finally:
            torch.set_default_dtype(default)

    def output(self, step: float = 0.0) -> tuple[Tensor, list[Tensor]]:
        """The output at θ + step · v, and the parameters."""
        model, X, _, _ = self._double
        buffers = {n: b.clone() for n, b in self.model.named_buffers()}
        model.load_state_dict(dict(buffers.items()), strict=False)
        own = dict(model.named_parameters())
        leaves = [own[name] for name in self.params]
        with torch.no_grad():
            for leaf, p, v in zip(leaves, self.params.values(), self.v.split(self.sizes), strict=True):
                leaf.copy_(p.double() + step * v.double().view(p.shape))
        with sdpa_kernel(SDPBackend.MATH):
            return model(X), leaves

    def gradient(self, step: float) -> Tensor:
        """The gradient of the risk at θ + step · v."""
        z, leaves = self.output(step)
        return _gradient(self._double[3](z, self._double[2]), leaves)

    def hessian_errors(self, product: Tensor) -> list[float]:
        """Relative errors of H v against central differences of the gradient, for several steps."""
        slopes = [(self.gradient(h) - self.gradient(-h)) / (2 * h) for h in STEPS]
        return [relative(product, slope) for slope in slopes]

    def twice_differentiated(self) -> Tensor:
        """H v by autodiff, for models whose gradient is not the derivative of their output."""
        z, leaves = self.output()
        slopes = torch.autograd.grad(self._double[3](z, self._double[2]), leaves, create_graph=True, allow_unused=True)
        total = (_flat(slopes, leaves) * self.v).sum()
        return _flat(torch.autograd.grad(total, leaves, allow_unused=True), leaves)

    @cached_property
    def jacobian(self) -> Tensor:
        """Rows of first-order gradients, one for each entry of the output."""
        z, leaves = self.output()
        return torch.stack([_gradient(entry, leaves) for entry in z.flatten()])

    @cached_property
    def ggn(self) -> Tensor:
        """Jᵀ ∇²ℓ J."""
        z = self.output()[0].detach()
        _, _, y, loss = self._double
        curvature = torch.autograd.functional.hessian(lambda t: loss(t, y), z).reshape(z.numel(), z.numel())
        return self.jacobian.T @ curvature @ self.jacobian

    @cached_property
    def empirical_fisher(self) -> Tensor:
        """c Σ over loss terms of outer products of their gradients."""
        z = self.output()[0].detach().requires_grad_()
        _, _, y, loss = self._double
        (g,) = torch.autograd.grad(loss(z, y), z)
        c, omega = self._constant_and_weights(z.detach())
        g = g / c / omega.where(omega > 0, torch.ones_like(omega)).sqrt()
        owner = self._terms(z)
        total = torch.zeros(len(self.v), len(self.v), dtype=torch.float64)
        for term in range(int(owner.max()) + 1):
            s = (g * (owner == term)).flatten() @ self.jacobian
            total += c * torch.outer(s, s)
        return total

    def _terms(self, z: Tensor) -> Tensor:
        """The number of the loss term that each entry of the output belongs to."""
        axis = self.entry.class_axis
        if axis is None:
            return torch.arange(len(z)).view(-1, *[1] * (z.ndim - 1)).expand(z.shape)
        if z.ndim == 1:
            return torch.arange(len(z))
        others = list(z.shape)
        others[axis] = 1
        return torch.arange(torch.Size(others).numel()).view(others).expand(z.shape)

    def _constant_and_weights(self, z: Tensor) -> tuple[float, Tensor]:
        """The factor of the sum over terms, and the weight ω of each term."""
        _, _, y, loss = self._double
        one = torch.ones(1, dtype=torch.float64)
        if loss.reduction == "sum":
            c = 1.0
        elif isinstance(loss, nn.Module):
            total = copy.deepcopy(loss)
            total.reduction = "sum"
            c = float(loss(z, y) / total(z, y))
        else:
            c = 1.0 / self.size
        weight = getattr(loss, "weight", None)
        if isinstance(loss, nn.CrossEntropyLoss) and weight is not None:
            return c, (weight[y.clamp(min=0)] * (y != loss.ignore_index)).unsqueeze(1)
        return c, one if weight is None else weight

    def traces(self, matrix: Tensor) -> list[float]:
        """The trace of each parameter's block."""
        return [float(part.sum()) for part in matrix.diagonal().split(self.sizes)]


def relative(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖."""
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-300))


def _gradient(value: Tensor, leaves: list[Tensor]) -> Tensor:
    """By `backward`, which all first-order models support."""
    for leaf in leaves:
        leaf.grad = None
    value.backward(retain_graph=True)
    return _flat([leaf.grad for leaf in leaves], leaves)


def _flat(parts: Any, like: list[Tensor]) -> Tensor:
    return torch.cat([torch.zeros(p.numel()) if t is None else t.flatten() for t, p in zip(parts, like, strict=True)])


def _tree(function: Any, tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _tree(function, value) for key, value in tree.items()}
    if isinstance(tree, tuple):
        return tuple(_tree(function, value) for value in tree)
    return function(tree)


def _double(tree: Any) -> Any:
    return _tree(lambda t: t.double() if t.is_floating_point() else t, tree)


def _leaves(tree: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _tree(found.append, tree)
    return found
