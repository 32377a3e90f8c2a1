"""What all solvers share: formats, foreign matrices, zeros, starts, and what they refuse."""

import pytest
import scipy.sparse.linalg as linalg
import torch
from problems import PROBLEMS

from curvops import GGNLinearOperator, KFACLinearOperator
from curvops.solvers.cg import cg
from curvops.solvers.lsmr import lsmr
from curvops.solvers.minres import minres
from curvops.solvers.neumann import neumann
from curvops.solvers.system import default_tolerance
from solvers.support import Foreign, draws, relative, symmetric

SOLVERS = {"cg": cg, "minres": minres, "lsmr": lsmr, "neumann": neumann}
MATRIX = symmetric(torch.linspace(0.5, 1.5, 10))


@pytest.fixture(params=SOLVERS)
def solver(request):
    return SOLVERS[request.param]


def test_foreign_matrices(solver):
    b = draws(10, 2)
    expected = torch.linalg.solve(MATRIX, b)
    for matrix in (MATRIX, MATRIX.numpy(), linalg.aslinearoperator(MATRIX.numpy())):
        found = solver(matrix, b, tolerance=1e-10)
        assert found.converged
        torch.testing.assert_close(found.x, expected, rtol=0, atol=1e-9)


def test_zeros_and_no_columns(solver):
    b = draws(10, 3)
    b[:, 1] = 0
    found = solver(MATRIX, b)
    assert found.converged and not found.x[:, 1].any() and found.residual[1] == 0 and (found.residual[::2] > 0).all()
    assert solver(MATRIX, 0 * b[:, 0]).iterations == 0
    empty = solver(MATRIX, b[:, :0])
    assert empty.x.shape == (10, 0) and empty.products == 0 and empty.converged


def test_what_is_not_finite(solver):
    b = draws(10)
    b[3] = float("nan")
    with pytest.raises(ValueError, match="expected a finite right-hand side"):
        solver(MATRIX, b)
    with pytest.raises(
        ValueError, match=r"a product with the matrix \(.*\) has entries that are infinite or no numbers"
    ):
        solver(MATRIX * float("inf"), draws(10))


@pytest.mark.parametrize(
    "options,message",
    [
        ({"damping": -1.0}, "damping: expected a finite number ≥ 0, got -1.0"),
        ({"damping": float("nan")}, "damping: expected a finite number ≥ 0, got nan"),
        ({"tolerance": -1e-3}, "tolerance: expected a finite number ≥ 0, got -0.001"),
    ],
)
def test_options_are_checked(solver, options, message):
    with pytest.raises(ValueError, match=message):
        solver(MATRIX, draws(10), **options)


def test_more_options_are_checked():
    b = draws(10)
    with pytest.raises(ValueError, match="max_iterations: expected an integer ≥ 1, got 0"):
        cg(MATRIX, b, max_iterations=0)
    with pytest.raises(ValueError, match="x0: expected 1 columns as b has, got 2"):
        cg(MATRIX, b, x0=draws(10, 2))
    with pytest.raises(ValueError, match="x0: expected finite entries"):
        cg(MATRIX, b, x0=b / 0)
    for wrong in (torch.ones(9), -torch.ones(10)):
        with pytest.raises(ValueError, match="preconditioner: expected 10 finite positive entries"):
            cg(MATRIX, b, preconditioner=wrong.double())
    with pytest.raises(ValueError, match=r"preconditioner: expected shape \(10, 10\), got \(9, 9\)"):
        cg(MATRIX, b, preconditioner=torch.eye(9))
    with pytest.raises(ValueError, match=r"cg: expected a square matrix"):
        cg(draws(10, 9), b)


@pytest.mark.parametrize("start", [cg, minres])
def test_a_start(start):
    matrix, b = symmetric(torch.linspace(0.5, 5, 60)), draws(60, 2)
    exact = torch.linalg.solve(matrix, b)
    cold, found = (
        start(matrix, b, tolerance=1e-8),
        start(matrix, b, x0=exact + 1e-4 * draws(60, 2, seed=1), tolerance=1e-8),
    )
    assert found.converged and found.iterations < cold.iterations
    torch.testing.assert_close(found.x, exact, rtol=0, atol=1e-7)
    assert start(matrix, b, x0=found.x, tolerance=1e-6).iterations == 0


def test_formats_of_an_operator(solver):
    problem = PROBLEMS["mlp"]()
    ggn = GGNLinearOperator(*problem.args())
    flat, options = draws(ggn.shape[0]), {"damping": 0.5, "tolerance": 1e-9}
    if solver is neumann:
        options |= {"scale": 0.3, "num_terms": 1000}
    expected = solver(ggn, flat, **options)
    assert expected.converged and expected.residual.shape == (1,)
    tensors = ggn.domain.split(flat)
    for given in (tensors, dict(zip(ggn.domain.names, tensors, strict=True))):
        x = solver(ggn, given, **options).x
        assert type(x) is type(given)
        parts = list(x.values()) if isinstance(x, dict) else x
        assert torch.equal(torch.cat([part.flatten() for part in parts]), expected.x)


def test_products_are_linearized_and_preconditioned_by_kfac():
    problem = PROBLEMS["mlp"]()
    ggn = GGNLinearOperator(*problem.args())
    opened = []

    class Watched(Foreign):
        def linearized(self):
            opened.append(self)
            return ggn.linearized()

    dense, b = ggn.to_dense(), draws(ggn.shape[0])
    inverse = KFACLinearOperator(*problem.args(), fisher_type="type-2").inverse(0.1)
    found = cg(Watched(dense), b, damping=0.1, preconditioner=inverse, tolerance=1e-9)
    assert found.converged and len(opened) == 1
    assert float(relative(dense + 0.1 * torch.eye(len(b)).double(), found.x[:, None], b[:, None])) <= 1e-9


def test_callers_keep_what_they_gave(solver):
    matrix, b = MATRIX.clone().requires_grad_(), draws(10, 2).requires_grad_()
    before = b.detach().clone()
    found = solver(matrix, b)
    assert not found.x.requires_grad and torch.equal(b.detach(), before)
    with torch.inference_mode():
        assert solver(MATRIX, before.clone()).converged


@pytest.mark.parametrize("kind", ["cg", "minres"])
def test_default_tolerances_of_low_precisions(kind):
    """A hundred times the precision of bfloat16 is 0.78: no solution. What is not reached within 1e-2 is not converged."""
    matrix = symmetric(torch.logspace(-2, 1, 40)).bfloat16()
    for dtype, tolerance in (
        (torch.bfloat16, 1e-2),
        (torch.float16, 1e-2),
        (torch.float32, 1.2e-5),
        (torch.float64, 1e-6),
    ):
        given, b = matrix.to(dtype), draws(40).to(dtype)
        found = SOLVERS[kind](given, b)
        assert found.converged == bool(found.residual <= tolerance)
        assert not found.converged or relative(given.double(), found.x.double(), b.double()) < 2 * tolerance
    assert default_tolerance(torch.bfloat16) == default_tolerance(torch.float16) == 1e-2
    assert default_tolerance(torch.float32) == 100 * 2.0**-23 and default_tolerance(torch.float64) == 1e-6


def test_a_network_in_bfloat16_says_what_rounding_leaves():
    """Of 12.6 % error, or anything: the residual is at most 1e-2, or it is said that it is not."""
    model, loss, _, data = PROBLEMS["mlp"]().args()
    ggn = GGNLinearOperator(
        model.bfloat16(), loss, dict(model.named_parameters()), [(X.bfloat16(), y) for X, y in data]
    )
    b = torch.ones(ggn.shape[0], dtype=torch.bfloat16)
    found = ggn.solve(b, 1e-2)
    assert found.converged == bool(found.residual <= 1e-2)
    if not found.converged:
        with pytest.raises(RuntimeError, match="cg did not converge"):
            ggn.inverse(1e-2) @ b
