"""Random operators, vectors and calls against dense linear algebra: right, or an error of ours that says what is wrong.

Usage: python benchmarks/fuzz.py [--cases 10000] [--seed 0] [--first 0]
The oracle of an expression is built beside it, in double precision, from the tensors that define its leaves.
"""

from __future__ import annotations

import argparse
import linecache
import math
import random
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import curvops as co

CLEAR = (ValueError, TypeError, KeyError, IndexError, RuntimeError, FloatingPointError)
PACKAGE = str(Path(co.__file__).parent)
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
        draw.pick("sum difference times minus product adjoint damped each inverse slice part".split()),
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
        if way == "own" and hasattr(op, "inverse"):
            return Made(op.inverse(), inverse, (a.scale + shift) * 4)
        tight = max(torch.finfo(space.dtype).eps * 50, 1e-12)
        options = {"tolerance": tight, "strict": space.dtype != torch.bfloat16}
        return Made(
            co.InverseOperator(op, "minres" if op.symmetric else "lsmr", **options), inverse, (a.scale + shift) * 50
        )
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


def eps(op: Any) -> float:
    return max(torch.finfo(t).eps for space in (op.domain, op.codomain) for t in space.dtypes.values())


def close(found: Any, truth: Tensor, made: Made, factor: float = 1.0, bound: float | None = None) -> None:
    found = torch.as_tensor(found, dtype=torch.float64).detach()
    assert found.shape == truth.shape, f"shape {tuple(found.shape)}, expected {tuple(truth.shape)}"
    error = float((found - truth).norm())
    limit = 1e3 * eps(made.op) * factor * made.scale if bound is None else bound
    assert error <= limit, f"off by {error:.2e}, norm {float(truth.norm()):.2e}, within {limit:.2e}"


def formatted(draw: Draw, space: co.TensorSpace, leading: bool) -> tuple[Any, Tensor, Callable[[Any], Tensor]]:
    """A random vector in a random format, its columns, and what reads the columns of an answer in that format."""
    kind, many = draw.pick(["flat", "list", "tuple", "dict", "array"]), draw.pick([None, None, 0, 1, 3, 12])
    if kind == "array" and space.dtype == torch.bfloat16:
        kind = "flat"
    width = 1 if many is None else many
    columns = draw.real(space.dim, 2 * width, dtype=space.dtype)[:, ::2]
    if draw.chance(0.2) and width:
        columns = columns[:, :1].expand(space.dim, width)

    def parts(columns: Tensor, space: co.TensorSpace) -> list[Tensor]:
        tail = () if many is None else (many,)
        cut = columns.split([s.numel() for s in space.shapes.values()])
        found = [
            t.reshape((*s, *tail)).to(d)
            for t, s, d in zip(cut, space.shapes.values(), space.dtypes.values(), strict=True)
        ]
        return [t.movedim(-1, 0) if leading and tail else t for t in found]

    def read(answer: Any, into: co.TensorSpace) -> Tensor:
        if kind in ("flat", "array"):
            assert isinstance(answer, Tensor if kind == "flat" else type(given)), type(answer)
            answer = torch.as_tensor(answer)
            assert answer.dtype == into.dtype and answer.ndim == (1 if many is None else 2), (
                answer.dtype,
                answer.shape,
            )
            return (answer.T if leading and many is not None else answer).reshape(into.dim, width).double()
        assert type(answer) is {"list": list, "tuple": tuple, "dict": dict}[kind]
        tensors = [answer[name] for name in into.names] if kind == "dict" else answer
        expected = parts(torch.zeros(into.dim, width), into)
        assert [(t.shape, t.dtype) for t in tensors] == [(t.shape, t.dtype) for t in expected], "shapes or dtypes"
        moved = [t.movedim(0, -1) if leading and many is not None else t for t in tensors]
        return torch.cat(
            [
                t.reshape(-1, width).double() if t.numel() else torch.zeros(n, width).double()
                for t, n in zip(moved, into.sizes, strict=True)
            ]
        )

    given: Any = parts(columns, space)
    if kind in ("flat", "array"):
        given = columns[:, 0] if many is None else columns.T if leading else columns
        given = given.numpy() if kind == "array" else given
    else:
        columns = (
            torch.cat([t.double() for t in parts_flat(given, space, leading and many is not None, width)])
            if space.dim
            else columns
        )
        given = (
            dict(reversed(list(zip(space.names, given, strict=True))))
            if kind == "dict"
            else tuple(given)
            if kind == "tuple"
            else given
        )
    return given, columns.double(), read


def parts_flat(parts: list[Tensor], space: co.TensorSpace, leading: bool, width: int) -> list[Tensor]:
    """Named tensors as rows of columns, after they were rounded to their own dtypes."""
    return [(t.movedim(0, -1) if leading else t).reshape(n, width) for t, n in zip(parts, space.sizes, strict=True)]


def multiply(draw: Draw, made: Made) -> None:
    left = draw.chance(0.4)
    into, out = (made.op.codomain, made.op.domain) if left else (made.op.domain, made.op.codomain)
    given, columns, read = formatted(draw, into, left)
    found = read(
        given @ made.op
        if left and not isinstance(given, (list, tuple, dict))
        else made.op.__rmatmul__(given)
        if left
        else made.op @ given,
        out,
    )
    close(found, (made.dense.T if left else made.dense) @ columns, made, 1 + norm(columns))


def dense(draw: Draw, made: Made) -> None:
    if draw.chance(0.5):
        with made.op.linearized():
            close(made.op.to_dense(), made.dense, made)
    close(made.op.to_dense(), made.dense, made)


def scalars(draw: Draw, made: Made) -> None:
    names = draw.chance(0.3)
    close(made.op.trace(), made.dense.trace(), made)
    close(made.op.diagonal(), made.dense.diagonal(), made)
    close(made.op.frobenius_norm(), made.dense.norm(), made, bound=3e1 * eps(made.op) ** 0.5 * made.scale)
    if names:
        for name, found in made.op.trace(groups="tensors").items():
            rows = made.op.domain.slice(name)
            close(found, made.dense[rows, rows].trace(), made)


def logdet(draw: Draw, made: Made) -> None:
    damping = norm(made.dense) + 1.0 if draw.chance(0.7) else 0.0
    found = float(made.op.logdet(torch.tensor(damping, dtype=made.op.dtype) if draw.chance(0.3) else damping))
    eigenvalues = torch.linalg.eigvalsh(made.dense) + damping
    if not eigenvalues.numel() or float(eigenvalues.abs().min()) > 1e4 * eps(made.op) * made.scale:
        least = float(eigenvalues.abs().min()) if eigenvalues.numel() else 1.0
        assert (eigenvalues < 0).sum() % 2 == 0, "the logarithm of a negative determinant"
        close(
            found,
            eigenvalues.abs().log().sum(),
            made,
            bound=1e3 * eps(made.op) * made.scale * (1 + len(eigenvalues)) / least,
        )


def pairs(draw: Draw, made: Made) -> None:
    dim = made.dense.shape[1]
    k, which = 1 + draw.below(max(1, dim)), draw.pick(["largest", "smallest", "both", "magnitude"])
    found, bound = made.op.eigenpairs(k, which), 30 * eps(made.op) ** 0.5 * made.scale
    values, A = torch.linalg.eigvalsh(made.dense), made.dense
    count = min(dim, 2 * k if which == "both" else k)
    wanted = {
        "largest": values[-count:],
        "smallest": values[:count],
        "both": torch.cat([values[: count // 2], values[count // 2 - count :]]),
    }
    if which == "magnitude":
        close(found.values.abs().sort().values, values.abs().sort().values[-count:], made, bound=bound)
    else:
        close(found.values, wanted[which], made, bound=bound)
    V = found.vectors.double()
    close(A @ V, V * found.values.double(), made, bound=bound)
    close(V.T @ V, torch.eye(count).double(), made, bound=bound)


def density(draw: Draw, made: Made) -> None:
    moments = made.op.spectral_density(num_vectors=max(1, made.dense.shape[0])).moments(2)
    truth = torch.stack([torch.linalg.matrix_power(made.dense, p).trace() for p in range(3)]) / len(made.dense)
    close(moments.values, truth, made, bound=1e3 * eps(made.op) * (made.scale**2 + 1))


def solve(draw: Draw, made: Made) -> None:
    square = made.op.domain == made.op.codomain
    shift = norm(made.dense) + 1 if square else 0.0
    given, b, read = formatted(draw, made.op.codomain, False)
    found = made.op.solve(given, shift)
    x = read(found.x, made.op.domain)
    A = made.dense + shift * torch.eye(len(made.dense)).double() if square else made.dense
    floor = 1e3 * eps(made.op) * (made.scale + shift) * (1 + norm(x))
    assert found.converged or (1e-6 + shift * 1e-9) < floor, found.reason
    if found.converged:  # least squares: the residual is orthogonal to the range
        close(
            (A if square else A.T @ A) @ x,
            b if square else A.T @ b,
            made,
            bound=floor * (1 + norm(A)) + 1e-4 * norm(b) * (1 + norm(A)),
        )


def scipy(draw: Draw, made: Made) -> None:
    other, width = made.op.to_scipy(), draw.pick([1, 3])
    v = draw.real(made.dense.shape[1], width, dtype=made.op.dtype).float()
    close(other.matmat(v.numpy()), made.dense @ v.to(made.op.dtype).double(), made, 1 + norm(v))
    assert other.shape == tuple(made.dense.shape)


def nonsense(draw: Draw, made: Made) -> None:
    """What has no answer, so that only an error is right."""
    op, D = made.op, made.op.domain.dim
    v = torch.ones(D, dtype=op.dtype)
    calls: list[Callable[[], Any]] = [
        lambda: op @ torch.ones(D + 1, dtype=op.dtype), lambda: op @ v.long(), lambda: op @ ([v] * 9), lambda: op @ v[None, None],
        lambda: op @ {"zzz": v}, lambda: op @ "v", lambda: op @ None, lambda: op @ v.to(torch.complex64), lambda: op @ [],
        lambda: op @ v.to(torch.float16), lambda: op + 1.0, lambda: op * None, lambda: op["no.*"], lambda: op[0], lambda: op["*", 1],
        lambda: op.eigenpairs(0), lambda: op.eigenpairs(D + 1), lambda: op.eigenpairs(1, "some"), lambda: op.damped(-1.0),
        lambda: op.damped({"zzz": 1.0}), lambda: op.damped(torch.ones(3)), lambda: op.damped(math.nan), lambda: op.solve(v * math.nan, 1.0),
        lambda: op.solve(torch.ones(D + 2)), lambda: op.solve(v, -1.0), lambda: op.solve(v, solver="gauss"), lambda: op.solve("b"),
        lambda: co.SubmatrixLinearOperator(op, [D + 99]), lambda: co.SubmatrixLinearOperator(op, [0.5]), lambda: op.trace(groups="layers"),
        lambda: op + co.IdentityOperator(co.TensorSpace.flat(99)), lambda: op @ co.IdentityOperator(co.TensorSpace.flat(99)),
        lambda: op.logdet(-1.0), lambda: op.logdet("1"), lambda: op.frobenius_norm(groups="tensors"),
        lambda: op.solve(v, None), lambda: op.solve(v, torch.ones(2)), lambda: op.trace(metod="xtrace"), lambda: op.solve(v, tolerence=1),
    ]  # fmt: skip
    found = draw.pick(calls)()
    raise AssertionError(f"an answer: {found!r}"[:200])


CALLS: list[Callable[[Draw, Made], None]] = [
    multiply,
    multiply,
    dense,
    scalars,
    logdet,
    pairs,
    density,
    solve,
    scipy,
    nonsense,
]


def own(error: BaseException) -> bool:
    """Whether an error is raised on purpose, by a statement of the package, or of Python's own about operands."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    line = linecache.getline(last.filename, last.lineno or 0).strip()
    operands = "unsupported operand" in str(error) and "Operator" in str(error)
    return operands or (last.filename.startswith(PACKAGE) and line.startswith("raise") and len(str(error)) > 15)


def run(seed: int) -> tuple[str, str, str]:
    """One case: the call, what came of it, and what there is to say."""
    draw = Draw(seed)
    title = "build"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = whole(draw)
            call = draw.pick(CALLS)
            title = call.__name__
            call(draw, made)
    except AssertionError as error:
        return title, "wrong", f"{made.op!r}: {error}"
    except CLEAR as error:
        return title, "refused" if own(error) else "opaque", f"{type(error).__name__}: {error}"
    except Exception as error:
        return title, "opaque", f"{type(error).__name__}: {error}"
    return title, "right", ""


def main() -> None:
    """Print counts by call, the reasons of refusals, and each failure with the seed that repeats it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("cases", 10000), ("seed", 0), ("first", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    counts, reasons, failures = Counter[tuple[str, str]](), Counter[str](), []
    for case in range(options.first, options.first + options.cases):
        title, outcome, text = run(options.seed * 10**6 + case)
        counts[title, outcome] += 1
        if outcome == "refused" and title != "nonsense":
            reasons[title + ": " + text[:90]] += 1
        elif outcome in ("wrong", "opaque"):
            failures.append(f"{case}: {title}: {outcome}: {text[:300]}")
    outcomes = ["right", "refused", "wrong", "opaque"]
    print(f"| call | {' | '.join(outcomes)} |\n| --- |" + " --- |" * 4)
    for title in dict.fromkeys(title for title, _ in counts):
        print(f"| {title} | {' | '.join(str(counts[title, outcome]) for outcome in outcomes)} |")
    print(*(f"{count} × {reason}" for reason, count in reasons.most_common(25)), sep="\n")
    print(f"{len(failures)} failures", *failures[:60], sep="\n")


if __name__ == "__main__":
    main()
