"""Closed forms against PyTorch: every option, every shape; and what all losses have in common."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from problems import LOSSES
from torch import nn

from curvops.losses import Noise, output_loss
from curvops.losses.cross_entropy import sample_classes

from .oracles import check_factor, check_loss, close, count, factor_matrix, gradient, hessian

CLASSES = torch.tensor([0.2, 0.0, 3.0, 1.0], dtype=torch.float64)
WEIGHT = torch.tensor([0.0, 2.0, 0.5], dtype=torch.float64)
POS_WEIGHT = torch.tensor([3.0, 0.0, 0.5], dtype=torch.float64)


def make_targets(shape, kind, randint, rand):
    if kind == "soft":
        y = rand(*shape)
        return y / y.sum(1 if len(shape) > 1 else 0, keepdim=True)
    y = randint(4, *(shape[:1] + shape[2:] if len(shape) > 1 else ()))
    if kind == "ignored":
        y.reshape(-1)[0] = -7
    return y


@pytest.mark.parametrize("targets", ["labels", "ignored", "soft"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("weight", [None, CLASSES], ids=["plain", "weighted"])
@pytest.mark.parametrize("shape", [(5, 4), (3, 4, 2), (2, 4, 2, 3), (4,)], ids=str)
def test_cross_entropy(shape, weight, smoothing, targets, randn, rand, randint):
    z, y = randn(*shape), make_targets(shape, targets, randint, rand)
    options = {"weight": weight, "label_smoothing": smoothing, "ignore_index": -7}
    plain = nn.CrossEntropyLoss(**options, reduction="sum")
    batch_size = shape[0] if len(shape) > 1 else 1
    curvature = check_loss(plain, z, y, batch_size)
    assert curvature.psd and (curvature.terms_per_datum or 0) * batch_size == z.numel() // 4
    # Σ_n of the empirical factor against per-term gradients over √ω
    rows = curvature.rows(z)
    omega = torch.stack([term_weight(rows, curvature, t) for t in range(curvature.num_terms)])
    g = curvature.rows(gradient(lambda z: plain(z, y), z))
    expected = torch.where(omega > 1e-14, omega, 1).rsqrt()[:, None] * g
    close(curvature.factor("empirical").dense()[..., 0], expected * (omega > 1e-14)[:, None])


def term_weight(rows, curvature, t):
    """ω from the output Hessian itself: its trace over that of diag p - p pᵀ."""
    trace = 0
    for e in torch.eye(curvature.width, dtype=torch.float64):
        u = torch.zeros_like(rows)
        u[t] = e
        trace += (curvature.rows(curvature.hessian_product(curvature.outputs(u)))[t] * e).sum()
    return trace / (1 - rows[t].softmax(-1).square().sum())


def test_unnormalised_probabilities(randn, rand):
    """PyTorch accepts them; the weight of a term is then their sum."""
    check_loss(nn.CrossEntropyLoss(reduction="sum"), randn(4, 3), rand(4, 3), 4)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("pos_weight", [None, POS_WEIGHT], ids=["", "pos_weight"])
@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["", "weight"])
@pytest.mark.parametrize("shape", [(5, 3), (2, 4, 3), (4,)], ids=str)
def test_binary_cross_entropy(shape, weight, pos_weight, soft, randn, rand):
    z, y = randn(*shape), rand(*shape)
    y = y if soft else y.round()
    # a weight for the last axis; of a one-axis output, a lone one
    weight, pos_weight = (w if w is None or len(shape) > 1 else w[2:] for w in (weight, pos_weight))
    curvature = check_loss(nn.BCEWithLogitsLoss(weight, pos_weight=pos_weight), z, y, shape[0])
    # the weight enters by its root, and a zero contributes nothing
    g = gradient(lambda z: F.binary_cross_entropy_with_logits(z, y, pos_weight=pos_weight, reduction="sum"), z)
    expected = curvature.rows((1 if weight is None else weight.sqrt()) * g)
    close(curvature.factor("empirical").dense()[..., 0], expected)


def test_binary_weights_with_inner_axes(randn, rand):
    z, y = randn(2, 4, 3), rand(2, 4, 3)
    for shape in ((4, 3), (1, 4, 3), (4, 1), (1, 1, 3), ()):
        check_loss(nn.BCEWithLogitsLoss(rand(*shape), pos_weight=rand(*shape), reduction="sum"), z, y, 2)


@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 4), (2, 2, 3, 2), (4,), ()], ids=str)
def test_squared_error(shape, randn):
    z, y = randn(*shape), randn(*shape)
    batch_size, width = shape[0] if shape else 1, shape[-1] if len(shape) > 1 else 1
    curvature = check_loss(nn.MSELoss(), z, y, batch_size, root=1)
    assert curvature.psd and curvature.width == width
    assert curvature.terms_per_datum == z.numel() // width // batch_size


@pytest.mark.parametrize("name", LOSSES)
def test_the_derivative_of_the_gradient_is_autograds(name):
    p = LOSSES[name]()
    loss = output_loss(p.loss, p.options.get("reduction"))
    z = p.model(p.X).detach().requires_grad_()
    curvature = loss.curvature(z.detach(), p.y, len(p.X))
    if not curvature.closed_form:
        with pytest.raises(ValueError, match="closed form"):
            curvature.gradient_at(z)
        return
    (slope,) = torch.autograd.grad(loss.curvature(z, p.y, len(p.X)).value(), z, create_graph=True)
    own = curvature.gradient_at(z)
    torch.testing.assert_close(own, slope, rtol=1e-12, atol=1e-14)
    us = torch.randn(3, *z.shape, generator=torch.Generator().manual_seed(0), dtype=z.dtype)
    for u in us:
        (expected,) = torch.autograd.grad(slope, z, u, retain_graph=True, materialize_grads=True)
        (found,) = torch.autograd.grad(own, z, u, retain_graph=True)
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)
    (together,) = torch.autograd.grad(own, z, us, retain_graph=True, is_grads_batched=True)
    torch.testing.assert_close(together[-1], found, rtol=1e-12, atol=1e-14)


# loss, shape of the output, kind of the target, samples, and the largest standard deviation of an entry of ssᵀ
SAMPLED = {
    "cross-entropy": (nn.CrossEntropyLoss(), (2, 4), "labels", 40_000, 1),
    "binary": (nn.BCEWithLogitsLoss(weight=WEIGHT, pos_weight=POS_WEIGHT), (2, 3), "real", 20_000, 6),
    "squared error": (nn.MSELoss(), (2, 3), "real", 20_000, 8**0.5),
    "autodiff": (lambda z, y: F.cross_entropy(z, y, reduction="sum"), (3, 4), "labels", 20_000, 1),
}


@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_factor_approaches_the_hessian(name, randn, rand, randint):
    loss, shape, kind, samples, deviation = SAMPLED[name]
    z, y = randn(*shape), randint(4, shape[0]) if kind == "labels" else rand(*shape)
    reduction = "sum" if name == "autodiff" else None
    curvature = output_loss(loss, reduction).curvature(z, y, len(z))
    factor = curvature.factor("mc", samples, Noise(3, 0))
    c = 1 if reduction else count(output_loss(loss), (z, y, len(z)))
    error = factor_matrix(curvature, factor) - hessian(lambda z: c * loss(z, y), z)
    assert error.abs().max() < 5 * deviation / samples**0.5  # five standard errors
    check_factor(curvature.factor("mc", 3, Noise(0, 0)))


def test_sampled_factor_is_the_gradient_at_sampled_labels(randn, randint):
    z, y = randn(3, 4, 2), randint(4, 3, 2)
    y[1, 1] = -100
    curvature = output_loss(nn.CrossEntropyLoss(weight=CLASSES)).curvature(z, y, 3)
    factor = curvature.factor("mc", mc_samples=5, noise=Noise(0, 0))
    check_factor(factor)
    omega = torch.where(y == -100, 0, CLASSES[y.clamp(min=0)]).reshape(-1)
    p = curvature.rows(z).softmax(-1)
    columns = factor.dense() * 5**0.5
    for t, m in itertools.product(range(6), range(5)):
        candidates = omega[t].sqrt() * (p[t] - torch.eye(4, dtype=torch.float64))
        assert (candidates - columns[t, :, m]).abs().sum(1).min() < 1e-13


def test_sample_classes_follows_the_probabilities():
    p = torch.tensor([[0.1, 0.0, 0.6, 0.3]], dtype=torch.float64)
    u = (torch.arange(1000, dtype=torch.float64)[None] + 0.5) / 1000
    counts = torch.bincount(sample_classes(p, u)[0], minlength=4)
    assert counts.tolist() == [100, 0, 600, 300]
    extreme = torch.tensor([[1e-300, 1 - 1e-16]], dtype=torch.float64)
    assert sample_classes(p, extreme)[0].tolist() == [0, 3]


def test_masked_logits_have_finite_curvature():
    z = torch.zeros(3, 4, dtype=torch.float64)
    z[:, 0] = -torch.inf
    y = torch.tensor([1, 2, -100])
    for smoothing in (0.0, 0.1):
        curvature = output_loss(nn.CrossEntropyLoss(label_smoothing=smoothing)).curvature(z, y, 3)
        assert curvature.gradient().isfinite().all()
        assert curvature.hessian_product(torch.ones_like(z)).isfinite().all()
        assert smoothing or curvature.value().isfinite()


@pytest.mark.parametrize("gap", [10.0, 17.0, 25.0])
def test_a_class_that_is_sure_keeps_its_curvature_in_single_precision(gap):
    """There 1 - p and p (1 - p) cancel to nothing; the entries beside the diagonal do not, and each row adds up to zero."""
    z, y = torch.tensor([[gap, 0.5, 0.0]] * 3), torch.tensor([0, 1, 2])
    found = output_loss(nn.CrossEntropyLoss()).curvature(z, y, 3)
    p = z[0].double().softmax(0)
    expected = -torch.outer(p, p).fill_diagonal_(0)
    expected.diagonal().copy_(-expected.sum(1))
    columns = torch.stack([found.hessian_product(unit.expand(3, 3))[0] for unit in torch.eye(3)], 1)
    assert float((columns.double() - expected).norm() / expected.norm()) < 1e-6


def test_extreme_logits_keep_their_curvature():
    z = torch.tensor([[-60.0, 60.0]], dtype=torch.float64)
    curvature = output_loss(nn.BCEWithLogitsLoss()).curvature(z, torch.tensor([[1.0, 0.0]]), 1)
    tiny = torch.full((1, 2), -60.0, dtype=torch.float64).exp()
    torch.testing.assert_close(curvature.hessian_product(torch.ones_like(z)), tiny, rtol=1e-12, atol=0)
    assert curvature.value().item() == 120


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(weight=WEIGHT),
        nn.BCEWithLogitsLoss(weight=WEIGHT),
        nn.MSELoss(),
        nn.HuberLoss(),
        nn.SoftMarginLoss(),
        nn.BCELoss(weight=torch.ones(3)),
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_low_precision_is_computed_in_single(loss, dtype, randn, rand, randint):
    z = randn(4, 3).to(dtype)
    z, y = z.sigmoid() if isinstance(loss, nn.BCELoss) else z, rand(4, 3)
    if isinstance(loss, nn.CrossEntropyLoss):
        y = randint(3, 4)
    else:
        assert count(output_loss(loss), (z, y, 4)) == pytest.approx(12, rel=1e-12)
    curvature, exact = (output_loss(loss).curvature(z, y, 4) for z in (z, z.double()))
    for kind in ("type-2", "mc", "empirical", "forward-only"):
        assert curvature.factor(kind, 1, Noise(0, 0)).dense().dtype == torch.float32
    assert curvature.value().dtype == curvature.gradient().dtype == torch.float32
    assert curvature.hessian_product(z).dtype == dtype
    torch.testing.assert_close(curvature.gradient().double(), exact.gradient(), rtol=1e-5, atol=1e-6)


def test_vocabulary_stays_linear():
    """No tensor of width² is made: a million times a million would not fit."""
    z = torch.zeros(1, 1_000_000)
    curvature = output_loss(nn.CrossEntropyLoss()).curvature(z, torch.tensor([3]), 1)
    factor = curvature.factor("type-2")
    assert factor.product(z).shape == factor.column(999_999).shape == z.shape
    assert curvature.factor("mc", 2, Noise(0, 0)).product(z).shape == z.shape


LABELLED = nn.CrossEntropyLoss()


@pytest.mark.parametrize(
    "loss,z,y,message",
    [
        (LABELLED, torch.zeros(3, 4), torch.tensor([0, 4, 1]), "labels from 0 to 3 or ignore_index=-100, got 4"),
        (LABELLED, torch.zeros(3, 4), torch.tensor([0, -1, 1]), "got -1"),
        (LABELLED, torch.zeros(3, 4), torch.zeros(2, dtype=torch.long), r"labels of shape \(3,\)"),
        (LABELLED, torch.zeros(3, 4), torch.zeros(3, 4, dtype=torch.long), "integer labels"),
        (LABELLED, torch.zeros(3, 4), torch.zeros(3, 5), "probabilities of shape"),
        (LABELLED, torch.zeros(3, 4), torch.zeros(3, dtype=torch.bool), "got torch.bool"),
        (LABELLED, torch.zeros(3, 4), -torch.ones(3, 4), "non-negative sum"),
        (LABELLED, torch.zeros(()), torch.tensor(0), "class axis"),
        *(
            (nn.BCEWithLogitsLoss(**{option: torch.ones(weight)}), torch.zeros(z), torch.ones(z), message)
            for option in ("weight", "pos_weight")
            for z, weight, message in (
                ((4, 3), (4, 3), f"the {option} of shape .* batch axis"),
                ((4, 3), (4, 1), f"the {option} of shape .* batch axis"),
                ((4,), (4,), "batch axis"),
                ((4, 3), (4,), f"a {option} that broadcasts"),
            )
        ),
        (nn.CrossEntropyLoss(CLASSES), torch.zeros(2, 3), torch.tensor([0, 0]), "one weight for each of the 3 classes"),
        (nn.BCEWithLogitsLoss(pos_weight=WEIGHT), torch.zeros(2, 3), torch.full((2, 3), 2.0), "between 0 and 1"),
        (nn.BCEWithLogitsLoss(), torch.zeros(2, 3), torch.ones(2), "output's shape"),
        (nn.MSELoss(), torch.zeros(5, 1), torch.zeros(5), r"output's shape \(5, 1\), got \(5,\)"),
        (nn.MSELoss(), torch.zeros(2, 2) * 1j, torch.zeros(2, 2), "real floating-point"),
    ],
)
def test_rejects_what_does_not_fit(loss, z, y, message):
    with pytest.raises(ValueError, match=message):
        output_loss(loss).curvature(z, y, len(z) if z.ndim else 1)


def test_factor_arguments(randn, randint):
    curvature = output_loss(nn.CrossEntropyLoss()).curvature(randn(3, 4), randint(4, 3), 3)
    exact, wrong = curvature.factor("type-2"), randn(4, 3)
    for call, error, message in (
        (lambda: curvature.factor("type-1"), ValueError, "expected a kind of 'type-2', 'mc'"),
        (lambda: curvature.factor("mc"), ValueError, "needs noise"),
        (lambda: curvature.factor("mc", 0, Noise(0, 0)), ValueError, "at least one"),
        (lambda: curvature.rows(wrong), ValueError, r"expected shape \(3, 4\), got \(4, 3\)"),
        (lambda: exact.column(4), IndexError, "0 <= k < 4, got 4"),
        (lambda: exact.product(wrong), ValueError, "expected rows of shape"),
    ):
        with pytest.raises(error, match=message):
            call()
