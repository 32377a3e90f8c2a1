"""Losses that are no sums over data are refused, in a batch and between batches, however special the outputs are."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvops.losses import output_loss

from .oracles import close
from .test_walk import NOT_A_SUM, UNSEEN, check, cut, cuts, refused, walked


def weighted_mean(z, target):
    y, w = target
    return (w * F.cross_entropy(z, y, reduction="none")).sum() / w.sum()


def weighted_fit(z, target):
    y, w = target
    return ((z - y).square().mean(1) * w).sum() / w.sum()


def weighted_margin(z, target):
    y, w = target
    return (torch.stack([F.multi_margin_loss(a, b) for a, b in zip(z, y, strict=True)]) * w).sum() / w.sum()


def root(z, y, reduction="mean"):
    return z.square().sum() / (len(z) ** 0.5 if reduction == "mean" else 1)


def squared():
    loss = nn.CrossEntropyLoss()
    loss.register_forward_hook(lambda module, inputs, output: output.square())
    return loss


class Deaf(nn.Module):
    reduction = "mean"

    def forward(self, z, y):
        return F.cross_entropy(z, y)


Z = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS, FAR, RISING = torch.tensor([0, 1, 1, 2]), torch.eye(4).double() * 9, torch.arange(1.0, 5).double()
REFUSED = {
    # each datum has the same loss at outputs that are all zero, the same gradient at a perfect fit
    "weights, equal losses": (lambda z, y: F.cross_entropy(z, y, RISING[:3]), 0 * Z, LABELS, "mean"),
    "weights, perfect fit": (weighted_fit, Z, (Z.clone(), RISING), "mean"),
    # neither gradient nor curvature is there: other outputs tell
    "weights beyond the margin": (weighted_margin, FAR, (torch.arange(4), RISING), "mean"),
    "centred": (lambda z, y: (z - z.mean(0)).square().sum(), Z, None, "sum"),
    "divided by no sum": (root, Z, None, None),
    "squaring hook": (squared(), Z, LABELS, None),
    "deaf to its reduction": (Deaf(), Z, LABELS, None),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_sum_is_refused_however_it_is_cut(name):
    refused(*REFUSED[name], match=f"{NOT_A_SUM}.* mixes data, or divides by .* lambda z, y: loss")


def own_mean(z, y):
    return F.cross_entropy(z, y)


def divided(z, y, reduction="mean"):
    return z.square().sum() / (1 if reduction == "sum" else z.exp().sum())


WEIGHTS = torch.ones(40).double().index_fill(0, torch.tensor(33), 0)
SPARSE = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)).double(), torch.arange(40) % 3
UNEQUAL = {
    "a divisor of the output": (divided, None, [(Z[:1], None, 1)], "divides by depends on the model's output"),
    "flattened positions, 1 and 2": (own_mean, "mean", [(Z[:2], LABELS[:2], 2), (Z, LABELS, 2)], NOT_A_SUM),
    "flattened positions, 2 and 1": (own_mean, "mean", [(Z[:3], LABELS[:3], 2)] * 2, UNSEEN),
    # the few that stand for a batch are compared with the rest of it, too
    "long and alike at first": (weighted_mean, "mean", cut(SPARSE[0], (SPARSE[1], WEIGHTS), 20, 20), NOT_A_SUM),
}


@pytest.mark.parametrize("name", UNEQUAL)
def test_unequal_batches_are_refused(name):
    loss, reduction, batches, match = UNEQUAL[name]
    with pytest.raises(ValueError, match=match):
        walked(output_loss(loss, reduction), batches)


def test_what_looks_like_these_is_accepted():
    for loss in (root, squared()):
        check(loss, cut(Z[:1], LABELS[:1]), (Z[:1], LABELS[:1]))
    for sizes in cuts(4):
        check(lambda z, y: Deaf()(z, y), cut(Z, LABELS, *sizes), (Z, LABELS), "mean")
        walked(output_loss(weighted_margin, "mean"), cut(FAR, (torch.arange(4), torch.ones(4).double()), *sizes))


def test_targets_that_are_no_data_stay_whole(randn, randint):
    z, y, weight = randn(7, 3), randint(3, 7), torch.tensor([1.0, 5.0, 0.1], dtype=torch.float64)

    def loss(z, target):
        y, weight, _ = target
        return (F.cross_entropy(z, y, reduction="none") * weight.sum()).mean()

    batches = [(a, (b, weight.unsqueeze(0).expand(2, 3), "x"), n) for a, b, n in cut(z, y, 3, 4)]
    check(loss, batches, (z, (y, weight.expand(2, 3), "x")), "mean")


def test_what_cannot_be_cut_is_refused_from_the_second_batch_on(randn):
    class Target:
        def __init__(self, y):
            self.y = y

    z, y = randn(4, 3), randn(4, 3)

    def loss(z, target):
        return (z - target.y).square().mean()

    check(loss, [(z, Target(y), 4)], (z, Target(y)), "mean")
    halves = [(z[:2], Target(y[:2]), 2), (z[2:], Target(y[2:]), 2)]
    with pytest.raises(ValueError, match=UNSEEN):
        walked(output_loss(loss, "mean"), halves)
    _, found = walked(output_loss(lambda z, t: (z - t.y).square().sum(), "sum"), halves)
    close(sum(f.value() for f in found), (z - y).square().sum())


def test_a_loader_may_overwrite_its_batches(randn, rand):
    z, y, w, buffer = randn(4, 3), randn(4, 3), torch.tensor([1.0, 1.0, 0.5, 0.5]), torch.empty(2)

    def batches():
        for at in (0, 2):
            buffer.copy_(w[at : at + 2])
            yield z[at : at + 2], {"y": y[at : at + 2], "w": buffer}, 2

    def loss(z, t):
        return ((z - t["y"]).square().mean(1) * t["w"].double()).sum() / t["w"].double().sum()

    with pytest.raises(ValueError, match="two batches joined"):
        walked(output_loss(loss, "mean"), batches())


def test_an_empty_mean_is_refused(randn):
    for loss in (nn.CrossEntropyLoss(), nn.NLLLoss()):
        walk = output_loss(loss).walk()
        walk.curvature(randn(2, 3), torch.full((2,), -100), 2)
        with pytest.raises(ValueError, match="the mean runs over 0 entries"):
            walk.constant()
    assert output_loss(nn.MSELoss(reduction="sum")).walk().constant() == 1.0


def test_losses_that_are_linear_in_the_output_say_so(randn, randint, rand):
    z, y = randn(4, 3), randint(3, 4)
    for loss, target in (
        (nn.NLLLoss(), y),
        (nn.KLDivLoss(reduction="batchmean"), rand(4, 3)),
        (lambda z, y, reduction="mean": z.mean() if reduction == "mean" else z.sum(), None),
        (lambda z, y, reduction="mean": z.square().mean() if reduction == "mean" else z.square().sum(), None),
        (nn.CrossEntropyLoss(), y),
        (nn.PoissonNLLLoss(), rand(4, 3)),
    ):
        curvature = output_loss(loss).curvature(z, target, 4)
        assert curvature.linear == (not curvature.hessian_product(torch.ones_like(z).cumsum(1)).any())
    assert output_loss(nn.NLLLoss()).curvature(z, y, 4).linear
    assert not output_loss(nn.HuberLoss()).curvature(z[:0], z[:0], 0).linear
