"""The diagonal operator is the diagonal of the GGN or Fisher matrix, for every loss and model."""

import pytest

from curvops import EFLinearOperator, GGNLinearOperator
from kronecker.cases import PROBLEMS, build, close, dense_ggn, mlp


@pytest.mark.parametrize("name", PROBLEMS)
def test_against_autograd_and_the_empirical_fisher(name):
    model, loss, X, y = problem = PROBLEMS[name]()
    close(build("diagonal", problem, 4, 2).diagonal(), dense_ggn(problem).diagonal())
    expected = EFLinearOperator(model, loss, dict(model.named_parameters()), [(X, y)]).to_dense().diagonal()
    close(build("diagonal", problem, 4, 2, fisher_type="empirical").diagonal(), expected)


@pytest.mark.parametrize("samples", [1, 3])
def test_the_monte_carlo_fisher_with_the_same_samples(samples):
    model, loss, X, y = problem = mlp()
    fisher = GGNLinearOperator(model, loss, dict(model.named_parameters()), [(X, y)], mc_samples=samples, seed=4)
    diagonal = build("diagonal", problem, 4, 2, fisher_type="mc", mc_samples=samples, seed=4)
    close(diagonal.diagonal(), fisher.to_dense().diagonal())


def test_no_gradients_no_diagonal():
    for kind, rest in (("diagonal", "there is no diagonal"), ("ekfac", "there is nothing"), ("kfoc", "no product")):
        with pytest.raises(ValueError, match=f"'forward-only' takes no gradients, so {rest}"):
            build(kind, mlp(), fisher_type="forward-only").trace()
