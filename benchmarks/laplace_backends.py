"""Seconds of laplace-torch with our backend and with its own, on its examples and on a transformer.

Usage: python benchmarks/laplace_backends.py [--rounds 3]
Each row is a fit and the predictive of 20 inputs, each side in its turn, as medians after a first round. The data are those of
laplace-torch's examples: a sine with noise (regression), and images of 16 × 16 pixels on a small convolutional net,
with random images in place of the data set (classification). The last column is the marginal likelihood.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from copy import deepcopy

import torch
from laplace import Laplace
from laplace.curvature import AsdlGGN, BackPackGGN, CurvlinopsGGN
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from curvops.clients.laplace import CurvopsGGN

BACKENDS = (CurvopsGGN, CurvlinopsGGN, AsdlGGN, BackPackGGN)


class Transformer(nn.Module):
    """Two layers of attention over 16 words."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.words, self.head = nn.Embedding(50, 32), nn.Linear(32, 4)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, X: Tensor) -> Tensor:
        return self.head(self.encoder(self.words(X)).mean(1))


def regression() -> tuple[nn.Module, Tensor, Tensor]:
    X = torch.rand(150, 1) * 8
    return nn.Sequential(nn.Linear(1, 50), nn.Tanh(), nn.Linear(50, 1)), X, X.sin() + 0.3 * torch.randn(150, 1)


def classification() -> tuple[nn.Module, Tensor, Tensor]:
    layers = (nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 3), nn.ReLU(), nn.MaxPool2d(2))
    head = (nn.Flatten(), nn.Linear(64, 84), nn.ReLU(), nn.Linear(84, 10))
    return nn.Sequential(*layers, *head), torch.randn(200, 3, 16, 16), torch.randint(10, (200,))


def transformer() -> tuple[nn.Module, Tensor, Tensor]:
    return Transformer(), torch.randint(50, (200, 16)), torch.randint(4, (200,))


PROBLEMS: dict[str, tuple[Callable[[], tuple[nn.Module, Tensor, Tensor]], str, list[tuple[str, str]]]] = {
    "regression": (regression, "regression", [("all", "full"), ("all", "kron"), ("all", "diag")]),
    "classification": (classification, "classification", [("last_layer", "kron"), ("all", "kron"), ("all", "diag")]),
    "transformer": (transformer, "classification", [("all", "kron"), ("all", "diag")]),
}


def run(backend: type, model: nn.Module, X: Tensor, y: Tensor, likelihood: str, kind: tuple[str, str]) -> list[float]:
    """Seconds of a fit and of a predictive, and the marginal likelihood."""
    la = Laplace(deepcopy(model), likelihood, *kind, backend=backend, prior_precision=10.0)
    start = time.perf_counter()
    la.fit(DataLoader(TensorDataset(X, y), batch_size=100))
    middle = time.perf_counter()
    la(X[:20])
    return [middle - start, time.perf_counter() - middle, float(la.log_marginal_likelihood())]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--problems", default=",".join(PROBLEMS))
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    print(f"{'problem':<16}{'structure':<18}{'backend':<16}{'fit / s':>10}{'predict / s':>13}{'log evidence':>16}")
    for name in options.problems.split(","):
        make, likelihood, kinds = PROBLEMS[name]
        torch.manual_seed(0)
        problem = make()
        for kind in kinds:
            rounds: dict[str, list[list[float]]] = {}
            failures: dict[str, str] = {}
            for warm in range(-1, options.rounds):
                for backend in BACKENDS:
                    try:
                        if backend.__name__ not in failures:
                            found = run(backend, *problem, likelihood, kind)
                            rounds.setdefault(backend.__name__, []).extend([found] * (warm >= 0))
                    except Exception as error:  # what a backend cannot do is a result
                        failures[backend.__name__] = f"{type(error).__name__}: {str(error).splitlines()[0][:60]}"
            for backend in BACKENDS:
                title = f"{name:<16}{' '.join(kind):<18}{backend.__name__:<16}"
                if backend.__name__ in failures:
                    print(f"{title}  {failures[backend.__name__]}")
                else:
                    fit, predict, value = (statistics.median(c) for c in zip(*rounds[backend.__name__], strict=True))
                    print(f"{title}{fit:>10.3f}{predict:>13.3f}{value:>16.4f}", flush=True)


if __name__ == "__main__":
    main()
