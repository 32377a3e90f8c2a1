"""What curvature should be: plain autograd on the caller's own module, and central differences of its gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.nn.attention import SDPBackend, sdpa_kernel

import curvops

IMPLICIT, KRONECKER = ["Hessian", "GGN", "EF"], ["GGNDiagonal", "EKFAC"]
KINDS = IMPLICIT + KRONECKER
STEPS = (1e-4, 1e-5, 1e-6)


@dataclass(repr=False)
class Case:
    """A model, a loss, and batches; ``total`` is the risk of all outputs where they cannot be concatenated."""

    model: Any
    loss: Any
    data: Any
    options: dict[str, Any] = field(default_factory=dict)
    params: dict[str, Tensor] = field(default_factory=dict)
    total: Callable[[list[Tensor], list[Any]], Tensor] | None = None

    def __post_init__(self) -> None:
        self.params = self.params or dict(self.model.named_parameters())

    def make(self, kind: str, **options: Any) -> Any:
        fisher = {} if kind in IMPLICIT else {"fisher_type": "type-2"}
        given = {"check_deterministic": False, **fisher, **self.options, **options}
        return getattr(curvops, f"{kind}LinearOperator")(self.model, self.loss, self.params, self.data, **given)

    def outputs(self) -> list[Tensor]:
        call = self.model if isinstance(self.model, nn.Module) else lambda X: self.model(self.params, X)
        return [call(X) for X, _ in self.data]

    def risk(self, outputs: list[Tensor]) -> Tensor:
        targets = [y for _, y in self.data]
        return self.total(outputs, targets) if self.total else self.loss(torch.cat(outputs), joined(targets))

    def truth(self, kind: str) -> Tensor:
        """The matrix; for Kronecker approximations the GGN, whose diagonal or traces they keep."""
        with differentiable(self.params) as leaves:
            if kind == "Hessian":
                return jacobian([slopes(self.risk(self.outputs()), leaves, graph=True)], leaves)
            outputs = self.outputs()
            J, slope, H = jacobian(outputs, leaves), *curvature(self.risk, outputs)
        if kind != "EF":
            return J.T @ H @ J
        # of losses with one term a datum, without weights
        N, summed = sum(map(len, outputs)), self.options.get("reduction", getattr(self.loss, "reduction", "")) == "sum"
        rows = (slope[:, None] * J).reshape(N, -1, J.shape[1]).sum(1)
        return (1 if summed else N) * rows.T @ rows

    def check(self, *kinds: str, op: Any = None, truth: Tensor | None = None) -> list[Any]:
        """All that can be asked of operators, or of the one given, against the truth as it is now; returns them."""
        truths = {} if truth is None else dict.fromkeys(("Hessian", "EF", "GGN"), truth)
        checked = []
        for kind in kinds:
            matrix = kind if kind in ("Hessian", "EF") else "GGN"
            if matrix not in truths:
                truths[matrix] = self.truth(matrix)
            checked.append(self.make(kind) if op is None else op)
            self._check(kind, checked[-1], truths[matrix])
        return checked

    def _check(self, kind: str, op: Any, truth: Tensor) -> None:
        if kind in KRONECKER:
            both = op.to_dense().diagonal(), truth.diagonal()
            close(*(map(self.traces, both) if kind == "EKFAC" else both))
            return
        V = real(len(truth), 3, seed=1)
        close(op.to_dense(), truth)
        for v in (V[:, 0], V):
            close(op @ v, truth @ v)
        with op.linearized():
            for v in (V[:, 0], V[:, 1], V):
                close(op @ v, truth @ v)

    def traces(self, diagonal: Tensor) -> Tensor:
        return torch.stack([part.sum() for part in diagonal.split([p.numel() for p in self.params.values()])])


class Problem:
    """A model of the zoo with its data in batches, and references in double precision."""

    def __init__(self, entry: Any) -> None:
        self.entry = entry
        self.model, self.X, self.y, self.loss = self._build()
        self.params = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        for p in self.model.parameters():
            p.grad = torch.ones_like(p)
        leaves: list[Tensor] = []
        tree(leaves.append, self.X)
        self.size = leaves[0].shape[entry.axis]
        self.sizes = [p.numel() for p in self.params.values()]
        self.v = torch.randn(sum(self.sizes), dtype=entry.dtype)
        # the same problem in double precision, with parameters of its own
        twin, X, y, loss = self._build()
        self.twin, self.loss64 = twin.double(), copy.deepcopy(loss).double() if isinstance(loss, nn.Module) else loss
        self.X64, self.y64 = (tree(lambda t: t.double() if t.is_floating_point() else t, part) for part in (X, y))

    def _build(self) -> tuple[nn.Module, Any, Any, Any]:
        default = torch.get_default_dtype()
        torch.default_generator.manual_seed(0)
        try:
            torch.set_default_dtype(self.entry.dtype)
            return self.entry.build()
        finally:
            torch.set_default_dtype(default)

    @property
    def data(self) -> list[tuple[Any, Any]]:
        """Two batches of different size, or one if the model mixes the data."""
        cut = self.size if self.entry.mixes else self.size // 2 + 1
        parts = [slice(0, cut), slice(cut, self.size)][: 1 + (cut < self.size)]
        before = (slice(None),) * self.entry.axis
        return [(tree(lambda t, p=p: t[(*before, p)], self.X), tree(lambda t, p=p: t[p], self.y)) for p in parts]

    def tolerance(self, tight: float) -> float:
        """The tolerance, or what single precision allows."""
        return 2e-4 if self.entry.rounds or self.entry.dtype != torch.float64 else tight

    def state(self) -> list[Tensor | tuple[bool, ...]]:
        """All that a product may not change."""
        tensors = [t for p in self.model.parameters() for t in (p, p.grad)] + list(self.model.buffers())
        modes = tuple(m.training for m in self.model.modules())
        return [*(t.detach().clone() for t in tensors), torch.get_rng_state(), modes]

    def output(self, step: float = 0.0) -> tuple[Tensor, list[Tensor]]:
        """The output at θ + step · v, and the parameters."""
        self.twin.load_state_dict(self.model.state_dict())
        own = dict(self.twin.named_parameters())
        leaves = [own[name] for name in self.params]
        with torch.no_grad():
            for leaf, v in zip(leaves, self.v.split(self.sizes), strict=True):
                leaf.add_(v.double().view_as(leaf), alpha=step)
        with sdpa_kernel(SDPBackend.MATH):
            return self.twin(self.X64), leaves

    def risk(self, outputs: list[Tensor]) -> Tensor:
        return self.loss64(outputs[0], self.y64)

    def gradient(self, value: Tensor, leaves: list[Tensor]) -> Tensor:
        """By `backward`, which all first-order models support."""
        for leaf in leaves:
            leaf.grad = None
        value.backward(retain_graph=True)
        return flat([leaf.grad for leaf in leaves], leaves)

    def hessian_errors(self, product: Tensor) -> list[float]:
        """Relative errors of H v against central differences of the gradient, for several steps."""

        def at(step: float) -> Tensor:
            z, leaves = self.output(step)
            return self.gradient(self.risk([z]), leaves)

        return [relative(product, (at(h) - at(-h)) / (2 * h)) for h in STEPS]

    def twice_differentiated(self) -> Tensor:
        """H v by autodiff, for models whose gradient is not the derivative of their output."""
        z, leaves = self.output()
        return slopes(slopes(self.risk([z]), leaves, graph=True) @ self.v, leaves)

    @cached_property
    def jacobian(self) -> Tensor:
        z, leaves = self.output()
        return torch.stack([self.gradient(entry, leaves) for entry in z.flatten()])

    @cached_property
    def ggn(self) -> Tensor:
        return self.jacobian.T @ curvature(self.risk, [self.output()[0]])[1] @ self.jacobian

    @cached_property
    def empirical_fisher(self) -> Tensor:
        """c Σ over loss terms of outer products of their gradients."""
        z = self.output()[0].detach()
        c, omega = self._constant_and_weights(z)
        g = curvature(self.risk, [z])[0].view_as(z) / c / omega.where(omega > 0, torch.ones_like(omega)).sqrt()
        owner = self._terms(z)
        S = torch.stack([(g * (owner == term)).flatten() for term in range(int(owner.max()) + 1)])
        return c * (S @ self.jacobian).T @ (S @ self.jacobian)

    def _terms(self, z: Tensor) -> Tensor:
        """The number of the loss term that each entry of the output belongs to."""
        axis, shape = self.entry.class_axis, list(z.shape)
        if axis is None:
            shape[1:] = [1] * (z.ndim - 1)
        elif z.ndim > 1:
            shape[axis] = 1
        return torch.arange(torch.Size(shape).numel()).view(shape).expand(z.shape)

    def _constant_and_weights(self, z: Tensor) -> tuple[float, Tensor]:
        """The factor of the sum over terms, and the weight ω of each term."""
        y, loss, c = self.y64, self.loss64, 1.0
        if loss.reduction != "sum" and isinstance(loss, nn.Module):
            total = copy.deepcopy(loss)
            total.reduction = "sum"
            c = float(loss(z, y) / total(z, y))
        elif loss.reduction != "sum":
            c = 1.0 / self.size
        weight = getattr(loss, "weight", None)
        if isinstance(loss, nn.CrossEntropyLoss) and weight is not None:
            return c, (weight[y.clamp(min=0)] * (y != loss.ignore_index)).unsqueeze(1)
        return c, torch.ones(1) if weight is None else weight

    def traces(self, matrix: Tensor) -> list[float]:
        """The trace of each parameter's block."""
        return [float(part.sum()) for part in matrix.diagonal().split(self.sizes)]


@contextmanager
def differentiable(params: dict[str, Tensor]) -> Iterator[list[Tensor]]:
    frozen = [p.requires_grad_() for p in params.values() if not p.requires_grad]
    yield list(params.values())
    for p in frozen:
        p.requires_grad_(False)


def flat(parts: Any, like: list[Tensor]) -> Tensor:
    return torch.cat([(torch.zeros_like(p) if t is None else t).flatten() for t, p in zip(parts, like, strict=True)])


def slopes(value: Tensor, leaves: list[Tensor], graph: bool = False) -> Tensor:
    """The gradient as one vector; the graph of ``value`` stays."""
    if not value.requires_grad:
        return torch.zeros(sum(p.numel() for p in leaves), dtype=leaves[0].dtype)
    found = grad(value, leaves, create_graph=graph, retain_graph=True, allow_unused=True)
    # times one: what comes back has memory of its own, and can be seen as complex numbers
    return flat([t * 1 if graph and t is not None else t for t in found], leaves)


def jacobian(outputs: list[Tensor], leaves: list[Tensor]) -> Tensor:
    """Rows of first-order gradients, one for each entry of the outputs."""
    return torch.stack([slopes(entry, leaves) for z in outputs for entry in z.flatten()])


def curvature(risk: Callable[[list[Tensor]], Tensor], outputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The gradient and the Hessian of the risk in the outputs."""
    at = [z.detach().requires_grad_() for z in outputs]
    slope = slopes(risk(at), at, graph=True)
    return slope.detach(), jacobian([slope], at)


def tree(function: Callable[[Tensor], Any], part: Any) -> Any:
    if isinstance(part, dict):
        return {key: tree(function, value) for key, value in part.items()}
    return tuple(tree(function, value) for value in part) if isinstance(part, tuple) else function(part)


def joined(parts: Any) -> Any:
    """The targets of batches, or what stands in their place, as those of one batch."""
    if isinstance(parts[0], tuple):
        return tuple(map(joined, zip(*parts, strict=True)))
    return torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0] and [t for part in parts for t in part]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-300))


def close(found: Tensor, truth: Tensor, tolerance: float = 1e-9) -> None:
    found, truth = found.detach(), truth.detach()
    error = float((found - truth).norm() / truth.norm().clamp_min(1e-12))
    assert error < tolerance, f"relative error {error:.2e}, norms {float(found.norm()):.6g}, {float(truth.norm()):.6g}"


def real(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
