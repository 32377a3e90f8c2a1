"""Diagonals, multiples of the identity, low rank plus diagonal, outer and Kronecker products, against dense algebra."""

import pytest
import torch
from conformance import close, conforms, draws

from curvops import (
    DiagonalOperator,
    GatheredOperator,
    IdentityOperator,
    LowRankPlusDiagonalOperator,
    OuterProductOperator,
    TensorSpace,
    block_diagonal,
    kronecker_product,
)
from curvops.operators.block_diagonal import BlockDiagonalOperator
from curvops.operators.composite import SumOperator

D = 6


def space():
    shapes = {"weight": (2, 2), "empty": (0,), "bias": (2,)}
    return TensorSpace({name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()})


def psd(n, seed=0):
    a = draws(n, n + 1, seed)
    return a @ a.T


def dense(op):
    return op.to_dense()


def eye(n):
    return torch.eye(n, dtype=torch.float64)


def low_rank(weights=None, where=None):
    return LowRankPlusDiagonalOperator(draws(D, 2), draws(D, seed=1).square(), weights, where)


MAKE = {
    "diagonal": lambda: DiagonalOperator(draws(D).square(), space()),
    "indefinite diagonal": lambda: DiagonalOperator(space().split(draws(D)), space()),
    "flat diagonal": lambda: DiagonalOperator(draws(D)),
    "identity": lambda: IdentityOperator(space(), 3),
    "outer": lambda: OuterProductOperator(draws(D, 2), codomain=space()),
    "rectangular outer": lambda: OuterProductOperator(draws(D), draws(4, seed=1), codomain=space()),
    "low rank": lambda: low_rank(where=space()),
    "indefinite low rank": lambda: low_rank(torch.tensor([2.0, -3.0], dtype=torch.float64)),
    "kronecker": lambda: kronecker_product(psd(3), psd(2, seed=1)),
    "blocks": lambda: block_diagonal(
        {"weight": (psd(2), draws(2).square()), "empty": torch.zeros(0, 0).double(), "bias": psd(2)}, space()
    ),
}


@pytest.mark.parametrize("name", MAKE)
def test_conformance(name):
    conforms(MAKE[name]())


def test_definitions():
    d, u, v = draws(D), draws(D, 2), draws(4, 2, seed=1)
    close(dense(DiagonalOperator(d)), d.diag())
    close(dense(DiagonalOperator({"a": d[:2], "b": d[2:]})), d.diag())
    close(dense(IdentityOperator(space(), 3)), 3 * eye(D))
    close(dense(OuterProductOperator(u, v)), u @ v.T)
    close(dense(OuterProductOperator(u)), u @ u.T)
    close(dense(LowRankPlusDiagonalOperator(u, d, d[:2])), u @ d[:2].diag() @ u.T + d.diag())
    close(dense(LowRankPlusDiagonalOperator(u, 2.0)), u @ u.T + 2 * eye(D))
    close(dense(kronecker_product(psd(3), psd(2))), torch.kron(psd(3), psd(2)))
    close(dense(kronecker_product(psd(3), d[:2].square())), torch.kron(psd(3), d[:2].square().diag()))
    found = block_diagonal({"weight": (psd(2), psd(2, 1)), "bias": psd(3), "scale": d[:1].square()})
    close(dense(found), torch.block_diag(torch.kron(psd(2), psd(2, 1)), psd(3), d[:1].square().diag()))
    V = draws(2, 2)
    weight = TensorSpace({"w": V})
    close((kronecker_product(psd(2), psd(2, 1), weight) @ [V])[0], psd(2) @ V @ psd(2, 1))


@pytest.mark.parametrize("name", [name for name in MAKE if "outer" not in name])
def test_numbers_of_structure(name):
    op, A = MAKE[name](), dense(MAKE[name]())
    close(op.trace(), A.trace())
    close(op.diagonal(), A.diagonal())
    close(op.frobenius_norm(), A.norm())
    for each, matrix in ((op, A), (2.5 * op, 2.5 * A), (op.damped(0.3), A + 0.3 * eye(D))):
        close(dense(each), matrix)
        assert type(each) is type(op) or isinstance(each, BlockDiagonalOperator)
        shifted = matrix + 100.0 * eye(D)
        close(dense(each.inverse(100.0)), torch.linalg.inv(shifted))
        close(each.logdet(100.0), torch.logdet(shifted))
        tau = torch.tensor(100.0, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(each.logdet, tau)
    damping = {"weight": 100.0, "empty": 1.0, "bias": 200.0} if "bias" in op.domain.names else {"vector": 100.0}
    added = torch.cat([torch.full((n,), x) for n, x in zip(op.domain.sizes, damping.values(), strict=True)]).double()
    close(dense(op.damped(damping)), A + added.diag())
    close(op.logdet(damping), torch.logdet(A + added.diag()))
    close(dense(op.inverse(damping)), torch.linalg.inv(A + added.diag()))


def test_outer_products():
    u, v = draws(D, 2), draws(D, 2, seed=1)
    for op, A in ((OuterProductOperator(u), u @ u.T), (OuterProductOperator(u, v), u @ v.T)):
        close(op.trace(), A.trace())
        close(op.diagonal(), A.diagonal())
        close(op.frobenius_norm(), A.norm())
    with pytest.raises(ValueError, match="expected a square operator"):
        OuterProductOperator(u, v[:4]).trace()
    with pytest.raises(ValueError, match="as many vectors on both sides, got 2 and 1"):
        OuterProductOperator(u, v[:, 0])


def test_sums_and_products_keep_structure():
    a, b = (DiagonalOperator(draws(D, seed=k).square(), space()) for k in (0, 1))
    one, low, outer = (
        IdentityOperator(space()),
        low_rank(where=space()),
        OuterProductOperator(draws(D, 2), codomain=space()),
    )
    A, B, L, R = map(dense, (a, b, low, outer))
    for op, matrix, kind in (
        (a + b, A + B, DiagonalOperator),
        (a - 3 * b, A - 3 * B, DiagonalOperator),
        (a @ b, A @ B, DiagonalOperator),
        (2 * one + one, 3 * eye(D), IdentityOperator),
        (one - 3 * one, -2 * eye(D), DiagonalOperator),
        (low + a, L + A, LowRankPlusDiagonalOperator),
        (b + 2 * low - a, B + 2 * L - A, LowRankPlusDiagonalOperator),
        (low + 2 * one, L + 2 * eye(D), LowRankPlusDiagonalOperator),
        (outer + a, R + A, LowRankPlusDiagonalOperator),
        (low.inverse(), torch.linalg.inv(L), LowRankPlusDiagonalOperator),
        (low.inverse().inverse(0.5), torch.linalg.inv(torch.linalg.inv(L) + 0.5 * eye(D)), LowRankPlusDiagonalOperator),
        (one @ low, L, LowRankPlusDiagonalOperator),
        (low @ (2 * one), 2 * L, LowRankPlusDiagonalOperator),
        (outer + low, R + L, SumOperator),
    ):
        assert isinstance(op, kind), op
        close(dense(op), matrix)
    assert (low + a).psd and low.inverse().psd and not (low - a).psd and (a @ b).psd
    with pytest.raises(ValueError, match="between the same spaces"):
        a + IdentityOperator(TensorSpace.flat(D, torch.float64))
    with pytest.raises(ValueError, match="expected B to give what A takes"):
        a @ IdentityOperator(TensorSpace.flat(D, torch.float64))


def test_symmetry_of_products():
    low, rect = low_rank(), OuterProductOperator(draws(4, 2), draws(D, 2, seed=1))
    S, B = dense(low), dense(rect)
    indefinite = low_rank(torch.tensor([1.0, -9.0], dtype=torch.float64))
    for op, matrix, symmetric, is_psd in (
        (rect @ rect.T, B @ B.T, True, True),
        (rect.T @ rect, B.T @ B, True, True),
        (rect @ low @ rect.T, B @ S @ B.T, True, True),
        (rect @ (low @ rect.T), B @ S @ B.T, True, True),
        (rect @ indefinite @ rect.T, B @ dense(indefinite) @ B.T, True, False),
        (low @ low, S @ S, True, True),
        (low @ rect.T, S @ B.T, False, False),
    ):
        assert (op.symmetric, op.psd) == (symmetric, is_psd)
        close(dense(op), matrix)


def test_singular_low_rank():
    op = LowRankPlusDiagonalOperator(draws(D, 2), 0.0)
    assert op.logdet() == -torch.inf
    with pytest.raises(ValueError, match="singular"):
        op.inverse()
    with pytest.raises(ValueError, match="1 eigenvalues are negative"):
        LowRankPlusDiagonalOperator(torch.ones(2, 1), 1.0, torch.tensor([-3.0])).logdet()
    with pytest.raises(ValueError, match="Pass a positive damping"):
        LowRankPlusDiagonalOperator(draws(2, 2), 0.0).inverse()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("alike", [0.0, 1.0])
def test_low_rank_parts_of_any_size(dtype, alike):
    """Columns whose squares, added to one, leave nothing of it, and small ones, to half of the digits."""
    columns, eps = torch.zeros(D, 3, dtype=dtype), torch.finfo(dtype).eps
    columns[0], columns[1, 1], columns[2, 2] = torch.tensor([1.0, alike, 0.0]) * eps**-0.7, 1.0, 1e-3
    tau = torch.tensor(0.5, dtype=dtype, requires_grad=True)
    op = LowRankPlusDiagonalOperator(columns, 0.5)
    # with a = ε⁻⁰·⁷: (1 + a²)(1 + 1), and with the second column a e₀ + e₁: 1 + 2 a² + 1 + a², by hand
    square = torch.tensor(eps, dtype=torch.float64) ** -1.4
    pair = 1 + 2 * square + 1 + square if alike else (1 + square) * 2
    expected = pair.log() + torch.tensor(1e-6, dtype=torch.float64).log1p()
    found = op.logdet(tau)
    torch.testing.assert_close(found.double(), expected, rtol=eps**0.5, atol=0)
    found.backward()
    assert 3 < float(tau.grad) < 6  # Σ 1 / (λ + τ), of six eigenvalues one or two of which are large
    with pytest.raises(ValueError, match=r"times as large as the diagonal, which torch\.float.. does not hold"):
        op.inverse(0.5)


def cancelling(dtype):
    """Columns of 1e3 beside a diagonal with one negative entry: what the terms of the inverse have in common cancels."""
    columns = draws(20, 20, seed=1)
    diagonal = torch.ones(20, dtype=torch.float64)
    diagonal[0] = -0.5
    return (1e3 * columns / columns.norm(dim=0).max()).to(dtype), diagonal.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("parts", ["indefinite", "positive"])
def test_inverses_whose_terms_cancel(dtype, parts):
    """In single precision, too, the inverse is that of the matrix: in double it is known to ten digits and more."""
    columns, diagonal = cancelling(dtype)
    if parts == "positive":
        columns, diagonal = torch.full((20, 1), 150.0, dtype=dtype), torch.ones(20, dtype=dtype)
    op, U = LowRankPlusDiagonalOperator(columns, diagonal), columns.double()
    A, b = U @ U.T + diagonal.double().diag(), draws(20)
    expected, near = torch.linalg.solve(A, b.to(dtype).double()), {torch.float32: 1e-6, torch.float64: 1e-9}[dtype]
    solution = op.solve(b.to(dtype))
    for found in (solution.x, op.inverse() @ b.to(dtype)):
        assert found.dtype == dtype and (found.double() - expected).norm() < near * expected.norm()
    reached = bool(solution.residual <= {torch.float32: 100 * 2.0**-23, torch.float64: 1e-6}[dtype])
    assert solution.converged == reached and (reached or dtype == torch.float32)
    assert solution.reason.startswith("the structure gives the inverse" if reached else "rounding in torch.float32")
    if parts == "positive":
        close(op.inverse().logdet().double(), -torch.logdet(A), tolerance=near)
    again = op.inverse().inverse()
    assert (again.to_dense().double() - A).norm() < 1e-6 * A.norm()


def test_inverses_that_rounding_hides():
    columns = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    near = LowRankPlusDiagonalOperator(columns, torch.tensor([-1.0 + 2.0**-44, 1.0], dtype=torch.float64))
    with pytest.raises(ValueError, match=r"singular but for rounding, or its parts cancel: errors grow .*-fold\."):
        near.inverse()


def test_solutions_say_what_they_reach():
    """Of eigenvalues 10001 and 1 in single precision: no x has a residual that is less than rounding."""
    op = block_diagonal({"a": 5e3 * torch.ones(2, 2) + torch.eye(2), "b": torch.tensor([1.0, 2.0])})
    b = torch.tensor([1.0, -0.7, 1.0, 1.0])
    loose, sharp = op.solve(b, tolerance=0.5), op.solve(b, tolerance=1e-12)
    dense = op.to_dense().double()
    for found, tolerance in ((loose, 0.5), (sharp, 1e-12)):
        true = (b.double() - dense @ found.x.double()).norm() / b.double().norm()
        assert found.converged == bool(found.residual <= tolerance)
        assert abs(float(true) - float(found.residual)) < 1e-3
    assert loose.converged and not sharp.converged and "rounding in torch.float32 keeps the residual" in sharp.reason
    with pytest.raises(ValueError, match="solve: tolerance: expected a finite number"):
        op.solve(b, tolerance=-1.0)


@pytest.mark.parametrize("what", ["logdet", "inverse", "solve"])
def test_entries_that_are_no_numbers(what):
    op = LowRankPlusDiagonalOperator(torch.tensor([1.0, torch.nan]), 1.0)
    with pytest.raises(ValueError, match=r"LowRankPlusDiagonalOperator: .*entries that are not finite"):
        getattr(op, what)(*([torch.ones(2)] if what == "solve" else []))


@pytest.mark.parametrize("diagonal", [1.0, 1e-8, 1e-16])
def test_inverses_where_the_columns_span_the_space(diagonal):
    """As in slices of few rows: the diagonal may be lost, the matrix is not singular."""
    op = LowRankPlusDiagonalOperator(draws(4, 6), diagonal)
    inverse = op.inverse()
    close(inverse.to_dense(), torch.linalg.inv(op.to_dense()), tolerance=1e-9)
    close(inverse.inverse().to_dense(), op.to_dense(), tolerance=1e-9)
    close(inverse.logdet(), -torch.logdet(op.to_dense()), tolerance=1e-9)


OWNED = {
    "diagonal": (DiagonalOperator, 1),
    "low rank, columns": (lambda t: LowRankPlusDiagonalOperator(t, 1.0), 2),
    "low rank, diagonal": (lambda t: LowRankPlusDiagonalOperator(draws(3), t), 1),
    "low rank, weights": (lambda t: LowRankPlusDiagonalOperator(psd(3), 1.0, t), 1),
    "outer": (OuterProductOperator, 2),
    "outer, right": (lambda t: OuterProductOperator(psd(3), t), 2),
    "kronecker, left": (lambda t: kronecker_product(t, psd(2)), 2),
    "kronecker, right": (lambda t: kronecker_product(psd(2).diagonal(), t), 2),
    "block": (lambda t: block_diagonal({"w": t}), 2),
    "diagonal block": (lambda t: block_diagonal({"w": t}), 1),
}


@pytest.mark.parametrize("name", OWNED)
def test_the_caller_may_change_the_tensors(name):
    make, axes = OWNED[name]
    tensor = psd(3) if axes == 2 else psd(3).diagonal().clone()
    op, kept = make(tensor), make(tensor.clone()).to_dense()
    known = op.psd and op.logdet(1.0)  # what is computed and kept
    tensor.mul_(-10)
    assert torch.equal(op.to_dense(), kept) and torch.equal(op.diagonal(), kept.diagonal())
    if op.psd:
        close(known, torch.logdet(kept + eye(len(kept))))
        close(op.logdet(1.0), torch.logdet(kept + eye(len(kept))))
    for result in (op.to_dense(), op.diagonal(), op @ torch.ones(op.shape[1], dtype=torch.float64)):
        result.zero_()
    assert torch.equal(op.to_dense(), kept)


def test_norms_of_what_cancels():
    op = (-1.0 * block_diagonal({"a": torch.full((7,), 1 / 3, dtype=torch.float64)})).damped(1 / 3 + 1e-9)
    close(op.frobenius_norm(), op.to_dense().norm())


@pytest.mark.parametrize("seed", range(40))
def test_determinants_of_indefinite_matrices_are_refused(seed):
    """Those too whose negative eigenvalues are even in number, so that the determinant is positive."""
    columns, diagonal = draws(D, 3, seed=seed), draws(D, seed=100 + seed) + 1.5
    weights = draws(3, seed=200 + seed) + 0.5
    values = torch.linalg.eigvalsh(diagonal.diag() + columns @ weights.diag() @ columns.T)
    op = LowRankPlusDiagonalOperator(columns, diagonal, weights)
    if values[0] > 0:
        close(op.logdet(), values.log().sum())
    else:
        with pytest.raises(ValueError, match=f"{int((values < 0).sum())} eigenvalues are negative"):
            op.logdet()


def test_two_negative_eigenvalues():
    weights = torch.tensor([-3.0, -5.0], dtype=torch.float64)
    two = LowRankPlusDiagonalOperator(torch.eye(4).double()[:, :2], 1.0, weights)  # of the eigenvalues -2, -4, 1, 1
    with pytest.raises(ValueError, match="2 eigenvalues are negative"):
        two.logdet()
    with pytest.raises(ValueError, match="1 eigenvalues are negative"):
        two.logdet(3.0)
    close(two.logdet(5.0), torch.tensor([3.0, 1.0, 6.0, 6.0], dtype=torch.float64).log().sum())


def test_what_does_not_fit():
    for call, error, message in (
        (lambda: DiagonalOperator(draws(D, 2)), ValueError, "expected one vector"),
        (lambda: DiagonalOperator([1.0]), TypeError, "or a space to place it in, got list"),
        (lambda: DiagonalOperator(torch.arange(3)), TypeError, r"got torch\.int64"),
        (lambda: LowRankPlusDiagonalOperator(draws(D), draws(D), draws(2)), ValueError, "1 weights"),
        (lambda: kronecker_product(draws(2, 2), psd(2)), ValueError, "expected a symmetric matrix"),
        (lambda: kronecker_product(psd(2), psd(2), space()), ValueError, "expected a space of one tensor"),
        (lambda: kronecker_product(psd(2) * torch.inf, psd(2)), ValueError, "entries that are not finite"),
        (lambda: kronecker_product(psd(2), draws(3) * torch.inf), ValueError, "entries that are not finite"),
        (lambda: block_diagonal({"a": draws(2, 3)}), TypeError, r"expected a real floating-point matrix .* \(2, 3\)"),
        (lambda: block_diagonal({"weight": psd(4)}, space()), ValueError, "missing: 'empty', 'bias'"),
        (
            lambda: block_diagonal({"weight": psd(3), "empty": torch.zeros(0, 0).double(), "bias": psd(2)}, space()),
            ValueError,
            "block of 'weight': expected 4 rows",
        ),
    ):
        with pytest.raises(error, match=message):
            call()


def test_what_is_whole_is_not_gathered():
    with pytest.raises(TypeError, match="GatheredOperator: expected a LinearOperator, got Tensor"):
        GatheredOperator(torch.eye(2))
    with pytest.raises(ValueError, match=r"GatheredOperator: I takes and gives whole vectors.* Take it as it is\."):
        GatheredOperator(IdentityOperator(TensorSpace.flat(2)))
