"""Cross-entropy against PyTorch: every option, every shape."""

import itertools

import pytest
import torch
from torch import nn

from curvops.losses import Noise, output_loss
from curvops.losses.cross_entropy import sample_classes

from .oracles import (
    check_closed_form,
    check_factor,
    close,
    count,
    factor_matrix,
    gradient,
    hessian,
)

WEIGHT = torch.tensor([0.2, 0.0, 3.0, 1.0], dtype=torch.float64)
SHAPES = [(5, 4), (3, 4, 2), (2, 4, 2, 3), (4,)]
OPTIONS = list(itertools.product(SHAPES, [None, WEIGHT], [0.0, 0.3, 1.0], ["labels", "ignored", "soft"]))


def make_targets(shape, kind, randint, rand):
    if kind == "soft":
        y = rand(*shape)
        return y / y.sum(1 if len(shape) > 1 else 0, keepdim=True)
    y = randint(4, *(shape[:1] + shape[2:] if len(shape) > 1 else ()))
    if kind == "ignored":
        y.reshape(-1)[0] = -7
    return y


@pytest.mark.parametrize("shape,weight,smoothing,targets", OPTIONS)
def test_matches_pytorch(shape, weight, smoothing, targets, randn, rand, randint):
    z = randn(*shape)
    y = make_targets(shape, targets, randint, rand)
    options = {"weight": weight, "label_smoothing": smoothing, "ignore_index": -7}
    loss = output_loss(nn.CrossEntropyLoss(**options, reduction="sum"))
    plain = nn.CrossEntropyLoss(**options, reduction="sum")
    batch_size = shape[0] if len(shape) > 1 else 1
    curvature = check_closed_form(loss, plain, z, y, batch_size)
    assert (curvature.terms_per_datum or 0) * batch_size == z.numel() // 4

    # Σ_n of the empirical factor against per-term gradients over √ω
    empirical = curvature.factor("empirical")
    check_factor(empirical)
    rows = curvature.rows(z)
    omega = [term_weight(rows, curvature, t) for t in range(curvature.num_terms)]
    omega = torch.stack(omega)
    g = curvature.rows(gradient(lambda z: plain(z, y), z))
    expected = torch.where(omega > 1e-14, omega, 1).rsqrt()[:, None] * g
    close(empirical.dense()[..., 0], expected * (omega > 1e-14)[:, None])

    # the share of the denominator
    mean = nn.CrossEntropyLoss(**options)(z, y)
    mean_loss = output_loss(nn.CrossEntropyLoss(**options))
    if mean.isfinite():
        close(curvature.value() / count(mean_loss, (z, y, batch_size)), mean)
    else:
        with pytest.raises(ValueError, match="the mean runs over 0 entries"):
            count(mean_loss, (z, y, batch_size))


def term_weight(rows, curvature, t):
    """ω from the output Hessian itself: its trace over that of diag p - p pᵀ."""
    eye = torch.eye(curvature.width, dtype=torch.float64)
    zero = torch.zeros_like(rows)
    trace = torch.zeros((), dtype=torch.float64)
    for e in eye:
        u = zero.clone()
        u[t] = e
        product = curvature.rows(curvature.hessian_product(curvature.outputs(u)))
        trace = trace + (product[t] * e).sum()
    p = rows[t].softmax(-1)
    return trace / (1 - p.square().sum())


def test_sampled_factor_is_the_gradient_at_sampled_labels(randn, randint):
    z, y = randn(3, 4, 2), randint(4, 3, 2)
    y[1, 1] = -100
    curvature = output_loss(nn.CrossEntropyLoss(weight=WEIGHT)).curvature(z, y, 3)
    factor = curvature.factor("mc", mc_samples=5, noise=Noise(0, 0))
    check_factor(factor)
    omega = torch.where(y == -100, 0, WEIGHT[y.clamp(min=0)]).reshape(-1)
    p = curvature.rows(z).softmax(-1)
    columns = factor.dense() * 5**0.5
    for t, m in itertools.product(range(6), range(5)):
        candidates = omega[t].sqrt() * (p[t] - torch.eye(4, dtype=torch.float64))
        assert (candidates - columns[t, :, m]).abs().sum(1).min() < 1e-13


def test_sampled_factor_approaches_the_hessian(randn, randint):
    z, y = randn(2, 4), randint(4, 2)
    curvature = output_loss(nn.CrossEntropyLoss()).curvature(z, y, 2)
    samples = 40_000
    factor = curvature.factor("mc", mc_samples=samples, noise=Noise(3, 0))
    H = hessian(lambda z: nn.CrossEntropyLoss(reduction="sum")(z, y), z)
    # entries of ssᵀ are at most 1 in size: five standard errors
    error = (factor_matrix(curvature, factor) - H).abs().max()
    assert error < 5 / samples**0.5


def test_noise_belongs_to_the_datum(randn, randint):
    z, y = randn(5, 4, 3), randint(4, 5, 3)
    loss = output_loss(nn.CrossEntropyLoss())
    whole = loss.curvature(z, y, 5).factor("mc", 2, Noise(1, 0)).dense()
    parts = [
        loss.curvature(z[a:b], y[a:b], b - a).factor("mc", 2, Noise(1, a)).dense() for a, b in ((0, 2), (2, 3), (3, 5))
    ]
    assert torch.equal(whole, torch.cat(parts))


def test_sample_classes_follows_the_probabilities():
    p = torch.tensor([[0.1, 0.0, 0.6, 0.3]], dtype=torch.float64)
    u = (torch.arange(1000, dtype=torch.float64)[None] + 0.5) / 1000
    counts = torch.bincount(sample_classes(p, u)[0], minlength=4)
    assert counts.tolist() == [100, 0, 600, 300]
    extreme = torch.tensor([[1e-300, 1 - 1e-16]], dtype=torch.float64)
    assert sample_classes(p, extreme)[0].tolist() == [0, 3]


def test_masked_logits_have_finite_curvature(randint):
    z = torch.zeros(3, 4, dtype=torch.float64)
    z[:, 0] = -torch.inf
    y = torch.tensor([1, 2, -100])
    for smoothing in (0.0, 0.1):
        loss = output_loss(nn.CrossEntropyLoss(label_smoothing=smoothing))
        curvature = loss.curvature(z, y, 3)
        assert curvature.gradient().isfinite().all()
        assert curvature.hessian_product(torch.ones_like(z)).isfinite().all()
    assert output_loss(nn.CrossEntropyLoss()).curvature(z, y, 3).value().isfinite()


def test_unnormalised_probabilities(randn, rand):
    """PyTorch accepts them; the weight of a term is then their sum."""
    z, y = randn(4, 3), rand(4, 3)
    check_closed_form(
        output_loss(nn.CrossEntropyLoss(reduction="sum")),
        nn.CrossEntropyLoss(reduction="sum"),
        z,
        y,
        4,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_computed_in_single(dtype, randn, randint):
    z, y = randn(3, 4).to(dtype), randint(4, 3)
    curvature = output_loss(nn.CrossEntropyLoss(weight=WEIGHT)).curvature(z, y, 3)
    assert curvature.gradient().dtype == torch.float32
    assert curvature.value().dtype == torch.float32
    assert curvature.factor("type-2").column(0).dtype == torch.float32
    assert curvature.factor("mc", 1, Noise(0, 0)).column(0).dtype == torch.float32
    assert curvature.factor("forward-only").dense().dtype == torch.float32
    assert curvature.hessian_product(z).dtype == dtype
    exact = output_loss(nn.CrossEntropyLoss(weight=WEIGHT)).curvature(z.double(), y, 3)
    torch.testing.assert_close(curvature.gradient().double(), exact.gradient(), rtol=1e-5, atol=1e-6)


def test_vocabulary_stays_linear():
    """No tensor of width² is made: a million times a million would not fit."""
    z = torch.zeros(1, 1_000_000)
    curvature = output_loss(nn.CrossEntropyLoss()).curvature(z, torch.tensor([3]), 1)
    factor = curvature.factor("type-2")
    assert factor.product(z).shape == z.shape
    assert factor.column(999_999).shape == z.shape
    sampled = curvature.factor("mc", 2, Noise(0, 0))
    assert sampled.product(z).shape == z.shape


@pytest.mark.parametrize(
    "z_shape,y,message",
    [
        (
            (3, 4),
            torch.tensor([0, 4, 1]),
            "labels from 0 to 3 or ignore_index=-100, got 4",
        ),
        ((3, 4), torch.tensor([0, -1, 1]), "got -1"),
        ((3, 4), torch.zeros(2, dtype=torch.long), r"labels of shape \(3,\)"),
        ((3, 4), torch.zeros(3, 4, dtype=torch.long), "integer labels"),
        ((3, 4), torch.zeros(3, 5), "probabilities of shape"),
        ((3, 4), torch.zeros(3, dtype=torch.bool), "got torch.bool"),
        ((3, 4), -torch.ones(3, 4), "non-negative sum"),
        ((), torch.tensor(0), "class axis"),
    ],
)
def test_rejects_targets_that_do_not_fit(z_shape, y, message):
    with pytest.raises(ValueError, match=message):
        output_loss(nn.CrossEntropyLoss()).curvature(torch.zeros(z_shape), y, 3)


def test_rejects_options_that_do_not_fit():
    with pytest.raises(ValueError, match="non-negative class weights"):
        output_loss(nn.CrossEntropyLoss(weight=-WEIGHT))
    with pytest.raises(ValueError, match="label_smoothing between 0 and 1"):
        output_loss(nn.CrossEntropyLoss(label_smoothing=1.5))
    with pytest.raises(ValueError, match="one weight for each of the 3 classes"):
        loss = output_loss(nn.CrossEntropyLoss(weight=WEIGHT))
        loss.curvature(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), 2)


def test_factor_arguments(randn, randint):
    curvature = output_loss(nn.CrossEntropyLoss()).curvature(randn(3, 4), randint(4, 3), 3)
    with pytest.raises(ValueError, match="expected a kind of 'type-2', 'mc'"):
        curvature.factor("type-1")
    with pytest.raises(ValueError, match="needs noise"):
        curvature.factor("mc")
    with pytest.raises(ValueError, match="at least one"):
        curvature.factor("mc", 0, Noise(0, 0))
    with pytest.raises(ValueError, match=r"expected shape \(3, 4\), got \(4, 3\)"):
        curvature.rows(randn(4, 3))
    with pytest.raises(IndexError, match="0 <= k < 4, got 4"):
        curvature.factor("type-2").column(4)
    with pytest.raises(ValueError, match="expected rows of shape"):
        curvature.factor("type-2").product(randn(4, 3))
