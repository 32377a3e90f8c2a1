"""Inverses, powers, determinants, spectra and samples on the structure, against the dense matrix."""

import math
from functools import cache

import pytest
import torch
from torch import nn

import curvops.operators.blocks as blocks
from curvops import BlockRule, KFACLinearOperator
from kronecker.cases import PROBLEMS, build, close, real, seeded

KINDS = ("kfac", "ekfac", "kfoc", "diagonal")
CASES = [(kind, name) for kind in KINDS for name in PROBLEMS]


@cache  # operations leave an operator as it is
def operator(kind, name):
    return build(kind, PROBLEMS[name](), 4, 2)


@pytest.fixture(params=CASES, ids=lambda case: "-".join(case))
def op(request):
    return operator(*request.param)


def eye(op):
    return torch.eye(op.shape[0], dtype=torch.float64)


def test_dense_product_and_numbers(op):
    dense = op.to_dense()
    v = real(op.shape[0], 3, seed=9)
    close(op @ v, dense @ v)
    close(dense, dense.T)
    close(op.trace(), dense.trace())
    close(op.diagonal(), dense.diagonal())
    close(op.frobenius_norm(), dense.norm())
    close(op.eigenvalues(), torch.linalg.eigvalsh(dense))
    close(op.logdet(0.1), torch.logdet(dense + 0.1 * eye(op)), 1e-9)
    close(op.det(0.5), torch.det(dense + 0.5 * eye(op)), 1e-8)


@pytest.mark.parametrize("largest", [True, False])
def test_eigenpairs(op, largest):
    dense, k = op.to_dense(), 5
    values, vectors = op.eigenpairs(k, largest)
    every = torch.linalg.eigvalsh(dense)
    torch.testing.assert_close(values, every[-k:] if largest else every[:k], rtol=0, atol=1e-10 * float(every[-1]))
    torch.testing.assert_close(dense @ vectors, vectors * values, rtol=0, atol=1e-10 * float(every[-1]))
    close(vectors.T @ vectors, torch.eye(k, dtype=torch.float64))
    with pytest.raises(ValueError, match="expected a number from 1 to"):
        op.eigenpairs(0)


@pytest.mark.parametrize("exponent", [-1.0, -0.5, 0.5, 2.0])
def test_powers(op, exponent):
    values, vectors = torch.linalg.eigh(op.to_dense() + 0.3 * eye(op))
    close(op.power(exponent, 0.3).to_dense(), (vectors * values**exponent) @ vectors.T)


def test_exact_inverse(op):
    dense = op.to_dense()
    v = real(op.shape[0], 2, seed=3)
    for damping in (1e-3, 1.0):
        inverse = op.inverse(damping)
        close(inverse @ v, torch.linalg.solve(dense + damping * eye(op), v), 1e-9)
        close(inverse.to_dense(), torch.linalg.inv(dense + damping * eye(op)), 1e-9)
        assert inverse.psd and inverse.name == f"{op.name}^-1"
    close(op.inverse(1e-9, min_damping=0.2).to_dense(), op.inverse(0.2).to_dense())
    close(op.inverse(0.4, min_damping=0.2).to_dense(), op.inverse(0.4).to_dense())


def test_a_damping_for_each_parameter(op):
    dampings = {name: 0.1 * (k + 1) for k, name in enumerate(op.domain.names)}
    shifts = torch.cat(
        [torch.full((op.domain.shapes[n].numel(),), d, dtype=torch.float64) for n, d in dampings.items()]
    )
    close(op.inverse(dampings).to_dense(), torch.linalg.inv(op.to_dense() + torch.diag(shifts)))
    close(op.logdet(dampings), torch.logdet(op.to_dense() + torch.diag(shifts)))


def heuristic(op, damping, floor):
    """Martens & Grosse 2015, section 6.3, from dense factors."""
    result = torch.zeros(op.shape, dtype=torch.float64)
    for placed in op.blocks:
        block = placed.block
        groups, left, right = block.shape
        for g, where in enumerate(placed.positions.view(groups, -1)):
            if right == 1 or not hasattr(block, "left") or not isinstance(block, blocks.KroneckerBlock):
                own = op.to_dense()[where[:, None], where]
                inverse = torch.linalg.inv(own + max(damping, floor) * torch.eye(len(where), dtype=torch.float64))
            else:
                L, R = (torch.diag(f[g]) if f.ndim == 2 else f[g] for f in (block.left, block.right))
                pi = math.sqrt(float(L.trace() / left) / float(R.trace() / right))
                a, b = max(pi * math.sqrt(damping), floor), max(math.sqrt(damping) / pi, floor)
                inverse = torch.kron(_inverted(L, a), _inverted(R, b))
            result[where[:, None], where] = inverse
    return result


def _inverted(factor, shift):
    return torch.linalg.inv(factor + shift * torch.eye(len(factor), dtype=torch.float64))


@pytest.mark.parametrize(("damping", "floor"), [(1e-2, 0.0), (1e-4, 0.05), (0.0, 0.05)])
@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
def test_heuristic_inverse(kind, name, damping, floor):
    op = operator(kind, name)
    close(op.inverse(damping, "heuristic", floor).to_dense(), heuristic(op, damping, floor), 1e-9)


def test_several_dampings_share_one_decomposition_and_leave_the_factors(monkeypatch):
    op = build("kfac", PROBLEMS["mlp"]())
    before = [{name: t.clone() for name, t in placed.block.tensors.items()} for placed in op.blocks]
    dense, calls = op.to_dense(), []
    original = blocks.eigh
    monkeypatch.setattr(blocks, "eigh", lambda *a: calls.append(a) or original(*a))
    for damping in (1e-4, 1e-2, 1.0, dict.fromkeys(op.domain.names, 0.1)):
        op.inverse(damping)
        op.logdet(damping)
        op.power(-0.5, damping)
        op.sample(1, damping)
    op.eigenvalues()
    assert len(calls) == 2 * len(op.blocks)
    for placed, tensors in zip(op.blocks, before, strict=True):
        assert all(torch.equal(placed.block.tensors[name], t) for name, t in tensors.items())
    assert torch.equal(op.to_dense(), dense)


def overdetermined(**options):
    """Enough data that no block is singular."""
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)))
    return model, nn.MSELoss(), real(30, 3), real(30, 2)


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_without_damping(kind, separate):
    op = build(kind, overdetermined(), separate_weight_and_bias=separate)
    dense = op.to_dense()
    for how in ("exact", "heuristic"):
        close(op.inverse(kind=how).to_dense(), torch.linalg.inv(dense), 1e-8)
    close(op.logdet(), torch.logdet(dense), 1e-9)
    close(op.det(), torch.det(dense), 1e-8)


@pytest.mark.parametrize("how", ["exact", "heuristic"])
@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
def test_a_singular_block_is_named(kind, how):
    """Three data, and five inputs: the factor of the inputs has rank three, up to rounding."""
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)))
    op = build(kind, (model, nn.MSELoss(), real(3, 5), real(3, 2)))
    with pytest.raises(
        ValueError, match=r"block of '0\.weight': it is singular, so the power -1 does not exist\. Pass"
    ):
        op.inverse(kind=how)
    with pytest.raises(ValueError, match=r"block of '0\.weight': it is singular, so the power -0\.5"):
        op.sample(1, 0.0)
    assert op.logdet() == -math.inf and op.det() == 0.0
    assert torch.isfinite(op.inverse(1e-3, how).to_dense()).all()


def test_an_unused_parameter_is_an_exact_zero():
    problem = overdetermined()
    problem[0].register_parameter("unused", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    op = build("kfac", problem)
    where = op.domain.slice("unused")
    assert not op.to_dense()[where].any()
    with pytest.raises(ValueError, match="block of 'unused': it is singular"):
        op.inverse()
    close(op.inverse(0.5).to_dense()[where, where], 2 * torch.eye(2, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_samples_have_the_inverse_as_covariance(kind):
    op = build(kind, overdetermined())
    count = 20_000
    samples = op.sample(count, 0.1, torch.Generator().manual_seed(0))
    assert samples.shape == (op.shape[0], count)
    covariance = torch.linalg.inv(op.to_dense() + 0.1 * eye(op))
    found = samples @ samples.T / count
    # an entry's variance is (Σ_ii Σ_jj + Σ_ij²) / count; 5 standard errors over some 200 entries
    error = ((covariance.diagonal().outer(covariance.diagonal()) + covariance.square()) / count).sqrt()
    assert ((found - covariance).abs() < 5 * error).all()
    mean = samples.mean(1).abs() / (covariance.diagonal() / count).sqrt()
    assert (mean < 5).all()


def test_samples_follow_the_generator():
    op = build("kfac", overdetermined())
    a, b = (op.sample(2, 0.1, torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda op: op.inverse(-1.0), r"damping: expected a number ≥ 0, got -1\.0"),
        (lambda op: op.inverse(1.0, "approximate"), "kind: expected 'exact' or 'heuristic', got 'approximate'"),
        (lambda op: op.inverse(1.0, min_damping=-1), "min_damping: expected a number ≥ 0, got -1"),
        (lambda op: op.inverse({"0.weight": 1.0}), r"missing '0\.bias', '2\.weight', '2\.bias', unknown none"),
        (
            lambda op: op.inverse({"0.weight": 1.0, "0.bias": 2.0, "2.weight": 1.0, "2.bias": 1.0}),
            r"the block of '0\.weight', '0\.bias', got \[1\.0, 2\.0\]\. Give the parameters of a joint block",
        ),
        (lambda op: op.logdet(float("nan")), "damping: expected a number ≥ 0, got nan"),
    ],
)
def test_wrong_arguments(call, message):
    op = build("kfac", PROBLEMS["mlp"](), separate_weight_and_bias=False)
    with pytest.raises(ValueError, match=message):
        call(op)


def test_diagonal_factors():
    """The same operations where factors are kept as their diagonals."""
    op = build("kfac", PROBLEMS["mlp"](), rule=BlockRule(largest_factor=3))
    dense = op.to_dense()
    assert "diag" in str(op.explain())
    close(op.inverse(0.1).to_dense(), torch.linalg.inv(dense + 0.1 * eye(op)))
    close(op.inverse(0.1, "heuristic").to_dense(), heuristic(op, 0.1, 0.0))
    close(op.eigenvalues(), torch.linalg.eigvalsh(dense))
    close(op.frobenius_norm(), dense.norm())
    close(op.trace(), dense.trace())


def test_single_precision_accumulates_in_it():
    model, loss, X, y = PROBLEMS["mlp"]()
    op = KFACLinearOperator(model.float(), loss, dict(model.named_parameters()), [(X.float(), y)], fisher_type="type-2")
    reference = build("kfac", PROBLEMS["mlp"]())
    assert op.dtype == torch.float32
    close(op.to_dense().double(), reference.to_dense(), 1e-5)
    close(op.inverse(0.1).to_dense().double(), reference.inverse(0.1).to_dense(), 1e-5)
