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


def total(z, y):
    return z.sum()


@pytest.mark.filterwarnings("ignore:size_average and reduce args will be deprecated")
def test_reductions():
    for loss, given, reduction in (
        (total, "sum", "sum"),
        (F.huber_loss, None, "mean"),
        (F.huber_loss, "sum", "sum"),
        (functools.partial(F.huber_loss, reduction="sum"), None, "sum"),
        (nn.KLDivLoss(reduction="batchmean"), None, "mean"),
        (nn.MSELoss(size_average=False), None, "sum"),
        (functools.partial(F.cross_entropy, size_average=False), None, "sum"),
        (functools.partial(F.nll_loss, size_average=False), None, "sum"),
    ):
        assert output_loss(loss, reduction=given).reduction == reduction
    assert output_loss(loss).curvature(torch.ones(2, 3), torch.tensor([0, 1]), 2).value() == -2
    with pytest.raises(ValueError, match="got 'none'"):
        output_loss(nn.MSELoss(reduce=False))


REFUSED = [
    (total, None, ValueError, r"is not known\. Pass reduction='sum'"),
    (functools.partial(lambda a, z, y: z.sum(), 1), None, ValueError, r"is not known\. Pass reduction='sum'"),
    ("cross_entropy", None, TypeError, "expected a loss module or function"),
    (nn.GaussianNLLLoss(), None, TypeError, "cannot be called as loss"),
    (lambda z: z.sum(), "sum", TypeError, "cannot be called as loss"),
    (functools.partial(F.mse_loss, weight=torch.ones(2, 2)), None, ValueError, "weight of 'mse_loss' has a batch axis"),
]
for module, option, value, message in (
    (nn.CrossEntropyLoss, "weight", -torch.ones(4), "non-negative class weights"),
    (nn.CrossEntropyLoss, "label_smoothing", 1.5, "label_smoothing between 0 and 1"),
    (nn.BCEWithLogitsLoss, "weight", -torch.ones(3), "non-negative weight"),
    (nn.BCEWithLogitsLoss, "pos_weight", -torch.ones(3), "non-negative pos_weight"),
):
    REFUSED.append((module(**{option: value}), None, ValueError, message))
for module, function in [*CLOSED, (nn.HuberLoss, F.huber_loss)]:
    for loss in (module(reduction="none"), functools.partial(function, reduction="none")):
        REFUSED.append((loss, None, ValueError, "expected a reduction 'mean' or 'sum'"))
    for loss in (module(), functools.partial(function, reduction="mean")):
        REFUSED.append((loss, "sum", ValueError, "has the reduction 'mean', but reduction='sum'"))
    REFUSED.append((function, "none", ValueError, "got 'none'"))


@pytest.mark.parametrize("loss,reduction,error,message", REFUSED)
def test_refused_at_the_door(loss, reduction, error, message):
    with pytest.raises(error, match=message):
        output_loss(loss, reduction=reduction)
