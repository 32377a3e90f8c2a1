"""Numbers of an operator: exact where its structure gives them, estimated where not, and the result says which."""

import pytest
import torch
from conformance import close, draws
from problems import PROBLEMS

from curvops import (
    DiagonalOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    KFACLinearOperator,
    LowRankPlusDiagonalOperator,
    OuterProductOperator,
    estimators,
)

RISK = {
    "hessian": HessianLinearOperator,
    "ggn": GGNLinearOperator,
    "sum": lambda *a: HessianLinearOperator(*a) + 0.5 * GGNLinearOperator(*a).damped(0.1),
    "slice": lambda *a: HessianLinearOperator(*a)["0.*"],
}
EXACT = {
    "kfac": lambda *a: KFACLinearOperator(*a, fisher_type="type-2"),
    "scaled and damped": lambda *a: 3 * KFACLinearOperator(*a, fisher_type="type-2").damped(0.1),
    "slice of kfac": lambda *a: KFACLinearOperator(*a, fisher_type="type-2")["0.*"],
    "diagonal": lambda *a: DiagonalOperator(draws(9).abs()),
    "low rank plus diagonal": lambda *a: LowRankPlusDiagonalOperator(draws(9, 2), draws(9).abs()),
    "outer product": lambda *a: OuterProductOperator(draws(9, 2)),
}


def made(make):
    return make(*PROBLEMS["mlp"]().args())


@pytest.mark.parametrize("kind", {**RISK, **EXACT})
def test_numbers_are_those_of_the_dense_matrix(kind):
    op = made({**RISK, **EXACT}[kind])
    dense, size = op.to_dense(), op.shape[0]
    options = {} if kind in EXACT else {"num_products": size, "max_products": size}  # exact from so many
    found = {
        "trace": (op.trace(**options), dense.trace()),
        "diagonal": (op.diagonal(**options), dense.diagonal()),
        "norm": (op.frobenius_norm(**options), dense.norm()),
    }
    for estimate, expected in found.values():
        close(estimate, expected)
        assert estimate.exact and not estimate.standard_error.any() and (estimate.products > 0) == (kind in RISK)
    parts = op.trace(groups={"first": slice(0, 3), "rest": slice(3, size)}, **options)
    close(parts["rest"], dense.diagonal()[3:].sum())
    close(op.diagonal(groups={"some": torch.tensor([1, 4])}, **options)["some"], dense.diagonal()[[1, 4]])


@pytest.mark.parametrize("kind", {**RISK, **EXACT})
def test_eigenpairs_and_density(kind):
    op = made({**RISK, **EXACT}[kind])
    every = torch.linalg.eigvalsh(op.to_dense())
    values, vectors = op.eigenpairs(2, "both")
    torch.testing.assert_close(values, every[[0, 1, -2, -1]], rtol=0, atol=1e-9 * float(every[-1]))
    torch.testing.assert_close(op @ vectors, vectors * values, rtol=0, atol=1e-7 * float(every[-1]))
    assert op.spectral_density(depth=4, num_vectors=2).dim == len(every)
    density = op.spectral_density()  # exact: the matrix has fewer columns than products would be taken
    assert density.dim == len(every) and not density.products
    moments = torch.stack([(every.double() ** k).mean() for k in range(3)])
    torch.testing.assert_close(density.moments(2).values, moments, rtol=1e-9, atol=0)
    assert not density.moments(2).errors.any()
    if kind in RISK:
        for name, wrong in (("num_vectors", -9), ("num_vectors", "a")):
            with pytest.raises(ValueError, match=f"{name}: expected a positive integer, got {wrong!r}"):
                op.spectral_density(**{"depth": 64, name: wrong})


@pytest.mark.parametrize("damping", [0.3, "dict"])
@pytest.mark.parametrize("kind", {**RISK, **EXACT})
def test_solutions(kind, damping):
    op = made({**RISK, **EXACT}[kind])
    size, shift = op.shape[0], damping
    if damping == "dict":
        damping = dict.fromkeys(op.domain.names, 0.5)
        shift = 0.5
    b = draws(size, 2)
    solution = op.solve(
        b, damping, **({} if kind in ("kfac", *EXACT) and kind != "outer product" else {"tolerance": 1e-10})
    )
    matrix = op.to_dense() + shift * torch.eye(size, dtype=torch.float64)
    close(solution.x, torch.linalg.solve(matrix, b), 1e-7)
    assert solution.converged and (solution.residual < 1e-8).all()
    named = op.domain.from_columns(b[:, :1], op.domain.to_columns(op.domain.split(b[:, 0]), "")[1])
    assert [t.shape for t in op.solve(named, damping).x] == [t.shape for t in named]


def test_the_solver_fits_the_matrix():
    op = made(RISK["hessian"])
    b = draws(op.shape[0])
    assert op.solve(b, 50.0, solver="cg").converged
    close(op.solve(b, 1.0, tolerance=1e-10).x, torch.linalg.solve(op.to_dense() + torch.eye(len(b)), b), 1e-6)
    product = op @ made(RISK["ggn"]).damped(1.0) + 5 * made(RISK["ggn"]).damped(1.0)
    assert not product.symmetric
    close(product.solve(b, tolerance=1e-12, max_iterations=2000).x, torch.linalg.solve(product.to_dense(), b), 1e-6)
    with pytest.raises(ValueError, match="solver: expected one of 'cg'"):
        op.solve(b, solver="lu")
    with pytest.raises(ValueError, match="singular"):
        DiagonalOperator(torch.tensor([0.0, 1.0])).solve(torch.ones(2))


@pytest.mark.parametrize("kind", ["ggn", *EXACT])
def test_log_determinants(kind):
    op = made({**RISK, **EXACT}[kind])
    options = (
        {} if kind in EXACT and kind != "outer product" else {"depth": op.shape[0], "num_products": op.shape[0] ** 2}
    )
    tau = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    found = op.logdet(tau, **options)
    dense = op.to_dense() + 0.4 * torch.eye(op.shape[0], dtype=torch.float64)
    close(found.detach(), torch.logdet(dense), 1e-8)
    (slope,) = torch.autograd.grad(found, tau)
    close(slope, torch.linalg.inv(dense).trace(), 1e-7)
    close(op.logdet(dict.fromkeys(op.domain.names, 0.4), **options), torch.logdet(dense), 1e-8)


def test_estimates_say_how_sure_they_are():
    op = made(RISK["hessian"])
    trace = op.trace(num_products=10)
    assert not trace.exact and trace.standard_error > 0 and trace.products <= 10
    assert abs(trace - op.to_dense().trace()) < 5 * trace.standard_error
    assert "±" in repr(trace) and trace.method == "XTrace"
    before = torch.get_rng_state()
    assert torch.equal(op.trace(num_products=10), trace) and not torch.equal(op.trace(num_products=10, seed=1), trace)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ValueError, match="square"):
        op["0.*", "2.*"].trace()
    with pytest.raises(ValueError, match="expected a symmetric matrix"):
        (op @ made(RISK["ggn"])).eigenpairs(1)


def test_results_have_memory_of_their_own():
    for op in (made(HessianLinearOperator), DiagonalOperator(draws(9))):
        pairs = op.eigenpairs(2)
        kept = pairs.vectors.clone()
        for tensor in pairs.named(1).values():
            tensor.zero_()
        assert torch.equal(pairs.vectors, kept)
        groups = {"all": slice(0, 5), "some": slice(2, 6)}
        for found in (op.diagonal(groups=groups), estimators.diagonal(op, groups=groups, num_products=6)):
            before = found["some"].clone()
            found["all"].zero_()
            found["all"].standard_error.add_(1)
            assert torch.equal(found["some"], before) and not (found["some"].standard_error >= 1).all()
