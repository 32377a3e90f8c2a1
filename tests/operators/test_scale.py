"""Single precision has no squares of numbers below 1e-20 or above 1e19, double none below 1e-160 or above 1e154: a matrix of
any scale gives its own results, scaled."""

from functools import partial

import pytest
import torch

from curvops import (
    DiagonalOperator,
    LowRankPlusDiagonalOperator,
    OuterProductOperator,
    block_diagonal,
    estimators,
    kronecker_product,
    solvers,
)
from curvops.estimators.norm import frobenius_norm
from curvops.lengths import PART, dots, gram, lengths, power_of_two
from curvops.spectrum import eigenpairs, spectral_density

D = 40
SCALES = [2.0**-80, 2.0**-40, 2.0**40, 2.0**60]


def real(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def psd(size, seed=0):
    root = real(size, size, seed=seed) * 0.8 ** torch.arange(size)
    return root @ root.T / size


A = psd(D) + 0.1 * torch.eye(D)
indefinite = A - 0.3 * torch.eye(D)

STRUCTURES = {
    "diagonal": lambda s: DiagonalOperator(s * real(5).abs()),
    "Kronecker": lambda s: kronecker_product(s * psd(3), psd(4, 1)),
    "scaled": lambda s: s * kronecker_product(psd(3), psd(4, 1)),
    "damped": lambda s: (s * kronecker_product(psd(3), psd(4, 1))).damped(s),
    "blocks": lambda s: block_diagonal({"a": (s * psd(3), psd(2)), "b": s * psd(4)}),
    "inverse": lambda s: kronecker_product(psd(3) / s, psd(4, 1)).inverse(),
    "rank": lambda s: s * LowRankPlusDiagonalOperator(real(6, 2), 0.5),
    "outer": lambda s: OuterProductOperator(s * real(6, 2), real(6, 2, seed=1)),
}


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("scale", SCALES)
def test_exact_norms(structure, scale):
    make = STRUCTURES[structure]
    expected = make(1.0).to_dense().double().norm() * scale
    torch.testing.assert_close(make(scale).frobenius_norm().double(), expected, rtol=1e-4, atol=0.0)


ESTIMATES = {
    "XTrace": partial(estimators.trace, num_products=12),
    "Hutch++": partial(estimators.trace, num_products=12, method="hutch++"),
    "Hutchinson": partial(estimators.trace, num_products=12, method="hutchinson"),
    "XDiag": partial(estimators.diagonal, num_products=12),
    "diagonal": partial(estimators.diagonal, num_products=12, method="hutchinson"),
}


@pytest.mark.parametrize("estimate", ESTIMATES)
@pytest.mark.parametrize("scale", SCALES)
def test_estimates_and_their_errors(estimate, scale):
    found, expected = ESTIMATES[estimate](scale * A), ESTIMATES[estimate](A)
    torch.testing.assert_close(found / scale, expected + 0.0, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.standard_error / scale, expected.standard_error, rtol=1e-3, atol=1e-5)
    assert (expected.standard_error > 0).all()


@pytest.mark.parametrize("products", [12, D])
@pytest.mark.parametrize("scale", SCALES)
def test_estimated_norms(products, scale):
    found, expected = (frobenius_norm(s * A, num_products=products) for s in (scale, 1.0))
    assert found.dtype == found.standard_error.dtype == torch.float32 and found.products == products
    torch.testing.assert_close(found / scale, expected + 0.0, rtol=1e-4, atol=0.0)
    torch.testing.assert_close(found.standard_error / scale, expected.standard_error, rtol=1e-3, atol=0.0)


@pytest.mark.parametrize(
    "options", [{"num_products": 12}, {"num_products": D}, {"groups": {"a": slice(0, 9)}}], ids=str
)
@pytest.mark.parametrize("scale", SCALES[1:])  # others have squares that are none of this precision
def test_squared_norms(options, scale):
    found, expected = (estimators.squared_norm(s * A, **{"num_products": 12, **options}) for s in (scale, 1.0))
    if "groups" in options:
        found, expected = found["a"], expected["a"]
    torch.testing.assert_close(found / scale**2, expected + 0.0, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(found.standard_error / scale**2, expected.standard_error, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("scale", SCALES)
def test_log_determinants(scale):
    found, expected = (estimators.logdet(s * A, damping=0.1 * s, depth=8, num_products=32) for s in (scale, 1.0))
    shift = D * torch.tensor(scale).log()
    torch.testing.assert_close(found - shift, expected + 0.0, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(found.standard_error, expected.standard_error, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("products", [None, 39])
@pytest.mark.parametrize("scale", SCALES)
def test_eigenpairs(products, scale):
    found = eigenpairs(scale * A, 2, max_products=products)
    torch.testing.assert_close(found.values / scale, torch.linalg.eigvalsh(A)[-2:], rtol=1e-4, atol=0.0)
    assert found.converged and (found.residuals / scale < 1e-3).all()


@pytest.mark.parametrize("scale", SCALES)
def test_densities(scale):
    found, expected = (spectral_density(s * A, depth=6, num_vectors=2) for s in (scale, 1.0))
    torch.testing.assert_close(found.nodes / scale, expected.nodes, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.weights, expected.weights, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("solver, matrix", [("cg", A), ("minres", indefinite), ("lsmr", indefinite[:, :30])])
@pytest.mark.parametrize("scale", [2.0**-80, 2.0**-40, 2.0**40, 2.0**60])
def test_solutions(solver, matrix, scale):
    b = real(D, 2, seed=5)
    found, expected = (getattr(solvers, solver)(s * matrix, b, tolerance=1e-4) for s in (scale, 1.0))
    assert found.converged and found.iterations == expected.iterations
    torch.testing.assert_close(found.x * scale, expected.x, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.residual, expected.residual, rtol=1e-2, atol=1e-4)


def test_lengths_a_part_at_a_time():
    columns = 1e-25 * real(PART + 7, 2)
    truth = columns.double()
    torch.testing.assert_close(lengths(columns), truth.norm(dim=0))
    torch.testing.assert_close(lengths(columns[:, 0]), truth[:, 0].norm())
    torch.testing.assert_close(dots(columns, columns.flip(1)), (truth * truth.flip(1)).sum(0))
    torch.testing.assert_close(gram(columns), truth.T @ truth)
    assert lengths(columns[:0]).tolist() == [0, 0] and lengths(columns[:, :0]).tolist() == []


def test_powers_of_two():
    for number, power in ((0.0, 1.0), (3e-300, 2.0**-994), (-5.0, 8.0), (4.0, 8.0)):
        assert power_of_two(torch.tensor([number, 0.0], dtype=torch.float64)) == power
    assert power_of_two(torch.ones(0)) == 1


DOUBLE = [2.0**-600, 2.0**-540, 2.0**600]
B = A.double()
GROUPS = {"a": slice(0, 12), "b": slice(12, D)}


def same(found, expected, scale):
    torch.testing.assert_close(found / scale, expected + 0.0, rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("scale", DOUBLE)
def test_exact_norms_in_double_precision(scale):
    kron = kronecker_product(B[:3, :3], B[:4, :4])
    low = LowRankPlusDiagonalOperator(B[:, :3], B.diagonal())
    dense = B[:, :3] @ B[:, :3].T + B.diagonal().diag()
    blocks = {"a": B[:5, :5], "b": B[:4, :4]}
    for op, matrix in (
        (DiagonalOperator(scale * B.diagonal()), B.diagonal()),
        (kronecker_product(scale * B[:3, :3], B[:4, :4]), torch.kron(B[:3, :3], B[:4, :4])),
        ((scale * kron).damped(scale), torch.kron(B[:3, :3], B[:4, :4]) + torch.eye(12)),
        (scale * low, dense),
        (LowRankPlusDiagonalOperator(scale**0.5 * B[:, :3], scale * B.diagonal()), dense),
        (OuterProductOperator(scale * B[:, :3], B[:, 1:4]), B[:, :3] @ B[:, 1:4].T),
        (block_diagonal({name: scale * block for name, block in blocks.items()}), torch.block_diag(*blocks.values())),
    ):
        same(op.frobenius_norm(), matrix.norm(), scale)
    found = block_diagonal({name: scale * block for name, block in blocks.items()}).block_norms("tensors").norms
    same(found.diagonal(), torch.stack([block.norm() for block in blocks.values()]), scale)


@pytest.mark.parametrize("scale", DOUBLE)
def test_estimates_in_double_precision(scale):
    both = {
        **ESTIMATES,
        "norm": partial(frobenius_norm, num_products=12),
        "exact": partial(frobenius_norm, num_products=D),
    }
    for name, estimate in both.items():
        found, expected = estimate(scale * B), estimate(B)
        same(found, expected, scale)
        same(found.standard_error, expected.standard_error, scale)
        assert name == "exact" or (expected.standard_error > 0).all()
    for count in (4, D):
        found, expected = (estimators.block_norms(s * B, GROUPS, num_products=count) for s in (scale, 1.0))
        same(found.norms, expected.norms, scale)
        same(found.norms.standard_error, expected.norms.standard_error, scale)
        same(found.traces.standard_error, expected.traces.standard_error, scale)
    truth = torch.stack([torch.stack([B[i, j].norm() for j in GROUPS.values()]) for i in GROUPS.values()])
    same(found.norms, truth, scale)


@pytest.mark.parametrize("scale", DOUBLE)
def test_spectra_in_double_precision(scale):
    values = torch.arange(1.0, 401.0, dtype=torch.float64)
    found = eigenpairs(scale * values.diag(), 2)
    torch.testing.assert_close(found.values / scale, values[-2:], rtol=1e-9, atol=0.0)
    assert found.converged and (found.residuals / scale > 0).all() and (found.residuals / scale < 1e-5).all()
    densities = [spectral_density(s * B, depth=6, num_vectors=2) for s in (scale, 1.0)]
    same(densities[0].nodes, densities[1].nodes, scale)


@pytest.mark.parametrize("solver, matrix", [("cg", B), ("minres", indefinite.double()), ("lsmr", B[:, :30])])
@pytest.mark.parametrize("scale", [*DOUBLE, 1.0])
def test_solutions_in_double_precision(solver, matrix, scale):
    b = real(D, 2, seed=5).double()
    found, expected = getattr(solvers, solver)(scale * matrix, b, tolerance=1e-10), torch.linalg.lstsq(matrix, b)
    assert found.converged
    torch.testing.assert_close(found.x * scale, expected.solution, rtol=1e-6, atol=1e-7)


def test_lengths_in_double_precision():
    columns = real(50, 3).double()
    scales = torch.tensor([1e-200, 1.0, 1e250], dtype=torch.float64)
    torch.testing.assert_close(lengths(columns * scales), columns.norm(dim=0) * scales, rtol=1e-14, atol=0.0)
    assert lengths(torch.zeros(3, 2, dtype=torch.float64)).tolist() == [0, 0]
    assert lengths(torch.tensor([[1e308, torch.inf, 1.0]], dtype=torch.float64)).tolist() == [1e308, torch.inf, 1.0]
