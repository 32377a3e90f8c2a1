"""Our operators as matrices of `linear_operator`, beside dense matrices; in double precision."""

import pytest
import torch
from linear_operator import settings
from torch import nn

from curvops import EKFACLinearOperator, GGNLinearOperator, JacobianLinearOperator
from curvops.clients.gpytorch import to_linear_operator

pytestmark = pytest.mark.filterwarnings("ignore")  # linear_operator's own


@pytest.fixture(scope="module", params=["GGN", "EKFAC", "Jacobian"])
def pair(request):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    params, data = dict(model.named_parameters()), [(torch.rand(6, 3).double(), torch.rand(6, 2).double())]
    problem = model, nn.MSELoss(), params, data
    operator = {
        "GGN": lambda: GGNLinearOperator(*problem).damped(0.3),
        "EKFAC": lambda: EKFACLinearOperator(*problem).damped(0.3),
        "Jacobian": lambda: JacobianLinearOperator(model, params, data),
    }[request.param]()
    return to_linear_operator(operator), operator.to_dense()


def close(found, expected, **tolerance):
    torch.testing.assert_close(found.to_dense() if hasattr(found, "to_dense") else found, expected, **tolerance)


def test_products(pair):
    matrix, dense = pair
    rows, columns = dense.shape
    v, many = torch.rand(columns).double(), torch.rand(2, 3, columns, 5).double()
    for vector in (v, many[0, 0], many):
        close(matrix @ vector, dense @ vector)
    close(matrix.mT @ torch.ones(rows).double(), dense.sum(0))
    v.requires_grad_()
    (matrix @ v).square().sum().backward()
    close(v.grad, 2 * dense.T @ (dense @ v.detach()))


@pytest.mark.parametrize(
    "view",
    [
        lambda m: m,
        lambda m: m.mT,
        lambda m: m[2:5, 1:3],
        lambda m: m[1],
        lambda m: m[[0, 1], [2, 3]],
        lambda m: m.unsqueeze(0),
        lambda m: m.expand(3, 2, *m.shape),
        lambda m: m.expand(3, 2, *m.shape)[1, :, 2:4],
        lambda m: m.expand(3, 2, *m.shape)[[0, 2], [1, 1]],
        lambda m: m.expand(3, 2, *m.shape).permute(1, 0, 2, 3),
        lambda m: m.expand(3, 2, *m.shape) @ torch.ones(2, m.shape[1], 2).double(),
        lambda m: m.expand(2, *m.shape).sum(0),
        lambda m: 2 * m + m @ torch.eye(m.shape[1]).double(),
        lambda m: m @ m.mT,
    ],
)
def test_views_and_combinations(pair, view):
    matrix, dense = pair
    close(view(matrix), view(dense))


def test_solutions_determinants_and_diagonals(pair):
    matrix, dense = pair
    if not matrix.is_square:
        pytest.skip("of square matrices")
    v = torch.rand(len(dense), 1).double()
    solution = torch.linalg.solve(dense, v)
    close(matrix.diagonal(), dense.diagonal())
    close(matrix.expand(2, *dense.shape).diagonal(dim1=-1, dim2=-2), dense.diagonal().expand(2, -1))
    close(matrix.solve(v), solution)
    close(matrix.logdet(), dense.logdet())
    close(matrix.inv_quad(v), (v * solution).sum())
    close(matrix.add_diagonal(v[:, 0]).logdet(), (dense + v[:, 0].diag()).logdet())
    with settings.max_cholesky_size(1), settings.cg_tolerance(1e-14), settings.max_cg_iterations(300):
        close(matrix.solve(v), solution, rtol=1e-4, atol=1e-5)  # its conjugate gradients, whose own floor this is


def test_what_is_no_operator_is_refused():
    with pytest.raises(TypeError, match="expected an operator of curvops, got Tensor"):
        to_linear_operator(torch.eye(2))
