"""Peak memory of products, and of KFAC, whose batch is cut into pieces.

For the rules in `curvops/products/pieces.py` and `curvops/kronecker/batches.py`.

    python benchmarks/pieces.py

For each model and matrix the growth of the peak with the data of a piece, as a multiple of what a forward pass saves of a
datum: each `COPIES` must not be less. Each peak is that of a process of its own (Linux), above one without a product, and
without the proof that pieces give what the whole gives, for which the whole goes through the model once without a graph.
"""

from __future__ import annotations

import resource
import subprocess
import sys

import torch
from torch import Tensor, nn

from curvops import EmpiricalRisk, GGNLinearOperator, HessianLinearOperator, KFACLinearOperator
from curvops.kronecker import batches
from curvops.products import pieces
from curvops.products.account import Account
from curvops.risk.data import cut_batch

KINDS = {"Hessian": HessianLinearOperator, "GGN": GGNLinearOperator, "KFAC": KFACLinearOperator}
BUDGETS = (50_000_000, 200_000_000)


class Encoder(nn.Module):
    """One layer of a transformer, with a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.TransformerEncoderLayer(64, 4, 128, 0.0, batch_first=True), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(1))


def problem(name: str) -> tuple[nn.Module, Tensor]:
    """A model and inputs that take some hundred megabytes."""
    torch.manual_seed(0)
    if name == "cnn":
        layers = [nn.Conv2d(3, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 16, 3, padding=1), nn.SiLU()]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 32 * 32, 10)), torch.rand(512, 3, 32, 32)
    if name == "mlp":
        layers = [nn.Linear(100, 512), nn.Tanh(), nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 10)]
        return nn.Sequential(*layers), torch.rand(32768, 100)
    return Encoder().eval(), torch.rand(2048, 32, 64)


def peak(name: str, kind: str, budget: int) -> None:
    """Print the data of a piece, the bytes that a forward pass saves of a datum, and the growth of the peak."""
    model, X = problem(name)
    y = torch.randint(10, (len(X),))
    pieces._mixing = lambda *_: ""
    risk = EmpiricalRisk(model, nn.CrossEntropyLoss(), dict(model.named_parameters()), [(X, y)])
    with risk.evaluation():
        batch = next(risk.data.walk())
        saved = pieces._saved(risk, cut_batch(batch, slice(pieces.FEW))) / pieces.FEW
        size = pieces.piece_size(risk, batch, budget, Account(), copies(kind))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    op = KINDS[kind].of(risk, memory_budget=budget)
    if kind != "KFAC":
        op @ torch.ones(op.shape[1])
    print(size, saved, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)


def copies(kind: str) -> int:
    """The rule's number."""
    return batches.COPIES if kind == "KFAC" else pieces.COPIES


def main() -> None:
    print(f"{'':16}{'data of a piece':>18}{'peak, MB':>16}{'copies':>8}{'COPIES':>8}")
    for name in ("cnn", "mlp", "encoder"):
        for kind in KINDS:
            found = []
            for budget in BUDGETS:
                command = [sys.executable, __file__, name, kind, str(budget)]
                out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                found.append([float(number) for number in out.split()])
            (small, saved, low), (large, _, high) = found
            seen = (high - low) / (large - small) / saved
            sizes, peaks = f"{small:.0f}, {large:.0f}", f"{low / 1e6:.0f}, {high / 1e6:.0f}"
            print(f"{name + ', ' + kind:16}{sizes:>18}{peaks:>16}{seen:8.1f}{copies(kind):8}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    peak(sys.argv[1], sys.argv[2], int(sys.argv[3])) if len(sys.argv) > 1 else main()
