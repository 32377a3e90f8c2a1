"""What is computed by several processes, and by one alone to compare with."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch
from conformance import KRONECKER, OPERATORS, RISK, SOME, draws
from problems import LOSSES, PROBLEMS, N, Problem, real
from torch import Tensor, nn

from curvops import (
    EKFACLinearOperator,
    EmpiricalRisk,
    GGNLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
    KFACLinearOperator,
    SpreadOperator,
)

BATCHES = (2, 1, 3)
# which of these batches each process has, by how they are shared
SHARES: dict[int, dict[str, tuple[list[int], ...]]] = {
    1: {"all": ([0, 1, 2],)},
    2: {"uneven": ([0, 1], [2]), "empty": ([], [0, 1, 2])},
    3: {"even": ([0], [1], [2]), "empty": ([0], [], [1, 2])},
}


class Gated(nn.Module):
    """Two layers of which a batch takes the one or the other, and a bias that enters with a weight or alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, X: Tensor) -> Tensor:
        layer = self.first if X[0, 0] > 0 else self.second
        z = layer(X) if len(X) < 3 else X @ self.second.weight.T + self.first.bias
        return torch.tanh(z) * self.scale


def gated() -> Problem:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        X = real(N, 3)
        X[0, 0], X[2, 0], X[3, 0] = 1.0, -1.0, 1.0
        return Problem(Gated().double(), nn.CrossEntropyLoss(), X, torch.randint(3, (N,)))


def own_mean(z: Tensor, y: Tensor) -> Tensor:
    return (z - y).square().mean(1).sum() / len(z)


def averaged() -> Problem:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return Problem(nn.Linear(3, 3).double(), own_mean, real(N, 3), real(N, 3), {"reduction": "mean"})


MODELS: dict[str, Callable[[], Problem]] = {**PROBLEMS, "gated": gated}


def cases() -> Iterator[tuple[str, Callable[..., Any], Problem]]:
    """Names, operators and their problems: all operators of one model, all kinds of others, all losses."""
    for name, make in OPERATORS.items():
        yield f"mlp, {name}", make, PROBLEMS["mlp"]()
    for problem, build in MODELS.items():
        for name in (name for name in SOME if name in RISK or name in KRONECKER):
            if problem != "mlp" and not (problem == "odd" and name == "hessian"):
                yield f"{problem}, {name}", OPERATORS[name], build()
    for problem, build in {**LOSSES, "averaged": averaged}.items():
        ekfac = ["ekfac mc expand separate"] * problem.endswith("_all_mean")
        for name in ("ggn", "mc fisher", "ef", *ekfac):
            yield f"{problem}, {name}", OPERATORS[name], build()


def wanted(name: str, how: str) -> bool:
    """Whether a case is computed with the data shared in some way: all with uneven shares, the most different ones otherwise."""
    problem, operator = name.split(", ", 1)
    return how == "uneven" or (
        problem in ("mlp", "gated", "averaged") and operator in (*RISK, *KRONECKER) and operator in SOME
    )


def values(name: str, make: Callable[..., Any], p: Problem, data: list[Any], **group: Any) -> dict[str, Tensor] | str:
    """What is compared: the matrix and products; or the error that the operator is refused with."""
    try:
        op = make(p.model, p.loss, p.params, data, check_deterministic=False, **p.options, **group)
        found = {"dense": op.to_dense()}
        if name.startswith("mlp"):
            v = draws(op.shape[1], 2)
            found["product"] = op @ v
            with op.linearized():
                found["kept"] = torch.cat([op @ v, op @ v])
        return found
    except (ValueError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"


def others(p: Problem, data: list[Any], **group: Any) -> dict[str, Tensor]:
    """What has no loss, is no operator, or is done with one."""
    jacobian = JacobianLinearOperator(p.model, p.params, data, **group)
    risk = EmpiricalRisk(p.model, p.loss, p.params, data, num_data=N, **group)
    value, gradient = risk.value_and_gradient()
    kfac = KFACLinearOperator(p.model, p.loss, p.params, data, **group)
    ekfac = EKFACLinearOperator(p.model, p.loss, p.params, data, fisher_type="type-2", **group)
    reduced = {"kfac_approx": "reduce", "fisher_type": "type-2", "check_deterministic": False, **group}
    reached, other = (
        KFACLinearOperator(p.model, p.loss, p.params, some, **reduced) for some in (data, [(X * 0, y) for X, y in data])
    )
    moved = list(data)
    changed = EmpiricalRisk(p.model, p.loss, p.params, moved, **group)
    KFACLinearOperator.of(changed)
    moved[:] = [(X[:1], y[:1]) for X, y in data]
    with suppress(RuntimeError):  # with a group it says that the data have other places
        KFACLinearOperator.of(changed)
    mine = GGNLinearOperator(p.model, p.loss, p.params, data, **group)
    return {
        "decomposed": kfac.decompose().inverse(damping=0.1).to_dense(),
        "refreshed": kfac.refresh(data, decay=0.5).to_dense(),
        "changed data": KFACLinearOperator.of(changed).to_dense(),
        "numbers of data": torch.tensor(list(reached.merge(other).state.data.values())),
        "ekfac trace": ekfac.trace().detach(),
        "layer": mine["0.*"].to_dense(),
        "off-diagonal": mine["0.*", "2.*"].to_dense(),
        "trace": mine.trace(num_products=6).detach().as_subclass(Tensor),
        "top": mine.eigenpairs(2).values,
        "solution": mine.solve(draws(p.dim), damping=0.1).x,
        "jacobian": jacobian.to_dense(),
        "J v": jacobian @ draws(jacobian.shape[1], 2),
        "Jᵀ u": jacobian.T @ draws(jacobian.shape[0], 2),
        "datum": jacobian.datum(4).to_dense(),
        "value": value,
        "gradient": gradient,
    }


def spread(p: Problem, group: Any) -> dict[str, Tensor]:
    """What processes that have all data compute together; without a group what one does."""
    op = HessianLinearOperator(p.model, p.loss, p.params, p.data())
    shared = op if group is None else SpreadOperator(op, group)
    with shared.linearized():
        kept = shared @ draws(p.dim, 5)
    return {
        "dense": shared.to_dense(),
        "columns": shared @ draws(p.dim, 5),
        "one": shared @ draws(p.dim),
        "kept": kept,
        "adjoint": draws(p.dim, 2).T @ shared,
        "layer": shared["0.*"].to_dense(),
        "trace": shared.trace(num_products=8).detach().as_subclass(Tensor),
        "top": shared.eigenpairs(2, block=2).values,
    }
