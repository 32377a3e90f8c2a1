"""Products that conjugate gradients take on the damped GGN of a trained classifier, by preconditioner.

Usage: python benchmarks/solvers.py [--models softmax,mlp,cnn,transformer] [--damping 1e-1,1e-2,1e-3] [--steps 200] [--columns 1]
Classifiers are trained on scikit-learn's digits by Adam: softmax regression, an MLP with 16 hidden units, a CNN with one
convolution, and two layers of a transformer on the images' rows. The damping is relative to the GGN's mean eigenvalue, the right-hand side is the gradient (further columns are random), and
the residual asked for is 1e-6. "blocks" inverts the GGN's own diagonal blocks, the best that a block-diagonal
approximation can be.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from curvops import EKFACLinearOperator, GGNLinearOperator, KFACLinearOperator, TensorSpace
from curvops.solvers.cg import cg


class Transformer(nn.Module):
    """Two layers on the eight rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.layers, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, 10)
        self.places = nn.Parameter(0.1 * torch.randn(8, 8))

    def forward(self, X: Tensor) -> Tensor:
        return self.head(self.layers(X.view(-1, 8, 8) + self.places).mean(1))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "softmax": lambda: nn.Sequential(nn.Linear(64, 10)),
    "mlp": lambda: nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)),
    "cnn": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 10)
    ),
    "transformer": Transformer,
}


def trained(name: str, steps: int) -> tuple[nn.Module, nn.Module, dict[str, Tensor], list[tuple[Tensor, Tensor]]]:
    """The net after some steps, its loss, its parameters, and all digits in one batch."""
    torch.manual_seed(0)
    digits = load_digits()
    X, y = torch.tensor(digits.data / 16), torch.tensor(digits.target)
    model, loss = MODELS[name]().double(), nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(steps):
        batch = torch.randint(len(X), (128,))
        optimizer.zero_grad()
        loss(model(X[batch]), y[batch]).backward()
        optimizer.step()
    return model, loss, dict(model.named_parameters()), [(X, y)]


def blocks(dense: Tensor, space: TensorSpace, damping: float) -> Tensor:
    """The inverses of the damped diagonal blocks, one a parameter."""
    found = torch.zeros_like(dense)
    for where in map(space.slice, space.names):
        block = dense[where, where]
        found[where, where] = torch.linalg.inv(block + damping * torch.eye(len(block), dtype=block.dtype))
    return found


def preconditioners(kfac: Any, ekfac: Any, dense: Tensor, damping: float) -> dict[str, Any]:
    return {
        "none": None,
        "diagonal": 1 / (dense.diagonal() + damping),
        "KFAC exact": kfac.inverse(damping),
        "KFAC heuristic": kfac.inverse(damping, kind="heuristic"),
        "EKFAC exact": ekfac.inverse(damping),
        "blocks": blocks(dense, kfac.domain, damping),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--damping", default="1e-1,1e-2,1e-3")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--columns", type=int, default=1)
    arguments = parser.parse_args()
    for name in arguments.models.split(","):
        problem = trained(name, arguments.steps)
        ggn = GGNLinearOperator(*problem)
        gradient, dense = ggn.risk.value_and_gradient()[1], ggn.to_dense()
        others = torch.randn(len(dense), arguments.columns - 1, generator=torch.Generator().manual_seed(1)).to(dense)
        b, mean = torch.cat([gradient.unsqueeze(1), others], 1), float(dense.trace() / len(dense))
        condition = float(torch.linalg.eigvalsh(dense)[-1]) / mean
        kfac, ekfac = (c(*problem, fisher_type="type-2") for c in (KFACLinearOperator, EKFACLinearOperator))
        print(f"\n{name}: {len(dense)} parameters, largest / mean eigenvalue {condition:.0f}")
        print(f"{'δ / mean':>9}  {'preconditioner':<16} {'products':>8}  {'share':>6}  {'residual':>8}")
        for relative in map(float, arguments.damping.split(",")):
            plain = 0
            for kind, inverse in preconditioners(kfac, ekfac, dense, relative * mean).items():
                found = cg(dense, b, damping=relative * mean, preconditioner=inverse, max_iterations=5000)
                plain = plain or found.products
                share, residual = f"{found.products / plain:.0%}", float(found.residual.max())
                print(f"{relative:>9g}  {kind:<16} {found.products:>8}  {share:>6}  {residual:>8.1e}", flush=True)


if __name__ == "__main__":
    main()
