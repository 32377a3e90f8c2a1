"""Plain autograd on the caller's own module: what every operator of `curvops` must equal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import grad

import curvops

IMPLICIT, KRONECKER = ["Hessian", "GGN", "EF"], ["GGNDiagonal", "EKFAC"]
KINDS = IMPLICIT + KRONECKER


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
        return self.total(outputs, targets) if self.total else self.loss(torch.cat(outputs), torch.cat(targets))

    def truth(self, kind: str) -> Tensor:
        """The matrix; for Kronecker approximations the GGN, whose diagonal or traces they keep."""
        with differentiable(self.params) as leaves:
            return {"Hessian": hessian, "EF": empirical_fisher}.get(kind, ggn)(self, leaves)

    def check(self, kind: str, op: Any = None, truth: Tensor | None = None) -> None:
        """All that can be asked of an operator against the truth as it is now."""
        truth = self.truth(kind) if truth is None else truth
        op = self.make(kind) if op is None else op
        if kind in KRONECKER:
            both = op.to_dense().diagonal(), truth.diagonal()
            close(*(map(self.traces, both) if kind == "EKFAC" else both))
            return
        V = real(len(truth), 3, seed=1)
        for _ in range(2):
            close(op @ V[:, 0], truth @ V[:, 0])
        close(op.to_dense(), truth)
        close(op @ V, truth @ V)
        with op.linearized():
            for v in (V[:, 0], V[:, 1], V):
                close(op @ v, truth @ v)

    def traces(self, diagonal: Tensor) -> Tensor:
        return torch.stack([part.sum() for part in diagonal.split([p.numel() for p in self.params.values()])])


@contextmanager
def differentiable(params: dict[str, Tensor]) -> Iterator[list[Tensor]]:
    frozen = [p.requires_grad_() for p in params.values() if not p.requires_grad]
    yield list(params.values())
    for p in frozen:
        p.requires_grad_(False)


def slopes(value: Tensor, leaves: list[Tensor], graph: bool = False) -> Tensor:
    """The gradient as one vector; the graph of ``value`` stays."""
    found: list[Any] = [None] * len(leaves)
    if value.requires_grad:
        found = list(grad(value, leaves, create_graph=graph, retain_graph=True, allow_unused=True))
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(leaves, found, strict=True)])


def hessian(case: Case, leaves: list[Tensor]) -> Tensor:
    return torch.stack([slopes(entry, leaves) for entry in slopes(case.risk(case.outputs()), leaves, graph=True)])


def jacobian(case: Case, leaves: list[Tensor]) -> tuple[Tensor, list[Tensor], Tensor]:
    """J, the outputs as leaves, and the gradient of the risk in them."""
    outputs = case.outputs()
    J = torch.stack([slopes(entry, leaves) for z in outputs for entry in z.flatten()])
    at = [z.detach().requires_grad_() for z in outputs]
    return J, at, slopes(case.risk(at), at, graph=True)


def ggn(case: Case, leaves: list[Tensor]) -> Tensor:
    J, at, slope = jacobian(case, leaves)
    return J.T @ torch.stack([slopes(entry, at) for entry in slope]) @ J


def empirical_fisher(case: Case, leaves: list[Tensor]) -> Tensor:
    """Of losses with one term a datum, without weights."""
    J, at, slope = jacobian(case, leaves)
    N, summed = sum(map(len, at)), case.options.get("reduction", getattr(case.loss, "reduction", "mean")) == "sum"
    rows = (slope.detach()[:, None] * J).reshape(N, -1, J.shape[1]).sum(1)
    return (1 if summed else N) * rows.T @ rows


def close(found: Tensor, truth: Tensor, tolerance: float = 1e-9) -> None:
    found, truth = found.detach(), truth.detach()
    error = float((found - truth).norm() / truth.norm().clamp_min(1e-12))
    assert error < tolerance, f"relative error {error:.2e}, norms {float(found.norm()):.6g}, {float(truth.norm()):.6g}"


def real(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
