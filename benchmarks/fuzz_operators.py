"""Random expressions of operators, each with its matrix: built beside it in double precision from what defines its leaves."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import curvops as co

DTYPES = [torch.float64, torch.float64, torch.float32, torch.bfloat16]


@dataclass
class Made:
    """An operator, its matrix in double precision, and a bound of the numbers that its products pass through."""

    op: Any
    dense: Tensor
    scale: float


class Draw:
    """All random choices of one case."""

    def __init__(self, seed: int) -> None:
        self.choices, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.pick, self.below = self.choices.choice, self.choices.randrange

    def chance(self, share: float) -> bool:
        return self.choices.random() < share

    def real(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(dtype)

    def psd(self, size: int, dtype: torch.dtype) -> Tensor:
        root = self.real(size, max(1, size - self.below(2)))
        found = (root @ root.T / max(1, size)).to(dtype)
        return (found + found.T) / 2

    def space(self, dtype: torch.dtype) -> co.TensorSpace:
        if self.chance(0.4):
            return co.TensorSpace.flat(1 + self.below(7), dtype)
        shapes = [self.pick([(), (1,), (2,), (3,), (2, 2), (1, 3), (0,), (2, 1, 2)]) for _ in range(1 + self.below(4))]
        names = self.choices.sample(["a.weight", "a.bias", "b.0.w", "b.0.b[1]", "c", "a*"], len(shapes))
        tensors = {name: torch.zeros(shape, dtype=dtype) for name, shape in zip(names, shapes, strict=True)}
        if not sum(t.numel() for t in tensors.values()):
            tensors[names[0]] = torch.zeros(2, dtype=dtype)
        if dtype == torch.float64 and self.chance(0.15):
            tensors[names[-1]] = tensors[names[-1]].float()
        return co.TensorSpace(tensors)


def norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix)) if matrix.numel() else 0.0


def leaf(draw: Draw, space: co.TensorSpace) -> Made:
    """A square structured operator on a space."""
    dim, dtype = space.dim, space.dtype
    kind = draw.pick(["identity", "diagonal", "outer", "rank", "blocks", "kronecker", "plain"])
    if kind == "identity":
        factor = draw.pick([1.0, 2.5, -0.5, 0.0])
        return Made(co.IdentityOperator(space, factor), factor * torch.eye(dim).double(), abs(factor) + 1)
    d = draw.real(dim, dtype=dtype)
    d = d.abs() if draw.chance(0.5) else d
    if kind == "diagonal":
        given = space.split(d) if draw.chance(0.3) and len(set(space.dtypes.values())) == 1 else d
        return Made(co.DiagonalOperator(given, space), d.double().diag(), norm(d.double().diag()) + 1)
    columns = draw.real(dim, draw.below(3), dtype=dtype)
    low, other = columns.double(), draw.real(*columns.shape, dtype=dtype)
    if kind == "outer":
        right, op = (columns, co.OuterProductOperator(columns, codomain=space)) if draw.chance(0.5) else (
            other, co.OuterProductOperator(columns, other, space, space))  # fmt: skip
        return Made(op, low @ right.double().T, norm(low) * norm(right.double()) + 1)
    if kind == "rank":
        weights = draw.real(columns.shape[1], dtype=dtype) if draw.chance(0.5) else None
        s = torch.ones(columns.shape[1]).double() if weights is None else weights.double()
        low = (low * s) @ low.T
        op = co.LowRankPlusDiagonalOperator(columns, d, weights, space)
        return Made(op, low + d.double().diag(), norm(columns.double()) ** 2 * (1 + norm(s.diag())) + norm(d.diag()))
    if kind == "plain":
        matrix = draw.real(dim, dim, dtype=dtype)
        return Made(
            co.OuterProductOperator(matrix, torch.eye(dim, dtype=dtype), space, space),
            matrix.double(),
            norm(matrix.double()),
        )
    blocks: dict[str, Any] = {}
    parts = []
    for name, size in zip(space.names, space.sizes, strict=True):
        left = draw.pick([n for n in range(1, size + 1) if size % n == 0] or [0])
        pair = [draw.psd(n, dtype) for n in (left, size // max(left, 1))]
        if draw.chance(0.3):
            pair = [factor.diagonal().clone() for factor in pair]
        single = kind == "blocks" and draw.chance(0.5)
        pair = [draw.psd(size, dtype), torch.ones(1, 1, dtype=dtype)] if single else pair
        blocks[name] = pair[0] if single else tuple(pair)
        parts.append(torch.kron(*(f.double().diag() if f.ndim == 1 else f.double() for f in pair)))
    dense = torch.block_diag(*(p for p in parts if p.numel()))
    return Made(co.block_diagonal(blocks, space), dense, norm(dense) + 1)


@cache
def problems(dtype: torch.dtype) -> tuple[Made, ...]:
    """Operators over data, of a net with ten parameters, and their definitions by autograd on all data."""
    generator = torch.Generator().manual_seed(0)
    first, second = nn.Linear(1, 3), nn.Linear(3, 1)
    net = nn.Sequential(first, nn.Tanh(), second).double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator).to(dtype))
    X, y = (torch.randn(5, 1, generator=generator).to(dtype) for _ in range(2))
    wide, leaves = X.double(), list(net.parameters())
    z = net(wide)
    J = torch.stack([flat(torch.autograd.grad(row, leaves, retain_graph=True)) for row in z.flatten()])
    slope = flat(torch.autograd.grad(nn.MSELoss()(z, y.double()), leaves, create_graph=True))
    H = torch.stack([flat(torch.autograd.grad(row, leaves, retain_graph=True)) for row in slope])
    ef = J.T @ (2 * (z - y.double())).square().flatten().diag() @ J / 5
    hidden = torch.tanh(first(wide)).detach()
    backs = second.weight.detach() * (1 - hidden.square())
    B = 2 * backs.T @ backs / 5
    kfac = [torch.kron(B, wide.T @ wide / 5), B, 2 * hidden.T @ hidden / 5, torch.full((1, 1), 2.0).double()]
    net, data = net.to(dtype), [(X[:3], y[:3]), (X[3:], y[3:])]
    params, same = dict(net.named_parameters()), {"check_deterministic": False}
    args = net, nn.MSELoss(), params, data
    made = [
        (co.HessianLinearOperator(*args, **same), H),
        (co.GGNLinearOperator(*args, **same), 2 * J.T @ J / 5),
        (co.EFLinearOperator(*args, **same), ef),
        (co.KFACLinearOperator(*args, fisher_type="type-2", **same), torch.block_diag(*kfac)),
        (co.JacobianLinearOperator(net, params, data, **same), J),
    ]
    return tuple(Made(op, dense.detach(), 10 * norm(dense.detach()) + 1) for op, dense in made)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


def expression(draw: Draw, space: co.TensorSpace, depth: int) -> Made:
    """Operators of a space, combined."""
    if not depth or draw.chance(0.15):
        if "0.weight" in space.names and draw.chance(0.8):
            return draw.pick(problems(space.dtype)[:4])
        return leaf(draw, space)
    a, kind = (
        expression(draw, space, depth - 1),
        draw.pick(
            ["sum", "difference", "times", "minus", "product", "adjoint", "damped", "each", "inverse", "slice", "part"]
        ),
    )
    eye = torch.eye(space.dim).double()
    if kind in ("sum", "difference", "product"):
        b = expression(draw, space, depth - 1)
        if kind == "product":
            return Made(a.op @ b.op, a.dense @ b.dense, a.scale * b.scale)
        sign = 1 if kind == "sum" else -1
        return Made(a.op + b.op if sign > 0 else a.op - b.op, a.dense + sign * b.dense, a.scale + b.scale)
    if kind in ("times", "minus"):
        factor = draw.pick([2.0, 0.25, 0, torch.tensor(3.0)]) if kind == "times" else -1.0
        return Made(
            factor * a.op if draw.chance(0.5) else a.op * factor,
            float(factor) * a.dense,
            a.scale * (1 + float(abs(factor))),
        )
    if kind == "adjoint":
        return Made(a.op.T, a.dense.T, a.scale)
    if kind == "damped":
        return Made(a.op.damped(0.5), a.dense + 0.5 * eye, a.scale + norm(0.5 * eye))
    if kind == "each":
        shifts = {name: 0.25 * draw.below(5) for name in space.names}
        added = torch.cat([torch.full((n,), shifts[name]) for name, n in zip(space.names, space.sizes, strict=True)])
        return Made(a.op.damped(shifts), a.dense + added.double().diag(), a.scale + norm(added.diag()))
    if kind == "inverse":
        shift, way = float(norm(a.dense)) + 1, draw.pick(["own", "minres", "lsmr"])
        inverse = torch.linalg.inv(a.dense + shift * eye)
        op = a.op.damped(shift)
        if way == "own" and not isinstance(op.inverse(), co.InverseOperator):
            return Made(op.inverse(), inverse, (a.scale + shift) * 4)
        tight = max(torch.finfo(space.dtype).eps * 50, 1e-12)
        options = {"tolerance": tight, "strict": space.dtype != torch.bfloat16}
        solver = "minres" if op.symmetric else "lsmr"
        solved = op.inverse(**options) if way == "own" else co.InverseOperator(op, solver, **options)
        return Made(solved, inverse, (a.scale + shift) * 50)
    if kind == "slice":
        return a if len(space.names) == 1 else Made(*padded(draw, a, space))
    order = list(range(space.dim))
    draw.choices.shuffle(order)
    inside = co.SubmatrixLinearOperator(a.op, order)
    return Made(on(inside, space), a.dense[order][:, order], a.scale)


def on(op: Any, space: co.TensorSpace) -> Any:
    """An operator on plain vectors as one on named tensors."""
    eye = torch.eye(space.dim, dtype=space.dtype)
    names = co.OuterProductOperator(eye, eye, co.TensorSpace.flat(space.dim, space.dtype), space)
    return names.T @ op @ names


def padded(draw: Draw, a: Made, space: co.TensorSpace) -> tuple[Any, Tensor, float]:
    """A block by name between operators that widen it again to the whole space."""
    names = draw.choices.sample(space.names, 1 + draw.below(len(space.names)))
    some = co.TensorSpace({n: torch.zeros(space.shapes[n], dtype=space.dtypes[n]) for n in space.names if n in names})
    if some.dim == 0 or some.dtype != space.dtype:
        return a.op, a.dense, a.scale
    rows = torch.cat([torch.arange(space.slice(n).start, space.slice(n).stop) for n in some.names])
    pick = torch.eye(space.dim, dtype=space.dtype)[rows]
    widen = co.OuterProductOperator(pick.T, torch.eye(some.dim, dtype=space.dtype), space, some)
    mask = torch.zeros(space.dim).index_fill(0, rows, 1).double().diag()
    literal = [n.replace("[", "[[]").replace("*", "[*]") if draw.chance(0.5) else n for n in names]
    return widen @ a.op[literal] @ widen.T, mask @ a.dense @ mask, a.scale


def whole(draw: Draw) -> Made:
    """The operator of a case: square ones, their rectangular parts, Jacobians."""
    dtype = draw.pick(DTYPES)
    net = draw.chance(0.25)
    if net and draw.chance(0.2):
        J = problems(dtype)[4]
        kind = draw.pick(["J", "Jᵀ", "JᵀJ", "datum", "columns"])
        if kind == "datum":
            n = draw.below(5)
            return Made(J.op.datum(n), J.dense[n : n + 1], J.scale)
        if kind == "columns":
            return Made(J.op["*", "2.*"], J.dense[:, 6:], J.scale)
        return {"J": J, "Jᵀ": Made(J.op.T, J.dense.T, J.scale)}.get(kind) or Made(
            J.op.T @ J.op, J.dense.T @ J.dense, J.scale**2
        )
    space = problems(dtype)[0].op.domain if net else draw.space(dtype)
    made = expression(draw, space, draw.below(4))
    if draw.chance(0.15):
        index = [[draw.below(space.dim) for _ in range(draw.below(5))] for _ in range(2)]
        rows, columns = (torch.tensor(i, dtype=torch.long) for i in index)
        return Made(co.SubmatrixLinearOperator(made.op, rows, index[1]), made.dense[rows][:, columns], made.scale)
    return made
