"""Binary cross-entropy of logits against PyTorch."""

import itertools

import pytest
import torch
from torch import nn

from curvops.losses import Noise, output_loss

from .oracles import (
    check_closed_form,
    check_factor,
    close,
    count,
    factor_matrix,
    gradient,
    hessian,
)

SHAPES = [(5, 3), (2, 4, 3), (4,)]
WEIGHT = torch.tensor([0.0, 2.0, 0.5], dtype=torch.float64)
POS_WEIGHT = torch.tensor([3.0, 0.0, 0.5], dtype=torch.float64)


def fit(weight, shape):
    """A weight for the last axis; of a one-axis output, a lone one."""
    return weight if weight is None or len(shape) > 1 else weight[2:]


@pytest.mark.parametrize(
    "shape,weight,pos_weight,soft",
    list(itertools.product(SHAPES, [None, WEIGHT], [None, POS_WEIGHT], [False, True])),
)
def test_matches_pytorch(shape, weight, pos_weight, soft, randn, rand):
    z, y = randn(*shape), rand(*shape)
    y = y if soft else y.round()
    options = {"weight": fit(weight, shape), "pos_weight": fit(pos_weight, shape)}
    plain = nn.BCEWithLogitsLoss(**options, reduction="sum")
    loss = output_loss(nn.BCEWithLogitsLoss(**options))
    curvature = check_closed_form(loss, plain, z, y, shape[0])
    mean = nn.BCEWithLogitsLoss(**options)(z, y)
    close(curvature.value() / count(loss, (z, y, shape[0])), mean)

    # the weight enters by its root, and a zero contributes nothing
    empirical = curvature.factor("empirical")
    check_factor(empirical)
    unweighted = nn.BCEWithLogitsLoss(pos_weight=options["pos_weight"], reduction="sum")
    g = gradient(lambda z: unweighted(z, y), z)
    scale = 1 if options["weight"] is None else options["weight"].sqrt()
    close(empirical.dense()[..., 0], curvature.rows(scale * g))


def test_weights_with_inner_axes(randn, rand):
    z, y = randn(2, 4, 3), rand(2, 4, 3)
    for shape in ((4, 3), (1, 4, 3), (4, 1), (1, 1, 3), ()):
        options = {"weight": rand(*shape), "pos_weight": rand(*shape)}
        plain = nn.BCEWithLogitsLoss(**options, reduction="sum")
        check_closed_form(output_loss(plain), plain, z, y, 2)


def test_extreme_logits_keep_their_curvature():
    z = torch.tensor([[-60.0, 60.0]], dtype=torch.float64)
    loss = output_loss(nn.BCEWithLogitsLoss())
    curvature = loss.curvature(z, torch.tensor([[1.0, 0.0]]), 1)
    tiny = torch.full((1, 2), -60.0, dtype=torch.float64).exp()
    product = curvature.hessian_product(torch.ones_like(z))
    torch.testing.assert_close(product, tiny, rtol=1e-12, atol=0)
    assert curvature.value().item() == 120


def test_sampled_factor_approaches_the_hessian(randn, rand):
    z, y = randn(2, 3), rand(2, 3)
    options = {"weight": WEIGHT, "pos_weight": POS_WEIGHT}
    curvature = output_loss(nn.BCEWithLogitsLoss(**options)).curvature(z, y, 2)
    samples = 20_000
    factor = curvature.factor("mc", samples, Noise(0, 0))
    plain = nn.BCEWithLogitsLoss(**options, reduction="sum")
    H = hessian(lambda z: plain(z, y), z)
    # entries of ssᵀ are at most 2 · 3 in size: five standard errors
    error = (factor_matrix(curvature, factor) - H).abs().max()
    assert error < 5 * 6 / samples**0.5
    check_factor(curvature.factor("mc", 3, Noise(0, 0)))


def test_noise_belongs_to_the_datum(randn, rand):
    z, y = randn(5, 2, 3), rand(5, 2, 3)
    loss = output_loss(nn.BCEWithLogitsLoss())
    whole = loss.curvature(z, y, 5).factor("mc", 2, Noise(1, 0)).dense()
    tail = loss.curvature(z[2:], y[2:], 3).factor("mc", 2, Noise(1, 2)).dense()
    assert torch.equal(whole[4:], tail)


@pytest.mark.parametrize("option", ["weight", "pos_weight"])
def test_rejects_a_batch_axis(option, rand):
    y = rand(4, 3)
    for weight in (rand(4, 3), rand(4, 1)):
        loss = output_loss(nn.BCEWithLogitsLoss(**{option: weight}))
        with pytest.raises(ValueError, match=f"the {option} of shape .* batch axis"):
            loss.curvature(y, y, 4)
    loss = output_loss(nn.BCEWithLogitsLoss(**{option: rand(4)}))
    with pytest.raises(ValueError, match="batch axis"):
        loss.curvature(rand(4), rand(4), 4)
    with pytest.raises(ValueError, match=f"a {option} that broadcasts"):
        loss.curvature(y, y, 4)


def test_rejects_negative_weights_and_answers(randn):
    for option in ("weight", "pos_weight"):
        with pytest.raises(ValueError, match=f"non-negative {option}"):
            output_loss(nn.BCEWithLogitsLoss(**{option: -WEIGHT}))
    loss = output_loss(nn.BCEWithLogitsLoss(pos_weight=POS_WEIGHT))
    with pytest.raises(ValueError, match="between 0 and 1"):
        loss.curvature(randn(2, 3), 2 * torch.ones(2, 3), 2)
    with pytest.raises(ValueError, match="output's shape"):
        loss.curvature(randn(2, 3), torch.ones(2), 2)


def test_low_precision_is_computed_in_single(randn, rand):
    z, y = randn(3, 3).bfloat16(), rand(3, 3)
    curvature = output_loss(nn.BCEWithLogitsLoss(weight=WEIGHT)).curvature(z, y, 3)
    assert curvature.gradient().dtype == curvature.value().dtype == torch.float32
    assert curvature.factor("mc", 1, Noise(0, 0)).column(0).dtype == torch.float32
    assert curvature.hessian_product(z).dtype == torch.bfloat16
