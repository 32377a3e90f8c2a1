"""The table of layers and operators in docs/support.md: run each, and write what came of it.

Usage: python tests/kronecker/support.py [--write]
Without an option it says whether the committed table is what the library does; exit status 1 if not.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # where it is run as a script

import torch
import torch.nn.functional as F
from oracles import Case, slopes
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from curvops import (
    EFLinearOperator,
    EKFACLinearOperator,
    GGNDiagonalLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    KFACLinearOperator,
    KFOCLinearOperator,
)
from kronecker.cases import Net

FILE = Path(__file__).parents[2] / "docs" / "support.md"
WHOLE = {"Hessian": HessianLinearOperator, "GGN": GGNLinearOperator, "EF": EFLinearOperator}
BLOCKS = {
    "KFAC": KFACLinearOperator,
    "EKFAC": EKFACLinearOperator,
    "KFOC": KFOCLinearOperator,
    "GGN diagonal": GGNDiagonalLinearOperator,
}
HEAD = """# Layers and operators

Written by the tests: `python tests/kronecker/support.py --write` runs each operator on a small model with each layer,
compares the Hessian with central differences of the gradient, GGN and EF with products of Jacobians and of gradients and the blocks with
the GGN's. What a cell says of a block is
what `explain()` says; *exact* stands where it equals the GGN's block (of one group; its diagonal for the last column) within
1e-8 on these data, and *trace* where it has its trace. Sizes are those of the example. Weight and bias have a block
each, unless `separate_weight_and_bias=False`.

"""


def free() -> nn.Module:
    """Parameters that enter by arithmetic."""
    parts = {"free": nn.Parameter(torch.randn(3)), "scalar": nn.Parameter(torch.tensor(0.7))}
    return Net(lambda net, x: (x * net.scalar + net.free).sin(), **parts)


def unused() -> nn.Module:
    """A layer with a parameter that nothing uses."""
    layer = nn.Linear(3, 2)
    layer.register_parameter("unused", nn.Parameter(torch.randn(4)))
    return layer


def once(layer: Any, X: Any) -> Tensor:
    return layer(X)


def twice(layer: Any, X: Tensor) -> Tensor:
    return layer(torch.tanh(layer(X)))


def tied(layer: Any, X: Tensor) -> Tensor:
    return F.linear(torch.tanh(layer(X)), layer.weight)


@dataclass(frozen=True)
class Row:
    """A kind of layer: its title, how it is made and applied, and its input."""

    title: str
    make: Callable[[], nn.Module]
    X: Callable[[], Tensor]
    apply: Callable[[Any, Any], Tensor] = once


def real(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(4, *shape, dtype=torch.float64)


def ids(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(5, (4, *shape))


ROWS = [
    Row("`Linear`", lambda: nn.Linear(3, 2), real(3)),
    Row("`Linear` over positions", lambda: nn.Linear(3, 2), real(2, 3)),
    Row("`Linear`, used twice", lambda: nn.Linear(3, 3), real(3), twice),
    Row("`Bilinear`", lambda: nn.Bilinear(3, 3, 2), real(3), lambda layer, X: layer(X, X.flip(1))),
    Row("`Conv1d`", lambda: nn.Conv1d(2, 3, 2, padding="same", padding_mode="circular"), real(2, 3)),
    Row("`Conv2d`", lambda: nn.Conv2d(2, 3, 2, stride=2), real(2, 4, 4)),
    Row("`Conv2d`, grouped", lambda: nn.Conv2d(4, 2, 2, groups=2), real(4, 3, 3)),
    Row("`Conv2d`, depthwise", lambda: nn.Conv2d(3, 3, 2, groups=3), real(3, 3, 3)),
    Row("`Conv3d`", lambda: nn.Conv3d(1, 2, 2), real(1, 3, 2, 2)),
    Row("`ConvTranspose2d`", lambda: nn.ConvTranspose2d(2, 2, 2, stride=2), real(2, 2, 2)),
    Row("`Embedding`", lambda: nn.Embedding(5, 3), ids(2)),
    Row("`Embedding`, tied to the head", lambda: nn.Embedding(5, 3), ids(2), tied),
    Row("`EmbeddingBag`", lambda: nn.EmbeddingBag(5, 3), ids(2)),
    Row("`LayerNorm`", lambda: nn.LayerNorm(3), real(2, 3)),
    Row("`RMSNorm`", lambda: nn.RMSNorm(3), real(2, 3)),
    Row("`GroupNorm`", lambda: nn.GroupNorm(2, 4), real(4, 3)),
    Row("`BatchNorm1d` in eval mode", lambda: nn.BatchNorm1d(3).eval(), real(3)),
    Row("`BatchNorm1d` in train mode", lambda: nn.BatchNorm1d(3), real(3)),
    Row("`InstanceNorm1d`", lambda: nn.InstanceNorm1d(3, affine=True), real(3, 4)),
    Row(
        "`MultiheadAttention`",
        lambda: nn.MultiheadAttention(4, 2, batch_first=True),
        real(3, 4),
        lambda layer, X: layer(X, X, X, need_weights=False)[0],
    ),
    Row(
        "`MultiheadAttention`, sequence first",
        lambda: nn.MultiheadAttention(4, 2),
        real(3, 4),
        lambda layer, X: layer(*[X.movedim(1, 0)] * 3, need_weights=False)[0].movedim(0, 1),
    ),
    Row("`RNN`", lambda: nn.RNN(2, 3, batch_first=True), real(3, 2), lambda layer, X: layer(X)[0]),
    Row("`LSTM`", lambda: nn.LSTM(2, 2, batch_first=True), real(3, 2), lambda layer, X: layer(X)[0]),
    Row("`GRU`", lambda: nn.GRU(2, 2, batch_first=True), real(3, 2), lambda layer, X: layer(X)[0]),
    Row("`PReLU`", lambda: nn.PReLU(), real(3)),
    Row("weight norm", lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), real(3)),
    Row("free parameters, scalars", free, real(3)),
    Row("unused parameters", unused, real(3)),
]


def problem(row: Row) -> tuple[nn.Module, Any, dict[str, Tensor], list[Any]]:
    """The row's layer before a head of two outputs, and its data, always the same."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lazy modules warn that they are new
        torch.default_generator.manual_seed(0)
        layer, X, y = row.make(), row.X(), torch.randint(2, (4,))
        model: nn.Module = Net(
            lambda net, X: net.head(torch.tanh(row.apply(net.layer, X)).flatten(1)), layer=layer, head=nn.LazyLinear(2)
        )
        model = model.double()
        with torch.no_grad():
            model(X)  # the head learns its width
        return model, nn.CrossEntropyLoss(), dict(model.named_parameters()), [(X, y)]


def exact(model: nn.Module, loss: Any, params: dict[str, Tensor], data: list[Any]) -> dict[str, Tensor]:
    """GGN and EF by first derivatives, the Hessian by central differences of the gradient: no rule of second order."""
    ((X, y),), leaves = data, list(params.values())

    def gradient(k: int, step: float) -> Tensor:
        values = parameters_to_vector(leaves).detach()
        vector_to_parameters(values.index_add(0, torch.tensor([k]), values.new_tensor([step])), leaves)
        slope = slopes(loss(model(X), y), leaves)
        vector_to_parameters(values, leaves)
        return slope

    H = [(gradient(k, 1e-5) - gradient(k, -1e-5)) / 2e-5 for k in range(sum(p.numel() for p in leaves))]
    case = Case(model, loss, data, params=params)
    return {"Hessian": torch.stack(H), "GGN": case.truth("GGN"), "EF": case.truth("EF")}


def close(a: Tensor, b: Tensor, tolerance: float = 1e-8) -> bool:
    return bool((a - b).abs().max() <= tolerance * max(float(b.abs().max()), 1e-3))


def cells(row: Row) -> list[str]:
    """What came of a row, by operator."""
    model, loss, params, data = problem(row)
    expected = exact(model, loss, params, data)
    found = []
    for name, make in WHOLE.items():
        dense = make(model, loss, params, data, check_deterministic=False).to_dense()
        found.append("exact" if close(dense, expected[name], 1e-6) else "WRONG")
    for operator, make in BLOCKS.items():
        op = make(model, loss, params, data, fisher_type="type-2", check_deterministic=False)
        parts = []
        for explained, placed in zip(op.explain().rows, op.blocks, strict=True):
            if explained.names[0].startswith("head."):
                continue
            block = expected["GGN"][placed.positions[:, None], placed.positions]
            groups = placed.block.shape[0]
            block = block * torch.block_diag(*[torch.ones(len(block) // groups, len(block) // groups)] * groups)
            if operator == "GGN diagonal":
                block = torch.diag(block.diagonal())
            label = explained.block
            if close(placed.block.dense(), block):
                label += " *exact*"
            elif abs(float(placed.block.diagonal().sum() - block.trace())) <= 1e-8 * float(block.trace()):
                label += " *trace*"
            names = ", ".join(name.removeprefix("layer.") for name in explained.names)
            parts.append(f"{names}: {label}")
        found.append("<br>".join(parts))
    return found


def table() -> str:
    """The page."""
    titles = ["layer", *WHOLE, *BLOCKS]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    lines += ["| " + " | ".join([row.title, *cells(row)]) + " |" for row in ROWS]
    return HEAD + "\n".join(lines) + "\n"


def main() -> int:
    """Compare, or write."""
    page = table()
    if "--write" in sys.argv[1:]:
        FILE.write_text(page, encoding="utf-8")
        return 0
    return 0 if FILE.read_text(encoding="utf-8") == page else 1


if __name__ == "__main__":
    sys.exit(main())
