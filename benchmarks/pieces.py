"""Peak memory of a product whose batch is cut into pieces, for the rule in `curvops/products/pieces.py`.

    python benchmarks/pieces.py

For each model and matrix the growth of the peak with the data of a piece, as a multiple of what a forward pass saves of a
datum: `pieces.COPIES` must not be less. Each peak is that of a process of its own (Linux), above one without a product.
"""

from __future__ import annotations

import resource
import subprocess
import sys

import torch
from torch import Tensor, nn

from curvops import GGNLinearOperator, HessianLinearOperator
from curvops.products import pieces

KINDS = {"Hessian": HessianLinearOperator, "GGN": GGNLinearOperator}
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
    op = KINDS[kind](
        model,
        nn.CrossEntropyLoss(),
        dict(model.named_parameters()),
        [(X, y)],
        check_deterministic=False,
        memory_budget=budget,
    )
    with op.risk.evaluation():
        batch = next(op.risk.data.walk())
        saved = pieces._saved(op.risk, pieces._cut(batch, 0, pieces.FEW)) / pieces.FEW
        size = op._pieces(batch)[0].size
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    op @ torch.ones(op.shape[1])
    print(size, saved, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)


def main() -> None:
    print(f"{'':16}{'data of a piece':>18}{'peak, MB':>16}{'copies':>8}   (COPIES = {pieces.COPIES})")
    for name in ("cnn", "mlp", "encoder"):
        for kind in KINDS:
            found = []
            for budget in BUDGETS:
                command = [sys.executable, __file__, name, kind, str(budget)]
                out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                found.append([float(number) for number in out.split()])
            (small, saved, low), (large, _, high) = found
            copies = (high - low) / (large - small) / saved
            sizes, peaks = f"{small:.0f}, {large:.0f}", f"{low / 1e6:.0f}, {high / 1e6:.0f}"
            print(f"{name + ', ' + kind:16}{sizes:>18}{peaks:>16}{copies:8.1f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    peak(sys.argv[1], sys.argv[2], int(sys.argv[3])) if len(sys.argv) > 1 else main()
