"""Under the caller's autocast models run in it, and our own algebra, bit for bit, without it."""

import pytest
import torch
from torch import nn

from curvops import (
    DiagonalOperator,
    EKFACLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    KFACLinearOperator,
    LowRankPlusDiagonalOperator,
    OuterProductOperator,
    block_diagonal,
    estimators,
    kronecker_product,
    solvers,
    spectrum,
)
from curvops.plots import Landscape

D = 24


@pytest.fixture(autouse=True)
def _single_precision(_double_precision):
    torch.set_default_dtype(torch.float32)  # which autocast lowers; double it leaves alone


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def psd(n, seed=0):
    root = draws(n, n, seed=seed)
    return root @ root.T / n + 0.1 * torch.eye(n, dtype=torch.float32)


def network(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    data = [(draws(6, 3), draws(6, 2, seed=1))]
    return kind(model, nn.MSELoss(), dict(model.named_parameters()), data)


STRUCTURES = {
    "low rank": lambda: LowRankPlusDiagonalOperator(draws(D, 3), draws(D, seed=1).abs() + 0.5),
    "indefinite": lambda: LowRankPlusDiagonalOperator(draws(D, 3), 2.0, torch.tensor([1.0, -0.2, 1.0])),
    "outer": lambda: OuterProductOperator(draws(D, 3)),
    "kronecker": lambda: kronecker_product(psd(4), psd(6, 1)),
    "blocks": lambda: block_diagonal({"a": psd(5), "b": (psd(2), psd(3))}),
    "diagonal": lambda: DiagonalOperator(draws(D).abs() + 1),
    "kfac": lambda: network(KFACLinearOperator),
    "ekfac": lambda: network(EKFACLinearOperator),
    "slice": lambda: network(KFACLinearOperator)["0.*"],
    "sum": lambda: kronecker_product(psd(4), psd(6, 1)) + kronecker_product(psd(4, 2), psd(6, 3)),
}
ASKED = {
    "product": lambda op: op @ draws(op.shape[1], 2),
    "left product": lambda op: draws(2, op.shape[0]) @ op,
    "dense": lambda op: op.to_dense(),
    "trace": lambda op: op.trace() + 0.0,
    "diagonal": lambda op: op.diagonal() + 0.0,
    "norm": lambda op: op.frobenius_norm() + 0.0,
    "logdet": lambda op: op.logdet(10.0) + 0.0,
    "eigenpairs": lambda op: op.eigenpairs(2).vectors,
    "solve": lambda op: op.solve(draws(op.shape[0]), 10.0).x,
    "inverse": lambda op: op.inverse(10.0) @ draws(op.shape[0]),
    "block norms": lambda op: op.block_norms("tensors").norms + 0.0,
}


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_structured_operators(structure, asked):
    make, ask = STRUCTURES[structure], ASKED[asked]
    expected, op = ask(make()), make()
    with torch.autocast("cpu", torch.bfloat16):
        found = ask(op)
        assert torch.is_autocast_enabled("cpu")
    assert found.dtype == expected.dtype and torch.equal(found, expected)


@pytest.mark.parametrize("kind", [KFACLinearOperator, EKFACLinearOperator])
def test_samples_and_powers(kind):
    asked = (
        lambda op: op.sample(3, 0.1, torch.Generator().manual_seed(0)),
        lambda op: op.power(-0.5, 0.1).to_dense(),
        lambda op: op.eigenvalues(),
        lambda op: op.inverse(0.1, kind="heuristic").to_dense(),
    )
    for ask in asked:
        expected, op = ask(network(kind)), network(kind)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(ask(op), expected)


CLOSE = torch.linalg.inv(psd(80))
MATRICES = {
    "trace": lambda A: estimators.trace(A, num_products=12),
    "hutch++": lambda A: estimators.trace(A, num_products=12, method="hutch++"),
    "diagonal": lambda A: estimators.diagonal(A, num_products=12),
    "norm": lambda A: estimators.squared_norm(A, num_products=12),
    "logdet": lambda A: estimators.logdet(A, num_products=12, depth=6),
    "eigenpairs": lambda A: spectrum.eigenpairs(A, 2).vectors,
    "density": lambda A: spectrum.spectral_density(A, depth=8, num_vectors=2).nodes,
    **{name: lambda A, s=s: s(A, draws(80, 2)).x for name, s in solvers.SOLVERS.items() if name != "neumann"},
    "preconditioned": lambda A: solvers.cg(A, draws(80, 2), preconditioner=CLOSE).x,
}


@pytest.mark.parametrize("name", MATRICES)
def test_tensors_as_matrices(name):
    matrix = psd(80)
    expected = MATRICES[name](matrix)
    with torch.autocast("cpu", torch.bfloat16):
        found = MATRICES[name](matrix)
    assert torch.equal(found + 0.0, expected + 0.0)


class Watching:
    """A matrix of the caller's, which sees in what state it is multiplied."""

    symmetric = psd = True

    def __init__(self, dense):
        self.dense, self.shape, self.dtype, self.seen = dense, dense.shape, dense.dtype, set()

    def __matmul__(self, columns):
        self.seen.add((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        return (self.dense @ columns).float()

    T = property(lambda self: self)


@pytest.mark.parametrize("name", MATRICES)
def test_foreign_matrices_are_in_the_caller_s_state(name):
    matrix = Watching(2 * torch.eye(80))
    with torch.autocast("cpu", torch.bfloat16):
        MATRICES[name](matrix)
        assert torch.is_autocast_enabled("cpu")
    assert matrix.seen == {(True, torch.bfloat16)}
    matrix.seen.clear()
    MATRICES[name](matrix)
    assert matrix.seen == {(False, torch.get_autocast_dtype("cpu"))}


@pytest.mark.parametrize("kind", [HessianLinearOperator, GGNLinearOperator])
def test_models_run_in_it_whoever_asks(kind):
    op, seen = network(kind), set()
    asked = {
        "product": lambda: op @ torch.ones(26),
        "dense": op.to_dense,
        "trace": lambda: op.trace(num_products=6),
        "block norms": lambda: op.block_norms("tensors"),
        "solve": lambda: op.solve(torch.ones(26), 10.0),
        "norm": lambda: estimators.squared_norm(op, num_products=6),
        "damped": lambda: op.damped(1.0) @ torch.ones(26),
        "inverse": lambda: op.inverse(10.0, tolerance=0.5) @ torch.ones(26),
        "landscape": lambda: Landscape(op, [torch.ones(26)]).losses(torch.ones(1, 1)),
    }
    (layer,) = [module for module in op.risk.model.modules() if getattr(module, "out_features", None) == 2]
    layer.register_forward_hook(lambda _, __, out: seen.add(out.dtype))
    for name, ask in asked.items():
        with torch.autocast("cpu", torch.bfloat16):
            ask()
        assert torch.bfloat16 in seen, name
        seen.clear()
        ask()
        assert seen == {torch.float32}, name
        seen.clear()
