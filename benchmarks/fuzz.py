"""Random operators, vectors and calls against dense linear algebra: right, or an error of ours that says what is wrong.

Usage: python -m benchmarks.fuzz [--cases 10000] [--seed 0] [--first 0] [--repeats 1000]
At the end the same work is repeated on small operators, and what it leaves in memory is counted.
"""

from __future__ import annotations

import argparse
import linecache
import math
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import curvops as co
from benchmarks.fuzz_memory import memory
from benchmarks.fuzz_operators import Draw, Made, norm, whole

CLEAR = (ValueError, TypeError, KeyError, IndexError, RuntimeError, FloatingPointError)
PACKAGE = str(Path(co.__file__).parent)


def eps(op: Any) -> float:
    return max(torch.finfo(t).eps for space in (op.domain, op.codomain) for t in space.dtypes.values())


def close(found: Any, truth: Tensor, made: Made, factor: float = 1.0, bound: float | None = None) -> None:
    found = torch.as_tensor(found, dtype=torch.float64).detach()
    assert found.shape == truth.shape, f"shape {tuple(found.shape)}, expected {tuple(truth.shape)}"
    error = float((found - truth).norm())
    limit = 1e3 * eps(made.op) * factor * made.scale if bound is None else bound
    assert error <= limit, f"off by {error:.2e}, norm {float(truth.norm()):.2e}, within {limit:.2e}"


class Given:
    """A random vector in a random format of a space, its columns, and how an answer in that format is read."""

    def __init__(self, draw: Draw, space: co.TensorSpace, leading: bool = False) -> None:
        self.kind, self.many = (
            draw.pick(["flat", "list", "tuple", "dict", "array"]),
            draw.pick([None, None, 0, 1, 3, 12]),
        )
        self.kind = "flat" if self.kind == "array" and space.dtype == torch.bfloat16 else self.kind
        self.width, self.leading = 1 if self.many is None else self.many, leading and self.many is not None
        columns = draw.real(space.dim, 2 * self.width, dtype=space.dtype)[:, ::2]
        if draw.chance(0.2):
            columns = columns[:, : min(1, self.width)].expand(space.dim, self.width)
        if self.kind in ("flat", "array"):
            flat = columns[:, 0] if self.many is None else columns.T if leading else columns
            self.vector: Any = flat.numpy() if self.kind == "array" else flat
        else:
            parts = self.split(columns, space)
            columns = self.joined(parts, space)
            named = dict(reversed(list(zip(space.names, parts, strict=True))))
            self.vector = {"list": parts, "tuple": tuple(parts), "dict": named}[self.kind]
        self.columns = columns.double()

    def split(self, columns: Tensor, space: co.TensorSpace) -> list[Tensor]:
        tail, cut = (() if self.many is None else (self.many,)), columns.split(space.sizes)
        kinds = zip(cut, space.shapes.values(), space.dtypes.values(), strict=True)
        found = [part.reshape((*shape, *tail)).to(dtype) for part, shape, dtype in kinds]
        return [t.movedim(-1, 0) for t in found] if self.leading else found

    def joined(self, parts: list[Tensor], space: co.TensorSpace) -> Tensor:
        moved = [t.movedim(0, -1) for t in parts] if self.leading else parts
        return torch.cat([t.reshape(n, self.width).double() for t, n in zip(moved, space.sizes, strict=True)])

    def read(self, answer: Any, space: co.TensorSpace) -> Tensor:
        """Columns of an answer, which must be of the vector's own format."""
        assert type(answer) is type(self.vector), type(answer)
        if self.kind in ("flat", "array"):
            answer = torch.as_tensor(answer)
            assert (answer.dtype, answer.ndim) == (space.dtype, 1 if self.many is None else 2), answer
            return (answer.T if self.leading else answer).reshape(space.dim, self.width).double()
        tensors = [answer[name] for name in space.names] if self.kind == "dict" else list(answer)
        expected = self.split(torch.zeros(space.dim, self.width), space)
        assert [(t.shape, t.dtype) for t in tensors] == [(t.shape, t.dtype) for t in expected], "shapes or dtypes"
        return self.joined(tensors, space)


def multiply(draw: Draw, made: Made) -> None:
    op, left = made.op, draw.chance(0.4)
    into, out = (op.codomain, op.domain) if left else (op.domain, op.codomain)
    given = Given(draw, into, left)
    found = op.__rmatmul__(given.vector) if left else op @ given.vector
    close(given.read(found, out), (made.dense.T if left else made.dense) @ given.columns, made, 1 + norm(given.columns))


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
    given = Given(draw, made.op.codomain)
    found = made.op.solve(given.vector, shift)
    x, A, b = given.read(found.x, made.op.domain), made.dense, given.columns
    # least squares without a square matrix: the residual is orthogonal to the range
    A, b = (A + shift * torch.eye(len(A)).double(), b) if square else (A.T @ A, A.T @ b)
    floor = 1e3 * eps(made.op) * (made.scale + shift) * (1 + norm(x))
    assert found.converged or floor > 1e-6, found.reason
    if found.converged:
        close(A @ x, b, made, bound=(floor + 1e-4 * norm(given.columns)) * (1 + norm(A)))


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
    """Print counts by call, the reasons of refusals, each failure with the case that repeats it, and what memory kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("cases", 10000), ("seed", 0), ("first", 0), ("repeats", 1000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    counts, reasons, failures = Counter[tuple[str, str]](), Counter[str](), []
    for case in range(options.first, options.first + options.cases):
        title, outcome, text = run(options.seed * 10**6 + case)
        counts[title, outcome] += 1
        if outcome == "refused" and title != "nonsense":
            reasons[f"{title}: {text[:70]}"] += 1
        elif outcome in ("wrong", "opaque"):
            failures.append(f"{case}: {title}: {outcome}: {text[:300]}")
    outcomes = ["right", "refused", "wrong", "opaque"]
    print(f"| call | {' | '.join(outcomes)} |\n| --- |" + " --- |" * len(outcomes))
    for title in dict.fromkeys(title for title, _ in counts):
        print(f"| {title} | {' | '.join(str(counts[title, outcome]) for outcome in outcomes)} |")
    print(*(f"{count} of {reason}" for reason, count in reasons.most_common(10)), sep="\n")
    print(f"{len(failures)} failures", *failures[:60], sep="\n")
    for name, (tensors, kib) in memory(options.repeats).items():
        print(f"{options.repeats} times {name}: {tensors} tensors and {kib} KiB more")


if __name__ == "__main__":
    main()
