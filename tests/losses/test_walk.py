"""One pass over the data: the loss as it is now, in any format; and what is no sum over data is refused."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvops.losses import output_loss
from curvops.tree import map_tensors

from .oracles import close, gradient, hessian

NOT_A_SUM = "is not the (sum|mean) of the losses of its data"
UNSEEN = r"batches cannot be compared .* reduction='sum'"


def walked(loss, batches):
    """c, and the curvature of each batch (z, y, number of data)."""
    walk = loss.walk()
    found = [walk.curvature(*batch) for batch in batches]
    return walk.constant(), found


def check(loss_func, batches, whole, reduction=None):
    """c Σ of value, gradient and Hessian over batches are those of the loss itself on all data."""
    c, found = walked(output_loss(loss_func, reduction), batches)
    z, y = whole
    close(c * sum(f.value() for f in found), loss_func(z, y).detach())
    slopes = torch.cat([c * f.outputs(f.gradient()).flatten() for f in found])
    close(slopes, gradient(lambda z: loss_func(z, y), z).flatten())
    H = hessian(lambda z: loss_func(z, y), z)
    u = torch.randn(z.shape, generator=torch.Generator().manual_seed(9), dtype=z.dtype)
    parts = u.split([len(f.z) for f in found]) if z.ndim else [u]
    product = torch.cat([c * f.hessian_product(part).flatten() for f, part in zip(found, parts, strict=True)])
    close(product, H @ u.flatten())


def cut(z, y, *sizes):
    """Batches of some sizes, or one, with targets in any format."""
    stops = list(itertools.accumulate(sizes or [len(z)]))

    def part(a, b):
        return y[a:b] if isinstance(y, list) and len(y) == len(z) else map_tensors(lambda t: t[a:b], y)

    return [(z[a:b], part(a, b), b - a) for a, b in zip([0, *stops], stops, strict=False)]


def cuts(size):
    return (size,), (1, size - 1), (1,) * size


def refused(loss, z, y, reduction, match):
    for sizes in cuts(len(z)):
        with pytest.raises(ValueError, match=match):
            walked(output_loss(loss, reduction), cut(z, y, *sizes))


def test_an_option_that_became_wrong_is_refused(randn, randint):
    loss = nn.CrossEntropyLoss()
    asked = output_loss(loss)
    loss.label_smoothing = 2.0
    with pytest.raises(ValueError, match="label_smoothing between 0 and 1"):
        asked.curvature(randn(2, 3), randint(3, 2), 2)
    loss.reduction = "none"
    with pytest.raises(ValueError, match="'mean' or 'sum' of 'CrossEntropyLoss', got 'none'"):
        asked.walk()
    with pytest.raises(ValueError, match="got 'none'"):
        print(asked.reduction)


def test_closed_forms_serve_where_there_is_nothing_to_compare(randn):
    z, ignored = randn(3, 4), torch.full((3,), -100)
    assert output_loss(nn.CrossEntropyLoss()).curvature(z, ignored, 3).closed_form
    assert output_loss(nn.CrossEntropyLoss()).curvature(z[:0], ignored[:0], 0).closed_form
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for scale in (0, 1e-6, 1, 1e3):
            for options in ({}, {"label_smoothing": 0.2}, {"weight": torch.tensor([1e-3, 0.0, 5.0, 1.0])}):
                loss = nn.CrossEntropyLoss(**options)
                far = (scale * torch.randn(50, 4, generator=torch.Generator().manual_seed(0))).to(dtype)
                assert output_loss(loss).curvature(far, far.argmax(1), 50).closed_form
            y = (far > 0).to(dtype)
            assert output_loss(nn.BCEWithLogitsLoss(pos_weight=torch.tensor(3.0))).curvature(far, y, 50).closed_form
            assert output_loss(nn.MSELoss()).curvature(far, y, 50).closed_form
            assert output_loss(nn.MSELoss()).curvature(far, far.clone(), 50).closed_form


def test_a_regulariser_of_a_sum_is_refused(randn, randint):
    z, y, w = randn(6, 3), randint(3, 6), randn(4, 3).requires_grad_()
    for tiny in (0.3, 1e-9):

        def total(z, y, tiny=tiny):
            return F.cross_entropy(z, y, reduction="sum") + tiny * w.square().sum()

        refused(total, z, y, "sum", match=r"belongs to no datum.*reduction='mean'")


def weighted(z, y, weight=None, reduction="mean"):
    terms = F.cross_entropy(z, y, reduction="none") * weight[y]
    return terms.sum() if reduction == "sum" else terms.sum() / weight[y].sum()


class Weighted(nn.Module):
    def __init__(self, weight, reduction):
        super().__init__()
        self.register_buffer("weight", weight)
        self.reduction = reduction

    def forward(self, z, y):
        return weighted(z, y, self.weight, self.reduction)


def test_gradients_flow_to_the_very_tensors_of_the_loss(randn, randint):
    z, y = randn(6, 3), randint(3, 6)
    for dtype in (torch.float64, torch.float32):  # the second is brought to the output's precision
        weight = torch.tensor([0.5, 2.0, 1.0], dtype=dtype, requires_grad=True)
        module = Weighted(weight, "sum")
        for loss in (module, functools.partial(weighted, weight=weight, reduction="sum")):
            _, found = walked(output_loss(loss), cut(z, y, 2, 4))
            (slope,) = torch.autograd.grad(sum(f.value() for f in found), weight)
            (expected,) = torch.autograd.grad(weighted(z, y, weight.double(), "sum"), weight)
            close(slope, expected)
        assert module.weight is weight and weight.grad is None
        with pytest.raises(ValueError, match=r"divides by depends on .* trained weights"):
            walked(output_loss(Weighted(weight, "mean")), cut(z, y, 2, 4))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.reduction = "mean"
        self.scale = nn.Parameter(torch.tensor([0.5, 2.0, 1.0]))
        self.inner = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([3.0, 1.0, 0.5]), reduction="none")

    def forward(self, z, y):
        terms = self.inner(self.scale * z, y)
        return terms.mean() if self.reduction == "mean" else terms.sum()


def test_a_module_with_parameters_is_shared_and_not_changed(randn, rand):
    z, y, loss = randn(6, 3), rand(6, 3), Scaled()
    before = {k: (id(t), t.dtype, t.clone()) for k, t in [*loss.named_parameters(), *loss.named_buffers()]}
    c, found = walked(output_loss(loss), cut(z, y, 1, 5))
    (slope,) = torch.autograd.grad(c * sum(f.value() for f in found), loss.scale)
    (expected,) = torch.autograd.grad(loss(z, y), loss.scale)
    torch.testing.assert_close(slope, expected, rtol=1e-6, atol=0)
    assert loss.reduction == "mean" and type(loss.inner) is nn.BCEWithLogitsLoss
    for name, t in [*loss.named_parameters(), *loss.named_buffers()]:
        assert (id(t), t.dtype) == before[name][:2] and torch.equal(t, before[name][2])


def test_a_loss_that_updates_its_buffers_keeps_them(randn):
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.centre, self.calls = nn.Buffer(torch.zeros(3).double()), nn.Buffer(torch.zeros(()))

        def forward(self, z, y):
            self.calls += 1
            self.centre = 0.5 * self.centre + 0.5 * z.detach().mean(0)
            return (z - y).square().mean() + self.calls

    z, y, loss = randn(4, 3), randn(4, 3), Centred()
    _, found = walked(output_loss(loss, "mean"), cut(z, y, 2, 2))
    close(found[0].value(), 2 * ((z[:2] - y[:2]).square().mean() + 1))
    close(found[0].hessian_product(z[:2]), 2 / 3 * z[:2])
    assert not loss.centre.any() and loss.calls == 0


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


def test_a_weighted_mean_of_ones_own_names_the_losses_that_tell_what_they_divide_by():
    w = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    z = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = z, torch.tensor([0, 1, 2, 2, 1, 2])
    halves = [(z[part], whole[1][part], 3) for part in (slice(0, 3), slice(3, 6))]
    with pytest.raises(
        ValueError, match=r"nn\.CrossEntropyLoss\(weight=w\) or functools\.partial\(F\.cross_entropy, weight=w\)"
    ):
        walked(output_loss(lambda z, y: F.cross_entropy(z, y, weight=w), "mean"), halves)
    for loss in (nn.CrossEntropyLoss(weight=w), functools.partial(F.cross_entropy, weight=w)):
        check(loss, halves, whole)
