"""laplace-torch with our backend and with its own: seconds on its examples' problems and a transformer, numbers of its examples.

Usage: python benchmarks/laplace_backends.py [--rounds 3]
       python benchmarks/laplace_backends.py --examples PATH_OF_ITS_REPOSITORY [--names regression,…]
Each row is a fit and the predictive of 20 inputs, each side in its turn, as medians after a first round. The data are those of
laplace-torch's examples: a sine with noise (regression), and images of 16 × 16 pixels on a small convolutional net,
with random images in place of the data set (classification). The last column is the marginal likelihood.

With ``--examples`` the scripts of its repository run as they are, in double precision, once with each backend in the place of
the one that they name. What their posteriors answer (means, variances, probabilities, samples, with the log marginal
likelihood at that moment) is compared, each answer by its largest entry. Stand-ins: random images for CIFAR-10, initial weights for the trained ones, the CPU for the GPU.
"""

from __future__ import annotations

import argparse
import inspect
import io
import os
import runpy
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from laplace import Laplace
from laplace.baselaplace import BaseLaplace, ParametricLaplace
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


class Rows:
    """What is used of Hugging Face's data sets: rows as dicts, changed one by one, and columns as tensors."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    @classmethod
    def from_list(cls, rows: list[dict[str, Any]]) -> Rows:
        return cls(rows)

    def map(self, change: Callable[[dict[str, Any]], dict[str, Any]], **_: Any) -> Rows:
        return Rows([change(dict(row)) for row in self.rows])

    def set_format(self, **_: Any) -> None:
        pass

    def __getitem__(self, column: str) -> Tensor:
        return torch.stack([torch.as_tensor(row[column]) for row in self.rows])


def stand_ins(folder: Path) -> None:
    """For good: random images for CIFAR-10, initial weights for the trained ones, the CPU for the GPU, no figures."""
    images = {train: TensorDataset(torch.randn(32, 3, 32, 32), torch.randint(10, (32,))) for train in (True, False)}
    sys.path.insert(0, str(folder))
    metrics = SimpleNamespace(ECE=lambda bins: SimpleNamespace(measure=lambda *_: 0.0))
    sys.modules.update({"netcal": MagicMock(), "netcal.metrics": metrics, "datasets": SimpleNamespace(Dataset=Rows)})
    sys.modules["torchvision"] = MagicMock()
    from helper import dataloaders, util  # of the examples

    del sys.modules["torchvision"]  # that of others is asked for its version
    dataloaders.CIFAR10 = lambda train: DataLoader(images[train], batch_size=16)
    util.download_pretrained_model = util.plot_regression = lambda *_, **__: None
    Tensor.cuda = nn.Module.cuda = lambda self, *_: self
    load, begin = torch.load, nn.Module.load_state_dict
    torch.load = lambda path, **options: load(path, **options) if Path(path).exists() else {}
    nn.Module.load_state_dict = lambda self, state, *rest: begin(self, state, *rest) if state else None


def answers(script: Path, backend: type) -> list[Tensor]:
    """What the posteriors of a script answer while it runs, each with the log marginal likelihood at that moment."""
    found: list[Tensor] = []
    begin, names = BaseLaplace.__init__, inspect.signature(BaseLaplace.__init__)

    def chosen(self: Any, *args: Any, **options: Any) -> None:
        bound = names.bind(self, *args, **options)
        bound.arguments["backend"] = backend
        begin(*bound.args, **bound.kwargs)

    def recorded(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **options: Any) -> Any:
            answer = method(self, *args, **options)
            parts = answer if isinstance(answer, tuple) else (answer,)
            found.extend(part.detach() for part in (*parts, self.log_marginal_likelihood()))
            return answer

        return call

    with TemporaryDirectory() as place, ExitStack() as stack:
        stack.enter_context(patch.object(BaseLaplace, "__init__", chosen))
        for name in ("__call__", "functional_samples"):
            method = recorded(getattr(ParametricLaplace, name))
            stack.enter_context(patch.object(ParametricLaplace, name, method))
        stack.enter_context(redirect_stdout(io.StringIO()))
        os.chdir(place)
        try:
            runpy.run_path(str(script), run_name="__main__")
        finally:
            os.chdir("/")
    return found


def examples(repository: Path, names: list[str]) -> None:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    stand_ins(repository / "examples")
    print(f"{'example':<20}{'backend':<16}{'seconds':>9}{'last log evidence':>19}  each answer's distance from ours")
    for name in names:
        ours: list[Tensor] = []
        for backend in BACKENDS:
            begin, title = time.perf_counter(), f"{name:<20}{backend.__name__:<16}"
            try:
                found = answers(repository / "examples" / f"{name}_example.py", backend)
            except Exception as error:  # what a backend cannot do is a result
                print(f"{title}  {type(error).__name__}: {str(error).splitlines()[0][:60]}", flush=True)
                continue
            ours = ours or found
            apart = [(a - b).abs().max() / b.abs().max() for a, b in zip(found, ours, strict=True)]
            seconds = time.perf_counter() - begin
            distances = " ".join(f"{float(each):.0e}" for each in apart)
            print(f"{title}{seconds:>9.1f}{float(found[-1]):>19.8f}  {distances}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--problems", default=",".join(PROBLEMS))
    parser.add_argument("--examples", type=Path, help="a checkout of laplace-torch's repository")
    parser.add_argument("--names", default="expectation,reward_modeling,calibration,regression")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    if options.examples is not None:
        examples(options.examples.resolve(), options.names.split(","))
        return
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
