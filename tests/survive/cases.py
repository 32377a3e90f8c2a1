"""Computations that are interrupted, and what counts their steps."""

import tempfile
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from curvops import (
    Checkpoint,
    EKFACLinearOperator,
    GGNDiagonalLinearOperator,
    KFACLinearOperator,
    KFOCLinearOperator,
)
from curvops.estimators import (
    Block,
    BlockNorms,
    Estimate,
    block_norms,
    by_group,
    diagonal,
    logdet,
    probes,
    squared_norm,
    trace,
)
from curvops.kronecker import batches
from curvops.spectrum import eigenpairs, spectral_density

Stop = Callable[[int], None]  # told the number of steps so far


class Loader:
    """Batches that tell their number, over all walks, before each of them."""

    def __init__(self, batches: list[Any], stop: Stop) -> None:
        self.batches, self.stop, self.count = batches, stop, 0

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            self.stop(self.count)
            self.count += 1
            yield batch


class Counted:
    """A matrix that tells the number of its products before each of them."""

    def __init__(self, matrix: Any, stop: Stop) -> None:
        self.matrix, self.stop, self.count = matrix, stop, 0
        self.shape, self.dtype, self.symmetric = matrix.shape, matrix.dtype, True

    def __matmul__(self, columns: Tensor) -> Tensor:
        self.stop(self.count)
        self.count += 1
        return self.matrix @ columns


def convolutional(alike: bool = False) -> tuple[nn.Module, Any, dict[str, Tensor], list[Any]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.GroupNorm(1, 3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 4))
        # batches of one size may go together; the last one is smaller, so that its operations are proved anew
        sizes = [7, 7 if alike else 6] * 6
        data = [(torch.randn(n, 2, 6, 6).double(), torch.randint(4, (n,))) for n in [*sizes[:-1], 3]]
    return model.double(), nn.CrossEntropyLoss(), dict(model.named_parameters()), data


def kronecker(cls: Any, alike: bool = False, **options: Any) -> Callable[..., dict[str, Tensor]]:
    def compute(stop: Stop, checkpoint: Checkpoint | None = None) -> dict[str, Tensor]:
        *problem, data = convolutional(alike)
        op = cls(*problem, Loader(data, stop), check_deterministic=False, checkpoint=checkpoint, **options)
        return {f"{k}.{name}": t for k, (_, entry) in enumerate(op.state.groups) for name, t in entry.tensors.items()}

    return compute


def in_whole_batches(compute: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    """The same with a budget for rows alone: passes count as nothing."""

    def whole(stop: Stop, checkpoint: Checkpoint | None = None) -> dict[str, Tensor]:
        with mock.patch.object(batches, "COPIES", 0):
            return compute(stop, checkpoint)

    return whole


def symmetric() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    basis = torch.linalg.qr(torch.randn(150, 150, generator=generator, dtype=torch.float64))[0]
    matrix = basis @ torch.linspace(-1, 2, 150, dtype=torch.float64).pow(3).diag() @ basis.T
    return (matrix + matrix.T) / 2


def spectral(call: Callable[..., Any], **options: Any) -> Callable[..., dict[str, Tensor]]:
    def compute(stop: Stop, checkpoint: Checkpoint | None = None) -> dict[str, Tensor]:
        found = call(Counted(symmetric(), stop), checkpoint=checkpoint, **options)
        names = ("values", "vectors", "residuals") if call is eigenpairs else ("nodes", "weights", "outliers")
        return {"products": torch.tensor(found.products), **{name: getattr(found, name) for name in names}}

    return compute


def estimated(call: Callable[..., Any], *given: Any, **options: Any) -> Callable[..., dict[str, Tensor]]:
    def compute(stop: Stop, checkpoint: Checkpoint | None = None) -> dict[str, Tensor]:
        matrix = Counted(symmetric()[:40, :40], stop)
        # a few columns at a time, as of long vectors
        with mock.patch.object(probes, "_COLUMNS", 4):
            found = call(matrix, *given, checkpoint=checkpoint, **options)
        if isinstance(found, BlockNorms):
            found = (found.squared, found.traces)
        elif isinstance(found, dict):
            found = [each for part in found.values() for each in (part if isinstance(part, Block) else [part])]
        several = [found] if isinstance(found, Estimate) else found
        named = {str(k): torch.stack([each, each.standard_error]) for k, each in enumerate(several)}
        return {"products": torch.tensor([each.products for each in several]), **named}

    return compute


# so that three of the batches that are alike go together, and not all rows are kept
JOINED = 4 * 3 * 7 * (3 * 4 * 4 + 4) * 8 + 4
LAYERS = {"first": slice(0, 15), "second": torch.arange(15, 36), "last": slice(36, 40)}
METRIC = torch.linspace(1, 2, 150, dtype=torch.float64).diag()
ESTIMATES = {
    "trace": estimated(trace, num_products=20),
    "trace of layers": estimated(trace, groups=LAYERS, method="hutchinson", num_products=20),
    "trace to a tolerance": estimated(trace, groups=LAYERS, method="hutch++", num_products=9, tolerance=0.25),
    "trace of all columns": estimated(trace, groups=LAYERS, num_products=12, tolerance=1e-9),
    "matrix diagonal": estimated(diagonal, num_products=9, tolerance=0.3),
    "matrix diagonal by signs": estimated(diagonal, method="hutchinson", num_products=9, tolerance=0.23),
    "squared norm": estimated(squared_norm, num_products=20),
    "layers": estimated(by_group, LAYERS, num_products=20),
    "logdet": estimated(logdet, damping=2.0, depth=3, num_products=9, tolerance=0.024),
    "block norms": estimated(block_norms, LAYERS, num_products=6, symmetric=True),
}
COMPUTATIONS: dict[str, Callable[..., dict[str, Tensor]]] = {
    "kfac": kronecker(KFACLinearOperator),
    "kfac joint": kronecker(KFACLinearOperator, separate_weight_and_bias=False, fisher_type="type-2"),
    "kfac reduce": kronecker(KFACLinearOperator, kfac_approx="reduce"),
    "kfac forward-only": kronecker(KFACLinearOperator, fisher_type="forward-only"),
    "kfac of joined batches": kronecker(KFACLinearOperator, alike=True, memory_budget=JOINED),
    "ekfac of joined batches": kronecker(EKFACLinearOperator, alike=True, memory_budget=JOINED),
    "ekfac": kronecker(EKFACLinearOperator, fisher_type="type-2"),
    "ekfac swept": kronecker(EKFACLinearOperator, memory_budget=0),
    "ekfac in files": in_whole_batches(kronecker(EKFACLinearOperator, memory_budget=3000, spill=tempfile.gettempdir())),
    "ekfac in pieces": kronecker(EKFACLinearOperator, fisher_type="type-2", memory_budget=30_000),
    "kfoc": kronecker(KFOCLinearOperator, memory_budget=0),
    "diagonal": kronecker(GGNDiagonalLinearOperator),
    "eigenpairs": spectral(eigenpairs, k=2, which="both"),
    "eigenpairs restarted": spectral(eigenpairs, k=2, which="smallest", subspace=9),
    "eigenpairs in blocks": spectral(eigenpairs, k=2, which="magnitude", block=2, basis_dtype=torch.float32),
    "eigenpairs in a metric": spectral(eigenpairs, k=2, metric=METRIC, metric_inverse=METRIC.inverse()),
    "eigenpairs stopped": spectral(eigenpairs, k=2, which="smallest", subspace=9, max_products=20),
    **ESTIMATES,
    "density": spectral(spectral_density, depth=10, num_vectors=3),
    "density in parts": spectral(spectral_density, depth=10, num_vectors=3, memory_budget=8 * 150 * 10),
}
# the step before which each is killed: of EKFAC on the second walk over 12 batches
STOPS = {"ekfac swept": 17, "trace of layers": 3, "eigenpairs": 31}


def differing(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """What is not the same to the bit."""
    names = found.keys() | expected.keys()
    return sorted(n for n in names if n not in found or n not in expected or not torch.equal(found[n], expected[n]))
