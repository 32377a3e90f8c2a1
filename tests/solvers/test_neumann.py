"""The truncated Neumann series against its closed form."""

import pytest
import torch

from curvops.solvers.neumann import neumann
from solvers.support import draws, symmetric


@pytest.mark.parametrize("num_terms", [1, 2, 17])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_closed_form(num_terms, preconditioned):
    matrix, b, eye = symmetric(torch.linspace(0.1, 3, 12)), draws(12, 3), torch.eye(12).double()
    inverse = torch.linspace(0.5, 1, 12).double() if preconditioned else None
    m = eye if inverse is None else torch.diag(inverse)
    damped = matrix + 0.2 * eye
    power = torch.linalg.matrix_power(eye - 0.3 * m @ damped, num_terms)
    found = neumann(matrix, b, num_terms=num_terms, scale=0.3, damping=0.2, preconditioner=inverse)
    torch.testing.assert_close(found.x, (eye - power) @ torch.linalg.solve(damped, b), rtol=0, atol=1e-12)
    residual = torch.linalg.vector_norm(b - damped @ found.x, dim=0) / torch.linalg.vector_norm(b, dim=0)
    torch.testing.assert_close(found.residual, residual, rtol=0, atol=1e-12)
    assert found.converged and found.iterations == num_terms and found.products == 3 * num_terms


def test_a_matrix_that_is_not_symmetric():
    matrix, b = torch.eye(6).double() + 0.1 * draws(6, 6), draws(6, seed=1)
    torch.testing.assert_close(neumann(matrix, b).x, torch.linalg.solve(matrix, b), rtol=0, atol=1e-10)


def test_the_scale_decides():
    """λ_max is 3: scales below 2/3 converge, those above diverge."""
    matrix, b = symmetric(torch.linspace(0.1, 3, 12)), draws(12)
    assert neumann(matrix, b, scale=0.66).converged
    for scale, terms in ((0.68, 200), (1.0, 100), (5.0, 100)):
        found = neumann(matrix, b, scale=scale, num_terms=terms)
        assert not found.converged and found.iterations < terms
        assert "diverges" in found.reason and "smaller scale, below 2 / λ_max" in found.reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_terms_that_do_not_shrink(dtype):
    """I − s A has an eigenvalue of absolute value one where b is not zero: x is no solution, and comes to none."""
    eye = torch.eye(5, dtype=dtype)
    singular = eye.clone()
    singular[4, 4] = 0
    for matrix, scale in ((eye, 2.0), (0 * eye, 1.0), (singular, 0.5)):
        for terms in (1, 2, 100):
            found = neumann(matrix, torch.ones(5, dtype=dtype), scale=scale, num_terms=terms)
            if matrix is not singular or terms == 100:
                assert not found.converged and "the terms do not shrink" in found.reason
    assert neumann(singular, singular @ torch.ones(5, dtype=dtype), scale=0.5).converged


def test_a_tolerance_ends_it_early():
    matrix, b = symmetric(torch.linspace(0.5, 1, 12)), draws(12)
    found = neumann(matrix, b, tolerance=1e-3)
    assert found.converged and found.iterations < 100 and found.residual <= 1e-3
    few = neumann(matrix, b, tolerance=1e-3, num_terms=2)
    assert not few.converged and "take more num_terms" in few.reason


@pytest.mark.parametrize("options,name", [({"scale": 0.0}, "scale"), ({"num_terms": 0}, "num_terms")])
def test_refusals(options, name):
    with pytest.raises(ValueError, match=f"neumann: {name}: expected"):
        neumann(torch.eye(2), torch.ones(2), **options)
