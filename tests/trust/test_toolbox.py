"""The toolbox as hostile or hurried users call it: the right number, or an error that names what is wrong."""

import math

import pytest
import torch
from oracles import close, real
from torch import nn

from curvops import (
    DiagonalOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    InverseOperator,
    JacobianLinearOperator,
    KFACLinearOperator,
    LowRankPlusDiagonalOperator,
    OuterProductOperator,
    SubmatrixLinearOperator,
    block_diagonal,
    estimators,
    spectrum,
)
from curvops.solvers import cg, minres


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def problem(model):
    data = [(real(n, 3, seed=n), real(n, 2, seed=n + 1)) for n in (4, 3)]
    return model, nn.MSELoss(), dict(model.named_parameters()), data


def jacobian(model):
    args = problem(model)
    return JacobianLinearOperator(args[0], args[2], args[3])


class Rounded(nn.Module):
    """Gives its outputs in single precision."""

    def __init__(self):
        super().__init__()
        self.inner = net()

    def forward(self, X):
        return self.inner(X).float()


def test_outputs_of_another_dtype_than_the_parameters():
    model = Rounded()
    J, exact = jacobian(model), jacobian(model.inner).to_dense()
    assert (J.dtype, J.codomain.dtype) == (torch.float64, torch.float32)
    for columns in (1, 3, 9, 26):
        v, u = real(26, columns), real(14, columns).float()
        assert (J @ v).dtype == torch.float32 and (J.T @ u).dtype == torch.float64
        close((J @ v).double(), exact @ v, 1e-6)
        close(J.T @ u, exact.T @ u.double(), 1e-6)
    part = SubmatrixLinearOperator(J, [3, 0], [1, 2, 2])
    assert part.codomain.dtype == (part @ real(3)).dtype == torch.float32
    close(part.T @ torch.ones(2, dtype=torch.float32), exact[[3, 0]][:, [1, 2, 2]].sum(0), 1e-6)
    close((J.T @ J @ real(26, 9)).double(), exact.T @ exact @ real(26, 9), 1e-6)
    solution = J.solve(torch.ones(14, dtype=torch.float32), solver="lsmr", tolerance=1e-5)
    assert solution.converged and solution.x.dtype == torch.float64
    close(exact.T @ (exact @ solution.x), exact.T @ torch.ones(14), 1e-4)


def test_a_jacobian_under_autocast():
    model = net().float()
    args = [problem(model)[k] for k in (0, 2)]
    data = [(X.float(), None) for X, _ in problem(model)[3]]
    J = JacobianLinearOperator(*args, data)
    exact, v = J.to_dense(), torch.ones(26, 10, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = JacobianLinearOperator(*args, data)
        for op in (J, inside):
            close((op @ v).float(), exact @ v, 0.02)
            close((op @ v[:, 0]).float(), exact @ v[:, 0], 0.02)


@pytest.mark.parametrize("datum", ["a", 1.5, None])
def test_what_is_no_datum(datum):
    with pytest.raises(TypeError, match="expected the number of a datum"):
        jacobian(net()).datum(datum)


MAKERS = {
    "hessian": lambda model: HessianLinearOperator(*problem(model)),
    "damped slice": lambda model: GGNLinearOperator(*problem(model))["0.*"].damped(0.5),
    "off the diagonal": lambda model: HessianLinearOperator(*problem(model))["0.*", "2.*"],
    "its adjoint": lambda model: HessianLinearOperator(*problem(model))["2.*", "0.*"].T,
    "jacobian": jacobian,
    "inverse": lambda model: InverseOperator(GGNLinearOperator(*problem(model)), damping=1.0, tolerance=1e-12),
    "entries": lambda model: SubmatrixLinearOperator(HessianLinearOperator(*problem(model)), [3, 3, 1], [5, 2]),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_gradients_of_products_and_a_change_before_them(kind):
    model = net()
    op = MAKERS[kind](model)
    v, w = real(op.shape[1]).requires_grad_(), real(op.shape[0], seed=1)
    truth = op.to_dense().T @ w
    found = w @ (op @ v)
    (gradient,) = torch.autograd.grad(found, v, retain_graph=True)
    close(gradient, truth, 1e-8)
    with torch.no_grad():
        model[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.backward()


def test_a_block_of_a_block_off_the_diagonal():
    hessian = HessianLinearOperator(*problem(net()))
    dense, block = hessian.to_dense(), hessian["0.*", "*"]["0.bias", "2.*"]
    close(block.to_dense(), dense[12:16, 16:])
    assert type(block) is type(hessian["0.bias", "2.*"])
    close(hessian["0.*", "*"]["0.bias", "0.bias"].to_dense(), dense[12:16, 12:16])


def test_slices_inside_linearized_mean_the_model_as_it_is():
    model = net()
    hessian = HessianLinearOperator(*problem(model))
    with hessian.linearized():
        hessian @ torch.ones(26)
        block, cross = hessian["0.*"], hessian["0.*", "2.*"]
        with torch.no_grad():
            model[0].weight.mul_(2)
        dense = HessianLinearOperator(*problem(model)).to_dense()
        close(block @ torch.ones(16), dense[:16, :16].sum(1))
        close(cross @ torch.ones(10), dense[:16, 16:].sum(1))
        with pytest.raises(RuntimeError, match=r"has changed inside linearized\(\)"):
            hessian @ torch.ones(26)


def test_no_names_at_all():
    hessian = HessianLinearOperator(*problem(net()))
    for key in ([], ("0.*", [])):
        with pytest.raises(ValueError, match="expected at least one name or pattern, got an empty list"):
            hessian[key]


def test_a_refresh_after_a_layer_was_replaced():
    model = net()
    kfac = KFACLinearOperator(*problem(model), fisher_type="type-2")
    model[2] = nn.Linear(4, 2)
    with pytest.raises(ValueError, match=r"'2\.weight', '2\.bias' are no longer tensors of the module"):
        kfac.refresh()


@pytest.mark.parametrize("decay", ["a", -0.1, math.nan])
def test_what_is_no_decay(decay):
    kfac = KFACLinearOperator(*problem(net()))
    with pytest.raises(ValueError, match=r"decay: expected a number from 0 to 1, got"):
        kfac.refresh(decay=decay)


STRUCTURED = {
    "diagonal": DiagonalOperator(real(6).abs() + 1),
    "low rank": LowRankPlusDiagonalOperator(real(6, 2), real(6).abs() + 1),
    "blocks": block_diagonal({"a": torch.eye(6, dtype=torch.float64)}),
}


@pytest.mark.parametrize("kind", STRUCTURED)
def test_structure_does_not_hide_mistakes(kind):
    op, b = STRUCTURED[kind], torch.ones(6, dtype=torch.float64)
    for call in (
        lambda: op.trace(metod="xtrace"),
        lambda: op.diagonal(metod="xdiag"),
        lambda: op.frobenius_norm(products=3),
        lambda: op.logdet(tau=1.0),
        lambda: op.eigenpairs(1, tol=1.0),
        lambda: op.solve(b, tolerence=1e-3),
        lambda: op.solve(b, solver="cg", tolerence=1e-3),
    ):
        with pytest.raises(TypeError, match=r"unknown options '.*; there are .*progressbar"):
            call()
    with pytest.raises(TypeError, match="it has no groups"):
        op.frobenius_norm(groups="tensors")
    with pytest.raises(ValueError, match="expected a finite right-hand side"):
        op.solve(b * math.nan)


def test_dampings_are_checked_before_anything_is_computed():
    op = OuterProductOperator(real(6, 2))  # without an inverse or a determinant of its own
    for call in (lambda d: op.solve(torch.ones(6), d), op.logdet):
        for damping, error in ((-1.0, ValueError), (None, TypeError), ("1", TypeError), (torch.ones(2), TypeError)):
            with pytest.raises(error, match="damping: expected a number ≥ 0"):
                call(damping)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    columns, diagonal = real(6, 2).to(dtype), (real(6).abs() + 1).to(dtype)
    op = LowRankPlusDiagonalOperator(columns, diagonal)
    dense = columns.double() @ columns.double().T + diagonal.double().diag()
    assert op.logdet().dtype == op.inverse().dtype == dtype
    close(op.logdet().double(), torch.logdet(dense), 0.02)
    close(op.inverse().to_dense().double(), torch.linalg.inv(dense), 0.05)
    close(op.solve(torch.ones(6, dtype=dtype)).x.double(), torch.linalg.solve(dense, torch.ones(6)), 0.05)
    close(op.spectral_density().moments(1).values[1], dense.trace() / 6, 0.02)


NOT_SYMMETRIC = real(5, 5) + 20 * torch.eye(5, dtype=torch.float64)
WIDE = torch.diag(torch.arange(100, dtype=torch.float64))
REFUSED = {
    "logdet, not symmetric": (lambda: estimators.logdet(NOT_SYMMETRIC), "products with Tensor are not symmetric"),
    "trace, empty": (lambda: estimators.trace(torch.zeros(0, 0)), r"a matrix with columns, got shape \(0, 0\)"),
    "norm, empty": (lambda: estimators.squared_norm(torch.zeros(0, 0)), "a matrix with columns"),
    "density, empty": (lambda: spectrum.spectral_density(torch.zeros(0, 0)), "a matrix with columns"),
    "tolerance of an estimate": (lambda: estimators.trace(WIDE, tolerance="a"), "tolerance: expected a positive"),
    "seed": (lambda: estimators.trace(WIDE, seed=2**70), "seed: expected an integer of 64 bits"),
    "tolerance": (lambda: spectrum.eigenpairs(WIDE, 1, tolerance=-1.0), "tolerance: expected a number ≥ 0"),
    "a word": (lambda: spectrum.eigenpairs(WIDE, 1, tolerance="a"), "tolerance: expected a number ≥ 0, got 'a'"),
    "products": (lambda: spectrum.eigenpairs(WIDE, 1, max_products="a"), "max_products: expected at least the 1 pairs"),
    "metric": (
        lambda: spectrum.eigenpairs(WIDE, 1, metric=torch.eye(3), metric_inverse=WIDE),
        r"metric: expected shape \(100, 100\), got \(3, 3\)",
    ),
    "starts": (lambda: spectrum.spectral_density(WIDE, num_vectors=1.5), "num_vectors: expected a positive integer"),
    "width": (lambda: spectrum.spectral_density(WIDE).density(width=-1.0), "width: expected a positive number"),
    "turn": (lambda: spectrum.spectral_density(WIDE).density(threshold=0.0), "threshold: expected a positive number"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_estimators_and_spectra_refuse(what):
    call, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        call()


def test_operators_of_matrices_that_are_none():
    with pytest.raises(TypeError, match="InverseOperator: expected a LinearOperator, got Tensor"):
        InverseOperator(torch.eye(3))
    with pytest.raises(TypeError, match="SubmatrixLinearOperator: expected a LinearOperator, got Tensor"):
        SubmatrixLinearOperator(torch.eye(3), [0])


def test_why_minres_stops():
    ones, odd = torch.ones(2, 2), torch.tensor([1.0, -1.0])
    for matrix in (ones, torch.zeros(2, 2)):
        found = minres(matrix, odd)
        assert not found.converged and "singular" in found.reason
        close(found.residual, torch.ones(1))
    found = minres(torch.eye(2), odd, preconditioner=torch.zeros(2, 2))
    assert not found.converged and "preconditioner is not positive definite" in found.reason
    assert not cg(torch.eye(2), odd, preconditioner=torch.zeros(2, 2)).converged
    several = minres(torch.diag(torch.tensor([1.0, 2.0, 0.0])), torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
    assert "singular" in several.reason
    close(several.residual, torch.tensor([0.0, 1.0]))
