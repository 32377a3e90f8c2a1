"""What the compared quantities are, by autograd alone and in double precision, for a mean cross-entropy with labels."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator

import torch
from problem import LOSS, Problem, flat, relative
from torch import Tensor, nn


def oracle(problem: Problem, work: str) -> Tensor:
    """The quantity that a piece of work is about."""
    p = Double(problem)
    kind = work.removeprefix("dense ").replace(",", " ").split()[0]
    if kind == "EKFAC":
        return p.diagonal("GGN").sum().view(1)  # type-2 EKFAC has the GGN's trace
    if kind == "KFAC":
        return p.kfac("GGN" if "type-2" in work else "EF", joint="joint" in work)
    if "diagonal" in work:
        return p.diagonal(kind)
    return p.hessian_product() if kind == "Hessian" else p.product(kind)


class Double:
    """A problem in double precision, with all data in one batch."""

    def __init__(self, problem: Problem) -> None:
        self.model = copy.deepcopy(problem.model).double()
        self.params = list(self.model.parameters())
        X, self.y = problem.joined().data[0]
        self.X = X.double() if X.is_floating_point() else X
        self.parts = [part.double() for part in problem.parts]

    def cotangents(self, kind: str, z: Tensor) -> Iterator[Tensor]:
        """√c S column by column: the GGN's diag(√p) − p √pᵀ, or p − e_y for the empirical Fisher."""
        p = z.detach().softmax(1)
        scale = len(z) ** -0.5
        if kind == "EF":
            yield scale * (p - nn.functional.one_hot(self.y, z.shape[1]))
            return
        for c in range(z.shape[1]):
            unit = torch.zeros_like(p)
            unit[:, c] = 1
            yield scale * p[:, c : c + 1].sqrt() * (unit - p)

    def hessian_product(self) -> Tensor:
        grads = torch.autograd.grad(LOSS(self.model(self.X), self.y), self.params, create_graph=True)
        return flat(torch.autograd.grad(grads, self.params, self.parts))

    def product(self, kind: str) -> Tensor:
        """Jᵀ S Sᵀ J v, with J v from differentiating u ↦ Jᵀ u."""
        z = self.model(self.X)
        u = torch.zeros_like(z, requires_grad=True)
        back = torch.autograd.grad(z, self.params, u, create_graph=True)
        (Jv,) = torch.autograd.grad(back, u, self.parts)
        total = torch.zeros_like(Jv)
        for s in self.cotangents(kind, z):
            total += s * (s * Jv).sum(1, keepdim=True)
        return flat(torch.autograd.grad(z, self.params, total))

    def diagonal(self, kind: str) -> Tensor:
        """Squares of the gradients of each datum and column."""
        z = self.model(self.X)
        total = torch.zeros(sum(p.numel() for p in self.params), dtype=z.dtype)
        for s in self.cotangents(kind, z):
            for n in range(len(z)):
                own = self.model(self.X[n : n + 1])
                total += flat(torch.autograd.grad(own, self.params, s[n : n + 1])).square()
        return total

    def kfac(self, kind: str, joint: bool) -> Tensor:
        """KFAC (expand) times the vector, by its definition."""
        found: list[Tensor] = []
        parts = iter(self.parts)
        for A, B in kfac_factors(self.model, self.X, lambda z: self.cotangents(kind, z), joint):
            V, v = next(parts), next(parts)
            if joint:
                W = B @ torch.cat([V.flatten(1), v[:, None]], 1) @ A
                found += [W[:, :-1], W[:, -1]]
            else:
                found += [B @ V.flatten(1) @ A, B @ v]
        return flat(found)


def kfac_factors(
    model: nn.Module, X: Tensor, cotangents: Callable[[Tensor], Iterable[Tensor]], joint: bool, approx: str = "expand"
) -> Iterator[tuple[Tensor, Tensor]]:
    """A and B of each layer: inputs and output gradients, over the positions of all its uses, term by term.

    Without cotangents B is the identity; ``joint`` appends a one to the inputs, for the bias.
    """
    uses: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    hooks = [m.register_forward_hook(lambda m, x, z: uses.setdefault(m, []).append((x[0], z))) for m in layers]
    z = model(X)
    for hook in hooks:
        hook.remove()
    columns = list(cotangents(z))
    for layer in layers:
        a = torch.cat([inputs(layer, x) for x, _ in uses[layer]], 1).detach()
        B = (
            torch.zeros(len(layer.weight), len(layer.weight), dtype=z.dtype)
            if columns
            else torch.eye(len(layer.weight))
        )
        for u in columns:
            slopes = torch.autograd.grad(z, [out for _, out in uses[layer]], u, retain_graph=True)
            g = torch.cat([s.flatten(2).mT if s.ndim == 4 else s.reshape(len(X), -1, s.shape[-1]) for s in slopes], 1)
            g = g.flatten(0, 1) if approx == "expand" else g.sum(1)
            B += g.T @ g
        if joint:
            a = torch.cat([a, torch.ones_like(a[..., :1])], -1)
        a = a.flatten(0, 1) if approx == "expand" else a.mean(1)
        yield a.T @ a / len(a), B.to(z.dtype)


def inputs(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer's inputs, ``[data, positions, inputs]``."""
    if isinstance(layer, nn.Conv2d):
        return nn.functional.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride).mT
    return x.reshape(len(x), -1, x.shape[-1])


def numbers(
    problem: Problem, work: str, mine: Tensor | None, its: Tensor | None, tolerance: float = 1e-3
) -> tuple[str, bool]:
    """How far apart two results are, and whether the oracle speaks for ours where that is far."""
    if mine is None or its is None:
        return "sampled", True
    difference = relative(its, mine)
    if difference <= tolerance:
        return f"differ by {difference:.0e}", True
    truth = oracle(problem, work).to(mine)
    near, far = relative(mine, truth), relative(its, truth)
    text = f"differ by {difference:.0e}; off the oracle: ours {near:.0e}, theirs {far:.0e}"
    return text, near <= tolerance < far
