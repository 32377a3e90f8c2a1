"""What the compared quantities are, by autograd alone and in double precision, for a mean cross-entropy with labels."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from problem import LOSS, Problem, flat
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
        self.X = X.double()
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
        """KFAC (expand) times the vector, by its definition: inputs and output gradients of each layer."""
        layers = [m for m in self.model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        uses: list[tuple[nn.Module, Tensor, Tensor]] = []
        hooks = [m.register_forward_hook(lambda m, x, out: uses.append((m, x[0], out))) for m in layers]
        z = self.model(self.X)
        for hook in hooks:
            hook.remove()
        slopes = [torch.autograd.grad(z, [u[2] for u in uses], s, retain_graph=True) for s in self.cotangents(kind, z)]
        found: list[Tensor] = []
        parts = iter(self.parts)
        for k, (layer, x, _) in enumerate(uses):
            a, g = rows(layer, x), torch.cat([columns(slope[k]) for slope in slopes])
            V, v = next(parts), next(parts)
            B = g.T @ g
            if joint:
                a = torch.cat([a, torch.ones_like(a[:, :1])], 1)
                W = B @ torch.cat([V.flatten(1), v[:, None]], 1) @ (a.T @ a / len(a))
                found += [W[:, :-1], W[:, -1]]
            else:
                found += [B @ V.flatten(1) @ (a.T @ a / len(a)), B @ v]
        return flat(found)


def rows(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer's inputs, ``[data × positions, inputs]``."""
    if isinstance(layer, nn.Conv2d):
        x = nn.functional.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride).mT.flatten(0, 1)
    return x.detach()


def columns(g: Tensor) -> Tensor:
    """A layer's output gradients, ``[data × positions, outputs]``."""
    return g.flatten(2).mT.flatten(0, 1) if g.ndim == 4 else g
