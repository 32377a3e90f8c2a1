"""Inverses, powers, determinants, spectra and samples on the structure, against the dense matrix."""

import copy
import math
import pickle
from functools import cache

import pytest
import torch
from torch import nn

import curvops.operators.blocks as blocks
from curvops import BlockRule, KFACLinearOperator, TensorSpace
from curvops.operators.block_diagonal import Placed, StructuredOperator
from curvops.operators.places import Places
from kronecker.cases import PROBLEMS, build, close, real, seeded

KINDS = ("kfac", "ekfac", "kfoc", "diagonal")
DIAGONALS = "mlp with diagonal factors"
CASES = [(kind, name) for kind in KINDS for name in PROBLEMS] + [("kfac", DIAGONALS)]


@cache  # operations leave an operator as it is
def operator(kind, name):
    if name != DIAGONALS:
        return build(kind, PROBLEMS[name](), 4, 2)
    op = build(kind, PROBLEMS["mlp"](), rule=BlockRule(largest_factor=3))
    assert "diag" in str(op.explain())
    return op


@pytest.fixture(params=CASES, ids="-".join)
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


@pytest.mark.parametrize("which", ["largest", "smallest", "both", "magnitude"])
def test_eigenpairs(op, which):
    dense, k = op.to_dense(), 5
    pairs = op.eigenpairs(k, which)
    values, vectors = pairs
    every = torch.linalg.eigvalsh(dense)
    ends = {"smallest": every[:k], "both": torch.cat([every[:k], every[-k:]])}
    expected = ends.get(which, every[-k:])  # psd: the largest are the largest in magnitude
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-10 * float(every[-1]))
    torch.testing.assert_close(dense @ vectors, vectors * values, rtol=0, atol=1e-10 * float(every[-1]))
    close(vectors.T @ vectors, torch.eye(len(expected), dtype=torch.float64))
    assert pairs.products == 0 and pairs.named(0).keys() == op.domain.shapes.keys()
    with pytest.raises(ValueError, match="expected an integer from 1 to"):
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
    shifts = torch.tensor([*dampings.values()], dtype=torch.float64)
    damped = op.to_dense() + torch.diag(shifts.repeat_interleave(torch.tensor(op.domain.sizes)))
    close(op.inverse(dampings).to_dense(), torch.linalg.inv(damped))
    close(op.logdet(dampings), torch.logdet(damped))


def heuristic(op, damping, floor):
    """Martens & Grosse 2015, section 6.3, from dense factors."""
    result = torch.zeros(op.shape, dtype=torch.float64)
    for placed in op.blocks:
        block = placed.block
        groups, left, right = block.shape
        for g, where in enumerate(placed.positions.view(groups, -1)):
            if right == 1 or not isinstance(block, blocks.KroneckerBlock):
                inverse = _inverted(op.to_dense()[where[:, None], where], max(damping, floor))
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
@pytest.mark.parametrize("case", [case for case in CASES if "kfac" in case[0]], ids="-".join)
def test_heuristic_inverse(case, damping, floor):
    op = operator(*case)
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
    assert len(calls) == len({id(t) for placed in op.blocks for t in placed.block.tensors.values()})
    for placed, tensors in zip(op.blocks, before, strict=True):
        assert all(torch.equal(placed.block.tensors[name], t) for name, t in tensors.items())
    assert torch.equal(op.to_dense(), dense)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda op: pickle.loads(pickle.dumps(op))], ids=["copy", "pickle"])
@pytest.mark.parametrize("kind", KINDS)
def test_copies(kind, copied):
    op = operator(kind, "tokens")
    for each in (op.inverse(0.1), op.inverse(0.1, "heuristic"), 2 * op.power(0.5) - op.inverse(0.1)):
        found = copied(each)
        assert found.name == each.name and torch.equal(found.to_dense(), each.to_dense())


def overdetermined():
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
    with pytest.raises(ValueError, match=r"of '0\.weight': it is singular, so the power -1 does not exist\. Pass"):
        op.inverse(kind=how)
    with pytest.raises(ValueError, match=r"block of '0\.weight': it is singular, so the power -0\.5"):
        op.sample(1, 0.0)
    assert op.logdet() == -math.inf and op.det() == 0.0
    assert torch.isfinite(op.inverse(1e-3, how).to_dense()).all()


def structured(left, right):
    """An operator of one block."""
    block = blocks.KroneckerBlock(left, right)
    placed = Placed(("w0",), Places(slice(0, block.size), left.device), block)
    return StructuredOperator(TensorSpace({"w0": torch.zeros(block.size, dtype=left.dtype)}), [placed], "structured")


def gram(n, rows, kind, dtype=torch.float64, seed=0):
    """The moment of some rows, singular where they are fewer than n."""
    a = real(2, rows, n, seed=seed).to(dtype)
    if kind == "positive":
        a = a.relu() + 0.1
    elif kind == "scaled":
        a = a * torch.logspace(0, -3, n, dtype=dtype)
    return a.mT @ a / rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["normal", "positive", "scaled"])
@pytest.mark.parametrize("n", [2, 3, 7, 30, 100])
def test_factors_of_few_data_are_singular(n, kind, dtype):
    """Rounding often leaves them positive definite, so that a Cholesky factorisation succeeds."""
    one = torch.ones(2, 1, 1, dtype=dtype)
    for rows in {1, n // 2, n - 1} - {0}:
        for seed in range(20):
            op = structured(gram(n, rows, kind, dtype, seed), one)
            for how in ("exact", "heuristic"):
                with pytest.raises(ValueError, match="block of 'w0': it is singular, so the power -1 does not exist"):
                    op.inverse(kind=how)


@pytest.mark.parametrize("condition", [10.0, 1e6, 1e11, 1e14])
@pytest.mark.parametrize("n", [2, 3, 30])
def test_a_positive_definite_factor_has_an_inverse(n, condition):
    """Well-conditioned or not: with eigenvalues that are known beforehand."""
    basis = torch.linalg.qr(real(2, n, n))[0]
    values = torch.logspace(0, -math.log10(condition), n, dtype=torch.float64)
    factor = (basis * values) @ basis.mT
    op = structured(factor, torch.eye(2, dtype=torch.float64).expand(2, 2, 2))
    inverse = op.inverse()
    expected = torch.block_diag(*(torch.kron(b, torch.eye(2)) for b in (basis / values) @ basis.mT))
    close(inverse.to_dense(), expected, 1e-15 * n * condition + 1e-12)
    for found, sign in ((op.logdet(), 1), (inverse.logdet(), -1)):
        close(found, sign * 4 * values.log().sum(), 1e-16 * condition + 1e-10)


@pytest.mark.parametrize("damping", [0.0, 1e-2])
def test_no_eigendecomposition_where_none_is_needed(monkeypatch, damping):
    op = build("kfac", overdetermined())
    dense = op.to_dense()
    expected = heuristic(op, damping, 0.0)
    monkeypatch.setattr(blocks, "eigh", None)
    inverse = op.inverse(damping, "heuristic")
    close(inverse.to_dense(), expected, 1e-9)
    if damping == 0:
        close(op.inverse().to_dense(), torch.linalg.inv(dense), 1e-9)
    monkeypatch.undo()
    assert all(isinstance(placed.block, blocks.KroneckerBlock) for placed in inverse.blocks)
    close(inverse.trace(), expected.trace())
    close(inverse.logdet(), torch.logdet(expected), 1e-9)
    close(inverse.eigenvalues(), torch.linalg.eigvalsh(expected), 1e-9)
    close(inverse.inverse().to_dense(), torch.linalg.inv(expected), 1e-9)


@pytest.mark.parametrize("damping", [1e-30, 1e-17, 1e-10, math.inf])
def test_a_heuristic_damping_beyond_rounding(damping):
    """It bounds the inverse by 1 / damping, whatever rounding made of the factor's zeros."""
    op = structured(gram(20, 5, "normal"), torch.ones(2, 1, 1, dtype=torch.float64))
    values = op.inverse(damping, "heuristic").eigenvalues()
    assert torch.isfinite(values).all() and values.max() <= 1.001 / damping and values.min() >= 0


def test_an_unused_parameter_is_an_exact_zero():
    problem = overdetermined()
    problem[0].register_parameter("unused", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    op = build("kfac", problem)
    where = op.domain.slice("unused")
    assert not op.to_dense()[where].any()
    with pytest.raises(ValueError, match="block of 'unused': it is singular"):
        op.inverse()
    close(op.inverse(0.5).to_dense()[where, where], 2 * torch.eye(2, dtype=torch.float64))


@pytest.mark.parametrize(
    "use", [lambda e: 0, lambda e: e.sum(), lambda e: (e * 2).sin().sum()], ids=["not", "sum", "sin"]
)
@pytest.mark.parametrize("mixing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_parameter_without_entries_has_no_block(kind, mixing, use):
    """Also where the model mixes the data of a batch, so that parameters are known by their whole gradients."""
    problem = overdetermined()
    problem[0].register_parameter("empty", nn.Parameter(torch.ones(0, 4, dtype=torch.float64)))
    problem[0].register_forward_hook(lambda m, args, z: z - mixing * z.mean(0) / 2 + use(m.empty))
    op = build(kind, problem)
    assert all(placed.names != ("empty",) and len(placed.positions) for placed in op.blocks)
    dense = op.to_dense() + torch.eye(len(op.to_dense()), dtype=torch.float64)
    close(op.inverse(1.0).to_dense(), torch.linalg.inv(dense), 1e-8)
    close(op.logdet(1.0), torch.logdet(dense), 1e-9)
    assert op.eigenpairs(2).values.shape == (2,) and op.sample(3, 1.0).shape == (len(dense), 3)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_have_the_inverse_as_covariance(kind):
    op = build(kind, overdetermined())
    count = 20_000
    samples = op.sample(count, 0.1, torch.Generator().manual_seed(0))
    assert samples.shape == (op.shape[0], count)
    assert torch.equal(samples, op.sample(count, 0.1, torch.Generator().manual_seed(0)))
    covariance = torch.linalg.inv(op.to_dense() + 0.1 * eye(op))
    found = samples @ samples.T / count
    # an entry's variance is (Σ_ii Σ_jj + Σ_ij²) / count; 5 standard errors over some 200 entries
    error = ((covariance.diagonal().outer(covariance.diagonal()) + covariance.square()) / count).sqrt()
    assert ((found - covariance).abs() < 5 * error).all()
    mean = samples.mean(1).abs() / (covariance.diagonal() / count).sqrt()
    assert (mean < 5).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda op: op.inverse(-1.0), r"damping: expected a number ≥ 0, got -1\.0"),
        (lambda op: op.inverse(1.0, "approximate"), "kind: expected 'exact' or 'heuristic', got 'approximate'"),
        (lambda op: op.inverse(1.0, min_damping=-1), "min_damping: expected a number ≥ 0, got -1"),
        (lambda op: op.inverse({"0.weight": 1.0}), r"missing: '0\.bias', '2\.weight', '2\.bias'\."),
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


def test_a_diagonal_has_no_joint_blocks():
    op = build("diagonal", PROBLEMS["mlp"](), separate_weight_and_bias=False)
    damping = {name: 1.0 + k for k, name in enumerate(op.domain.names)}
    shifts = torch.cat([torch.full((p,), damping[n]) for n, p in zip(op.domain.names, op.domain.sizes, strict=True)])
    close(op.inverse(damping).diagonal(), 1 / (op.diagonal() + shifts))


def test_single_precision_accumulates_in_it():
    model, loss, X, y = PROBLEMS["mlp"]()
    op = KFACLinearOperator(model.float(), loss, dict(model.named_parameters()), [(X.float(), y)], fisher_type="type-2")
    reference = build("kfac", PROBLEMS["mlp"]())
    assert op.dtype == torch.float32
    close(op.to_dense().double(), reference.to_dense(), 1e-5)
    close(op.inverse(0.1).to_dense().double(), reference.inverse(0.1).to_dense(), 1e-5)
