"""Which loss functions are recognised, and what they say about their reduction."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvops.losses import output_loss

from .oracles import count

CLOSED = [
    (nn.CrossEntropyLoss, F.cross_entropy),
    (nn.BCEWithLogitsLoss, F.binary_cross_entropy_with_logits),
    (nn.MSELoss, F.mse_loss),
]


def compiled(function):
    """A compiled function; as it is in PyTorch 2.6, which cannot compile its own loss functions alone."""
    return function if torch.__version__ < (2, 7) else torch.compile(function, backend="eager")


@pytest.mark.parametrize("module,function", CLOSED)
def test_closed_forms(module, function, rand):
    z = rand(4, 3)
    y = z.round()
    for loss, reduction in (
        (module(), "mean"),
        (module(reduction="sum"), "sum"),
        (function, "mean"),
        (functools.partial(function, reduction="sum"), "sum"),
        (torch.compile(module(reduction="sum"), backend="eager"), "sum"),
        (compiled(function), "mean"),
    ):
        found = output_loss(loss)
        assert found.curvature(z, y, 4).closed_form
        assert found.reduction == reduction and found.psd
        assert output_loss(loss, reduction=reduction).reduction == reduction
    assert output_loss(function, reduction="sum").reduction == "sum"


def test_options_of_functional_forms_are_kept(randn, randint):
    z, y = randn(5, 3), randint(3, 5)
    y[0] = 7
    weight = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    options = {"weight": weight, "ignore_index": 7, "label_smoothing": 0.2}
    loss = output_loss(functools.partial(F.cross_entropy, **options))
    expected = F.cross_entropy(z, y, **options)
    torch.testing.assert_close(loss.curvature(z, y, 5).value() / count(loss, (z, y, 5)), expected)
    binary = functools.partial(F.binary_cross_entropy_with_logits, pos_weight=weight)
    value = output_loss(binary).curvature(z, z.sigmoid(), 5).value()
    torch.testing.assert_close(value / 15, binary(z, z.sigmoid()))


@pytest.mark.parametrize("module,function", [*CLOSED, (nn.HuberLoss, F.huber_loss)])
def test_reductions_are_refused_at_the_door(module, function):
    for loss in (module(reduction="none"), functools.partial(function, reduction="none")):
        with pytest.raises(ValueError, match="expected a reduction 'mean' or 'sum'"):
            output_loss(loss)
    with pytest.raises(ValueError, match="got 'none'"):
        output_loss(function, reduction="none")
    for loss in (module(), functools.partial(function, reduction="mean")):
        with pytest.raises(ValueError, match="has the reduction 'mean', but reduction='sum'"):
            output_loss(loss, reduction="sum")


def test_unknown_reductions():
    for loss in (lambda z, y: z.sum(), functools.partial(lambda a, z, y: z.sum(), 1)):
        with pytest.raises(ValueError, match=r"is not known\. Pass reduction='sum'"):
            output_loss(loss)
    assert output_loss(lambda z, y: z.sum(), reduction="sum").reduction == "sum"
    assert output_loss(F.huber_loss).reduction == "mean"
    assert output_loss(F.huber_loss, reduction="sum").reduction == "sum"
    assert output_loss(functools.partial(F.huber_loss, reduction="sum")).reduction == "sum"
    assert output_loss(nn.KLDivLoss(reduction="batchmean")).reduction == "mean"


@pytest.mark.filterwarnings("ignore:size_average and reduce args will be deprecated")
def test_deprecated_options():
    assert output_loss(nn.MSELoss(size_average=False)).reduction == "sum"
    assert output_loss(functools.partial(F.cross_entropy, size_average=False)).reduction == "sum"
    loss = output_loss(functools.partial(F.nll_loss, size_average=False))
    assert loss.reduction == "sum"
    z = torch.ones(2, 3)
    assert loss.curvature(z, torch.tensor([0, 1]), 2).value() == -2
    with pytest.raises(ValueError, match="got 'none'"):
        output_loss(nn.MSELoss(reduce=False))


def test_refuses_what_is_not_a_loss(rand):
    with pytest.raises(TypeError, match="expected a loss module or function"):
        output_loss("cross_entropy")
    with pytest.raises(TypeError, match="cannot be called as loss"):
        output_loss(nn.GaussianNLLLoss())
    with pytest.raises(TypeError, match="cannot be called as loss"):
        output_loss(lambda z: z.sum(), reduction="sum")
    with pytest.raises(ValueError, match="weight of 'mse_loss' has a batch axis"):
        output_loss(functools.partial(F.mse_loss, weight=rand(2, 2)))
