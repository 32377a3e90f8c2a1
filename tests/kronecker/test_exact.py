"""Where theory says that a block is exact, it is; where it says that one form is nearer than another, it is."""

import pytest
import torch
from torch import nn

from curvops import EFLinearOperator, GGNLinearOperator
from kronecker.cases import (
    APPROXIMATIONS,
    PROBLEMS,
    blocks,
    build,
    close,
    dense_ggn,
    integers,
    masked,
    mlp,
    nearest_kronecker,
    real,
    seeded,
)
from kronecker.support import Row, ids
from kronecker.support import problem as layer_and_data
from kronecker.support import real as inputs

# each with one position
LAYERS = [
    Row("linear", lambda: nn.Linear(3, 4), inputs(3)),
    Row("conv1d", lambda: nn.Conv1d(2, 3, 3), inputs(2, 3)),
    Row("conv2d", lambda: nn.Conv2d(2, 3, 2, dilation=2), inputs(2, 3, 3)),
    Row("conv3d", lambda: nn.Conv3d(1, 2, 2), inputs(1, 2, 2, 2)),
    Row("grouped", lambda: nn.Conv2d(4, 6, 2, groups=2), inputs(4, 2, 2)),
    Row("depthwise", lambda: nn.Conv1d(3, 3, 2, groups=3), inputs(3, 2)),
    Row("transposed", lambda: nn.ConvTranspose2d(3, 2, 2), inputs(3, 1, 1)),
    Row("transposed grouped", lambda: nn.ConvTranspose1d(4, 2, 2, groups=2), inputs(4, 1)),
    Row("embedding", lambda: nn.Embedding(5, 3), ids()),
    Row("bilinear", lambda: nn.Bilinear(2, 3, 4), inputs(5), lambda layer, X: layer(X[:, :2], X[:, 2:])),
]
LOSSES = {
    "ce": lambda: (nn.CrossEntropyLoss(), torch.tensor([1])),
    "mse": lambda: (nn.MSELoss(), real(1, 2, seed=1)),
    "bce": lambda: (nn.BCEWithLogitsLoss(reduction="sum"), torch.rand(1, 2, dtype=torch.float64)),
}


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("approximation", APPROXIMATIONS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("layer", LAYERS, ids=lambda row: row.title)
def test_one_datum_and_one_position_give_the_ggn_block(layer, loss, approximation, separate):
    model, _, _, [(X, _)] = layer_and_data(layer)
    problem = model, LOSSES[loss]()[0], X[:1], LOSSES[loss]()[1]
    ggn = dense_ggn(problem)
    for kind in ("kfac", "ekfac", "kfoc"):
        op = build(kind, problem, kfac_approx=approximation, separate_weight_and_bias=separate)
        for placed, where, block in blocks(op):
            if "transposed" in layer.title and placed.names == ("layer.bias",):
                continue  # its position is each entry of the map, not each entry of the input
            expected = ggn[where[:, None], where]
            torch.testing.assert_close(block, expected, rtol=0, atol=1e-8 * float(ggn.abs().max()))


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("first", ["linear", "embedding", "conv"])
def test_deep_linear_networks_with_mse(first, reduction, separate):
    """The Jacobian at the output of each layer is the same for all data, so that expand is exact."""
    layers = {
        "linear": (lambda: nn.Linear(3, 4), real(7, 3)),
        "embedding": (lambda: nn.Embedding(5, 4), integers(5, 7)),
        "conv": (lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.Flatten()), real(7, 2, 3)),
    }
    make, X = layers[first]
    model = seeded(lambda: nn.Sequential(make(), nn.Linear(4, 3), nn.Linear(3, 2)))
    problem = model, nn.MSELoss(reduction=reduction), X, real(7, 2, seed=1)
    for kind in ("kfac", "ekfac", "kfoc"):
        op = build(kind, problem, 3, 4, separate_weight_and_bias=separate)
        close(op.to_dense(), masked(dense_ggn(problem), op), 1e-8)


def _distances(op, matrix):
    return {
        (placed.names, k): float((block - matrix[where[:, None], where]).norm())
        for k, (placed, where, block) in enumerate(blocks(op))
    }


@pytest.mark.parametrize("fisher_type", ["type-2", "empirical"])
@pytest.mark.parametrize("approximation", APPROXIMATIONS)
@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("name", ["mlp", "cnn", "tokens", "tied"])
def test_corrected_and_nearest_forms_are_nearer_than_kfac(name, separate, approximation, fisher_type):
    problem = PROBLEMS[name]()
    model, loss, X, y = problem
    options = {"kfac_approx": approximation, "separate_weight_and_bias": separate, "fisher_type": fisher_type}
    kfac, ekfac, kfoc = (build(kind, problem, **options) for kind in ("kfac", "ekfac", "kfoc"))
    if fisher_type == "type-2":
        matrix = dense_ggn(problem)
    else:
        matrix = EFLinearOperator(model, loss, dict(model.named_parameters()), [(X, y)]).to_dense()
    matrix = masked(matrix, kfac)
    rounding = 1e-12 * float(matrix.norm())
    far, near, nearest = (_distances(op, matrix) for op in (kfac, ekfac, kfoc))
    for block, distance in far.items():
        assert near[block] <= distance + rounding and nearest[block] <= distance + rounding, block
    close(ekfac.trace(), matrix.trace())


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("name", ["mlp", "cnn", "tokens"])
def test_the_nearest_product_is_the_one_of_the_singular_value_decomposition(name, separate, approximation):
    problem = PROBLEMS[name]()
    kfoc = build("kfoc", problem, kfac_approx=approximation, separate_weight_and_bias=separate)
    ggn, looked_at = dense_ggn(problem), 0
    for placed, where, found in blocks(kfoc):
        _, left, right = placed.block.shape
        if right == 1 or placed.names == ("embedding.weight",):  # its left factor is a diagonal by construction
            continue
        block = ggn[where[:, None], where]
        best = nearest_kronecker(block, left, right)
        distances = (found - block).norm(), (best - block).norm()
        torch.testing.assert_close(*distances, rtol=1e-8, atol=1e-10 * float(block.norm()))
        close(found, best, 1e-6)
        looked_at += 1
    assert looked_at >= 2


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
