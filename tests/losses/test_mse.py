"""Squared error against PyTorch."""

import pytest
import torch
from torch import nn

from curvops.losses import Noise, output_loss

from .oracles import check_closed_form, check_factor, close, count, factor_matrix, gradient

SHAPES = [(5, 3), (2, 3, 4), (2, 2, 3, 2), (4,), ()]


@pytest.mark.parametrize("shape", SHAPES)
def test_matches_pytorch(shape, randn):
    z, y = randn(*shape), randn(*shape)
    plain = nn.MSELoss(reduction="sum")
    batch_size = shape[0] if shape else 1
    loss = output_loss(nn.MSELoss())
    curvature = check_closed_form(loss, plain, z, y, batch_size)
    width = shape[-1] if len(shape) > 1 else 1
    assert curvature.width == width
    assert curvature.terms_per_datum == z.numel() // width // batch_size
    empirical = curvature.factor("empirical")
    check_factor(empirical)
    g = curvature.rows(gradient(lambda z: plain(z, y), z))
    close(empirical.dense()[..., 0], g)
    close(curvature.value() / count(loss, (z, y, batch_size)), nn.MSELoss()(z, y))


def test_sampled_factor_approaches_the_hessian(randn):
    z = randn(2, 3)
    curvature = output_loss(nn.MSELoss()).curvature(z, z, 2)
    samples = 20_000
    factor = curvature.factor("mc", samples, Noise(0, 0))
    # entries of ssᵀ have a standard deviation of at most 2 √2: five standard errors
    error = factor_matrix(curvature, factor) - 2 * torch.eye(6, dtype=torch.float64)
    assert error.abs().max() < 5 * 8**0.5 / samples**0.5
    check_factor(curvature.factor("mc", 3, Noise(0, 0)))


def test_noise_belongs_to_the_datum(randn):
    z = randn(5, 2, 3)
    loss = output_loss(nn.MSELoss())
    whole = loss.curvature(z, z, 5).factor("mc", 2, Noise(1, 0)).dense()
    tail = loss.curvature(z[2:], z[2:], 3).factor("mc", 2, Noise(1, 2)).dense()
    assert torch.equal(whole[4:], tail)


def test_rejects_broadcasting(randn):
    loss = output_loss(nn.MSELoss())
    with pytest.raises(ValueError, match=r"output's shape \(5, 1\), got \(5,\)"):
        loss.curvature(randn(5, 1), randn(5), 5)


def test_rejects_complex_outputs(randn):
    z = randn(2, 2).to(torch.complex128)
    with pytest.raises(ValueError, match="real floating-point"):
        output_loss(nn.MSELoss()).curvature(z, z, 2)


def test_low_precision_is_computed_in_single(randn):
    z = randn(3, 2).half()
    curvature = output_loss(nn.MSELoss()).curvature(z, randn(3, 2), 3)
    assert curvature.gradient().dtype == curvature.value().dtype == torch.float32
    assert curvature.factor("mc", 1, Noise(0, 0)).column(0).dtype == torch.float32
    assert curvature.hessian_product(z).dtype == torch.float16
