"""Small problems in double precision, and matrices that are known without this library."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from conformance import close
from oracles import Case, real
from torch import Tensor, nn

from curvops import EKFACLinearOperator, GGNDiagonalLinearOperator, KFACLinearOperator, KFOCLinearOperator

KINDS = {
    "kfac": KFACLinearOperator,
    "ekfac": EKFACLinearOperator,
    "kfoc": KFOCLinearOperator,
    "diagonal": GGNDiagonalLinearOperator,
}
FISHER_TYPES = ("type-2", "mc", "empirical", "forward-only")
APPROXIMATIONS = ("expand", "reduce")


class Net(nn.Module):
    """A model from a function ``(parts, X)`` and its parts: modules, parameters or constants."""

    def __init__(self, function: Callable[[Any, Any], Any], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)
        self.function = function

    def forward(self, X: Any) -> Any:
        return self.function(self, X)


def params(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def integers(high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def seeded(make: Callable[[], nn.Module], seed: int = 5) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return make().double()


def mlp() -> tuple[nn.Module, Any, Tensor, Tensor]:
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)))
    return model, nn.CrossEntropyLoss(), real(6, 3), integers(3, 6)


def cnn() -> tuple[nn.Module, Any, Tensor, Tensor]:
    def make() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(2, 4, 2, groups=2, padding=1), nn.Tanh(), nn.Conv2d(4, 2, 3), nn.Flatten(), nn.Linear(8, 2)
        )

    return seeded(make), nn.MSELoss(), real(6, 2, 3, 3), real(6, 2)


def tokens() -> tuple[nn.Module, Any, Tensor, Tensor]:
    """A language model in small: embedding, norm, a layer over positions; two loss terms a datum."""

    def make() -> nn.Module:
        return Net(
            lambda net, X: net.head(torch.tanh(net.hidden(net.norm(net.embedding(X))))).movedim(-1, 1),
            embedding=nn.Embedding(5, 3),
            norm=nn.LayerNorm(3),
            hidden=nn.Linear(3, 4),
            head=nn.Linear(4, 3),
        )

    y = integers(3, 6, 2, seed=3)
    y[1, 0] = -100
    return seeded(make), nn.CrossEntropyLoss(), integers(5, 6, 2), y


def tied() -> tuple[nn.Module, Any, Tensor, Tensor]:
    """An embedding that is the head as well, and a layer that is used twice."""

    def make() -> nn.Module:
        net = Net(
            lambda net, X: net.head(torch.tanh(net.twice(torch.tanh(net.twice(net.embedding(X)))))).movedim(-1, 1),
            embedding=nn.Embedding(5, 3),
            twice=nn.Linear(3, 3),
            head=nn.Linear(3, 5, bias=False),
        )
        net.head.weight = net.embedding.weight
        return net

    return seeded(make), nn.CrossEntropyLoss(reduction="sum"), integers(5, 6, 2), integers(5, 6, 2, seed=1)


def layers() -> tuple[nn.Module, Any, Tensor, Tensor]:
    """One layer of each kind that applies a matrix, and a free tensor."""

    def forward(net: Any, ids: Tensor) -> Tensor:
        h = net.convolution(net.linear(net.embedding(ids)).movedim(-1, 1))
        h = net.transposed(h.tanh()).movedim(1, -1)
        h = net.bilinear(h, h).unflatten(-1, (1, 3)).expand(-1, -1, 2, -1)
        return torch.einsum("nthc,hcd->nthd", h, net.free).sum(1).flatten(1)

    def make() -> nn.Module:
        return Net(
            forward,
            embedding=nn.Embedding(5, 4),
            linear=nn.Linear(4, 6),
            convolution=nn.Conv1d(6, 4, 2, stride=2, groups=2, padding=1),
            transposed=nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1, groups=2, padding=1, dilation=2),
            bilinear=nn.Bilinear(6, 6, 3),
            free=nn.Parameter(torch.randn(2, 3, 2)),
        )

    return seeded(make), nn.MSELoss(), integers(5, 6, 4), real(6, 4)


PROBLEMS = {"mlp": mlp, "cnn": cnn, "tokens": tokens, "tied": tied}


def build(kind: str, problem: tuple[nn.Module, Any, Any, Any], *sizes: int, make: str = "", **options: Any) -> Any:
    """An operator of a kind on a problem, its data in batches of some sizes."""
    model, loss, X, y = problem
    data = list(zip(X.split(sizes), y.split(sizes), strict=True)) if sizes else [(X, y)]
    options.setdefault("fisher_type", "type-2")
    cls = KINDS[kind]
    return (getattr(cls, make) if make else cls)(model, loss, params(model), data, **options)


def plan(kind: str, problem: tuple[nn.Module, Any, Any, Any], *sizes: int, **options: Any) -> Any:
    """What `build` would make."""
    return build(kind, problem, *sizes, make="plan", **options)


def dense_ggn(problem: tuple[nn.Module, Any, Any, Any], *sizes: int) -> Tensor:
    """The GGN of the risk, all of it dense and by PyTorch alone."""
    model, loss, X, y = problem
    data = list(zip(X.split(sizes), y.split(sizes), strict=True)) if sizes else [(X, y)]
    return Case(model, loss, data, params=params(model)).truth("GGN")


def masked(matrix: Tensor, op: Any) -> Tensor:
    """The matrix with zeros outside of the operator's blocks."""
    result = torch.zeros_like(matrix)
    for _, where, _ in blocks(op):
        result[where[:, None], where] = matrix[where[:, None], where]
    return result


def blocks(op: Any) -> Iterator[tuple[Any, Tensor, Tensor]]:
    """Each group of each block: where it is placed, the places of its rows, and its matrix."""
    for placed in op.blocks:
        dense, groups = placed.block.dense(), placed.positions.view(placed.block.shape[0], -1)
        for k, where in enumerate(groups):
            own = slice(k * len(where), (k + 1) * len(where))
            yield placed, where, dense[own, own]


def nearest_kronecker(matrix: Tensor, left: int, right: int) -> Tensor:
    """Van Loan & Pitsianis: rows are the entries of the left factor, columns those of the right one."""
    rearranged = matrix.view(left, right, left, right).permute(0, 2, 1, 3).reshape(left**2, right**2)
    u, s, v = torch.linalg.svd(rearranged, full_matrices=False)
    return torch.kron((u[:, 0] * s[0]).view(left, left), v[0].view(right, right))


def check(kind, op, matrix):
    """What an operator has in common with the GGN; and no block is zero that is not."""
    if kind == "diagonal":
        close(op.diagonal(), matrix.diagonal())
    elif kind == "ekfac":
        close(op.trace(), matrix.trace())
    for name in op.domain.names:
        where = op.domain.slice(name)
        assert bool(op.diagonal()[where].any()) == bool(matrix.diagonal()[where].any())
