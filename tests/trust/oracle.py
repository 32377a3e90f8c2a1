"""Plain autograd on the caller's own module: what every operator of `curvops` must equal."""

from __future__ import annotations

from collections.abc import Callable
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
        fisher = {"fisher_type": "type-2"} if kind in ("KFAC", "KFOC", *KRONECKER) else {}
        cls = getattr(curvops, f"{kind}LinearOperator")
        given = {"check_deterministic": False, **fisher, **self.options, **options}
        return cls(self.model, self.loss, self.params, self.data, **given)

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

    def check(self, kind: str, operator: Any = None, truth: Tensor | None = None) -> None:
        """Everything that can be asked of an operator against the truth as it is now."""
        truth = self.truth(kind) if truth is None else truth
        op = self.make(kind) if operator is None else operator
        if kind not in IMPLICIT:
            close(op.to_dense().diagonal() if kind == "GGNDiagonal" else self.traces(op.to_dense()), self.diagonal(kind, truth))
            return
        V = torch.randn(len(truth), 3, generator=torch.Generator().manual_seed(1))
        close(op @ V[:, 0], truth @ V[:, 0])
        close(op @ V, truth @ V)
        close(op.to_dense(), truth)
        with op.linearized():
            close(op @ V[:, 0], truth @ V[:, 0])
            close(op @ V[:, 1], truth @ V[:, 1])
            close(op @ V, truth @ V)

    def traces(self, matrix: Tensor) -> Tensor:
        return torch.stack([part.sum() for part in matrix.diagonal().split([p.numel() for p in self.params.values()])])

    def diagonal(self, kind: str, truth: Tensor) -> Tensor:
        return truth.diagonal() if kind == "GGNDiagonal" else self.traces(truth)


@contextmanager
def differentiable(params: dict[str, Tensor]) -> Any:
    frozen = [p for p in params.values() if not p.requires_grad]
    for p in frozen:
        p.requires_grad_()
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
    """For one term a datum and a mean over data, or, with the option ``reduction="sum"``, a sum."""
    J, at, slope = jacobian(case, leaves)
    N, summed = sum(map(len, at)), case.options.get("reduction", getattr(case.loss, "reduction", "mean")) == "sum"
    rows = (slope.detach()[:, None] * J).reshape(N, -1, J.shape[1]).sum(1)
    return (1 if summed else N) * rows.T @ rows


def picture(model: nn.Module) -> list[Any]:
    """Which object stands under each name of each module, and what is known of the tensors among them."""
    seen: list[Any] = []
    for prefix, module in model.named_modules(remove_duplicate=False):
        for kind in ("_parameters", "_buffers", "_modules", "__dict__"):
            for name, value in vars(module).items() if kind == "__dict__" else vars(module)[kind].items():
                facts = (value.requires_grad, id(value.grad), value.tolist()) if isinstance(value, Tensor) else len(getattr(value, "__dict__", ()))
                seen.append((prefix, kind, name, id(value), type(value), facts))
        seen.append((prefix, module.training, *(len(h) for n, h in vars(module).items() if n.endswith("_hooks"))))
    return seen


def close(found: Tensor, truth: Tensor, tolerance: float = 1e-9) -> None:
    found, truth = found.detach(), truth.detach()
    error = float((found - truth).norm() / truth.norm().clamp_min(1e-12))
    assert error < tolerance, f"relative error {error:.2e}, norms {float(found.norm()):.6g} and {float(truth.norm()):.6g}"


def real(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(n: int, classes: int = 3) -> Tensor:
    return torch.arange(n) * 7 % 5 % classes
