"""The fallback: against closed forms, against dense autograd, and at its limits."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from curvops.losses import Noise, output_loss

from .oracles import check_loss, close, count, factor_matrix, gradient, hessian

W = torch.tensor([0.5, 2.0, 0.0, 1.0], dtype=torch.float64)
# name -> (module, output, target) of 6 data with 4 entries
LOSSES = {
    "huber": lambda d: (nn.HuberLoss(delta=0.7), d.z, d.real),
    "smooth_l1": lambda d: (nn.SmoothL1Loss(beta=0.7), d.z, d.real),
    "l1": lambda d: (nn.L1Loss(), d.z, d.real),
    "poisson": lambda d: (nn.PoissonNLLLoss(), d.z, d.real.abs()),
    "soft_margin": lambda d: (nn.SoftMarginLoss(), d.z, d.real.sign()),
    "hinge_embedding": lambda d: (nn.HingeEmbeddingLoss(), d.z, d.real.sign()),
    "bce": lambda d: (nn.BCELoss(), 0.1 + 0.8 * d.z.sigmoid(), d.unit),
    "bce_weighted": lambda d: (nn.BCELoss(weight=W), 0.1 + 0.8 * d.z.sigmoid(), d.unit),
    "kl_batchmean": lambda d: (nn.KLDivLoss(reduction="batchmean"), d.z.log_softmax(1), d.unit),
    "nll": lambda d: (nn.NLLLoss(), d.z.log_softmax(1), d.labels),
    "nll_weighted": lambda d: (nn.NLLLoss(weight=W, ignore_index=1), d.z, d.labels),
    "nll_positions": lambda d: (nn.NLLLoss(weight=W), d.z.view(3, 4, 2), d.labels.view(3, 2)),
    "multi_margin": lambda d: (nn.MultiMarginLoss(), d.z, d.labels),
    "multi_margin_2": lambda d: (nn.MultiMarginLoss(p=2, margin=0.5, weight=W), d.z, d.labels),
    "multilabel_margin": lambda d: (nn.MultiLabelMarginLoss(), d.z, d.lists),
    "multilabel_soft": lambda d: (nn.MultiLabelSoftMarginLoss(), d.z, d.unit.round()),
}


class Data:
    def __init__(self):
        g = torch.Generator().manual_seed(3)
        self.z, self.real = torch.randn(2, 6, 4, generator=g, dtype=torch.float64)
        self.unit = torch.rand(6, 4, generator=g, dtype=torch.float64)
        self.labels = torch.randint(4, (6,), generator=g)
        self.lists = torch.tensor(
            [[0, 2, -1, 1], [3, -1, 0, 0], [-1, 1, 2, 3], [0, 1, 2, 3], [2, 2, -1, -1], [1, 0, 3, -1]]
        )


@pytest.mark.parametrize("name", LOSSES)
def test_matches_pytorch(name):
    module, z, y = LOSSES[name](Data())
    curvature = check_loss(module, z, y, len(z))
    assert torch.linalg.eigvalsh(factor_matrix(curvature, curvature.factor("type-2"))).min() > -1e-12
    assert not curvature.closed_form and (curvature.psd or name == "poisson")


def test_terms_are_probed(randn, randint):
    z, y = randn(4, 3, 2), randint(3, 4, 2)

    def by_position(z, y):
        return F.cross_entropy(z, y, reduction="sum")

    # the class axis is not the last: a term is a whole datum
    curvature = output_loss(by_position, reduction="sum").curvature(z, y, 4)
    assert (curvature.num_terms, curvature.width, curvature.terms_per_datum) == (4, 6, 1)
    curvature = output_loss(lambda z, y: (z - y).cosh().sum(), reduction="sum").curvature(z, z, 4)
    assert (curvature.num_terms, curvature.width, curvature.terms_per_datum) == (12, 2, 3)
    single = output_loss(lambda z, y: (z - y).cosh().sum(), reduction="sum").curvature(z[:, 0, 0], z[:, 1, 0], 4)
    assert (single.num_terms, single.width) == (4, 1)
    scalar = output_loss(lambda z, y: z.cosh(), reduction="sum").curvature(z[0, 0, 0], y, 1)
    assert scalar.factor("type-2").dense().shape == (1, 1, 1)


def smoothed_mean(z, y):
    return F.smooth_l1_loss(z.mean(1), y, reduction="sum")


def hinge_of_mean(z, y):
    return (1 - y * z.mean(1)).relu().sum()


def masked_difference(z, y):
    return (y * (z[:, 1] - z[:, 0])).square().sum() + z.square().sum()


def ranking(z, y):
    scores = z.sum(-1)
    return (1 - (scores[:, :, None] - scores[:, None]) * y[:, :1, None]).relu().triu(1).sum()


def chosen_sum(z, y):
    return torch.where(y > 0, z.sum(1).square(), z.square().sum(1)).sum()


@pytest.mark.parametrize(
    "loss, y",
    [
        (smoothed_mean, torch.tensor([9.0, 0.0, 9.0, 0.0])),
        (hinge_of_mean, torch.tensor([1.0, -1.0, 1.0, -1.0])),
        (ranking, torch.tensor([1.0, -1.0, 1.0, -1.0])),
    ],
)
def test_terms_do_not_depend_on_the_batch(loss, y, randn):
    """Positions are coupled beyond a kink only, or by the gradient's jumps alone."""
    z, y = randn(4, 5, 2), y.double()[:, None].expand(-1, 2)
    shown = output_loss(loss, reduction="sum")
    for some in (slice(0, 4), slice(1, 3), slice(0, 1), slice(1, 2), slice(2, 3), slice(3, 4)):
        curvature = shown.curvature(z[some], y[some], len(z[some]))
        assert (curvature.num_terms, curvature.width) == (len(z[some]), 10)


@pytest.mark.parametrize("loss", [masked_difference, chosen_sum])
def test_terms_of_two_kinds_are_refused(loss, randn):
    """Where some data are coupled, and a batch has none of these."""
    z, y = randn(4, 5, 2), torch.tensor([1.0, 0, 0, 1]).double()[:, None].expand(-1, 2)
    shown = output_loss(loss, reduction="sum")
    assert shown.curvature(z, y, 4).num_terms == 4
    walk = shown.walk()
    assert walk.curvature(z[:2], y[:2], 2).num_terms == 2
    with pytest.raises(ValueError, match="couples what the output of a datum consists of in some batches only"):
        _ = walk.curvature(z[1:3], y[1:3], 2).num_terms
    gone_on = shown.walk()
    gone_on.resume(*walk.progress)
    with pytest.raises(ValueError, match="in some batches only"):
        _ = gone_on.curvature(z[1:3], y[1:3], 2).num_terms
    with pytest.raises(ValueError, match="in some batches only"):  # another process's share
        walk.compare([walk.first, (0, None, False)])


def shifted(z, y):
    scores = z - z.max().detach()
    return (scores.exp().sum(-1).log() - scores[..., 0]).sum()


@pytest.mark.parametrize(
    "loss",
    [
        lambda z, y: torch.linalg.vector_norm(z - y) ** 2,
        lambda z, y: torch.dist(z, y) ** 2,
        lambda z, y: ((torch.eye(5).to(z) @ z - y) ** 2).sum(),
        shifted,
    ],
)
def test_what_all_positions_share_need_not_couple_them(loss, randn):
    z, y = randn(4, 5, 2), randn(4, 5, 2)
    for dtype in (torch.float64, torch.float32):
        assert output_loss(loss, reduction="sum").curvature(z.to(dtype), y.to(dtype), 4).num_terms == 20


class Running(nn.Module):
    """It remembers its values, and iterates until it has converged."""

    mean = 0.0

    def forward(self, z, y):
        t = z.mean(-1, keepdim=True)
        while True:
            r = (z - t).tanh()
            step = r.sum(-1, keepdim=True) / (1 - r.square()).sum(-1, keepdim=True)
            t = t + step / 2
            if (step.abs() < 1e-9).all():
                break
        value = (z - t - y).square().sum()
        self.mean = 0.9 * self.mean + 0.1 * float(value.detach())
        return value


def test_a_loss_that_iterates_and_remembers(randn):
    loss, z, y = Running(), randn(4, 3, 2) / 2, randn(4, 3, 2)
    curvature = output_loss(loss, reduction="sum").curvature(z, y, 4)
    assert curvature.num_terms == 12
    assert 0 < loss.mean < float(loss(z, y)) + 1e-6  # of its values at z alone


def test_terms_of_a_loss_with_a_first_derivative_only(randn, randint):
    def ctc(z, y):
        lengths = torch.full((2, len(z)), 2)
        lengths[0] = 7
        return F.ctc_loss(z.transpose(0, 1).log_softmax(-1), y, *lengths, reduction="sum")

    z, y = randn(3, 7, 4), 1 + randint(3, 3, 2)
    curvature = output_loss(ctc, reduction="sum").curvature(z, y, 3)
    assert (curvature.num_terms, curvature.width, curvature.linear) == (3, 28, False)
    for n, row in enumerate(curvature.factor("empirical").dense()[..., 0]):
        close(row, gradient(lambda u, n=n: ctc(u, y[n : n + 1]), z[n : n + 1]).flatten())
    for kind in ("type-2", "mc"):
        with pytest.raises(NotImplementedError, match="cannot be differentiated twice in PyTorch"):
            curvature.factor(kind, noise=Noise(0, 0))


def test_many_terms_are_probed(randn):
    """Beyond 16 terms the probe is random."""
    z = randn(40, 3)

    def neighbours(z, y):
        return (z[1:] * z[:-1]).sum() + z.square().sum()

    loss = output_loss(neighbours, reduction="sum")
    # without targets to cut, only the probe can tell
    curvature = loss.curvature(z, (), 40)
    with pytest.raises(ValueError, match="couples the data of a batch"):
        curvature.factor("type-2")
    H = hessian(lambda z: neighbours(z, ()), z)
    close(curvature.hessian_product(z).flatten(), H @ z.flatten())


def test_flattened_positions_are_data_of_equal_size(randn, randint):
    z, y = randn(6, 3), randint(3, 6)
    loss = output_loss(lambda z, y: F.cross_entropy(z, y), reduction="mean")
    curvature = loss.curvature(z, y, 3)  # two positions for each of three data
    close(curvature.value(), 3 * F.cross_entropy(z, y))
    assert curvature.terms_per_datum == 2


def test_not_convex_has_products_but_no_factor(randn):
    z = randn(4, 3)

    def wavy(z, y):
        return (z - y).cos().sum()

    curvature = output_loss(wavy, reduction="sum").curvature(z, 0 * z, 4)
    assert not curvature.psd
    close(curvature.hessian_product(z), -z.cos() * z)
    for kind in ("type-2", "mc"):
        with pytest.raises(ValueError, match=r"'wavy' is not convex .* use 'empirical'"):
            curvature.factor(kind, noise=Noise(0, 0))
    close(curvature.factor("empirical").dense()[..., 0], -z.sin())


def test_weights_of_nll_enter_by_their_root():
    d = Data()
    module = nn.NLLLoss(weight=W)
    for z, y in ((d.z, d.labels), (d.z.view(3, 4, 2), d.labels.view(3, 2))):
        curvature = output_loss(module).curvature(z, y, len(z))
        expected = torch.zeros(6, 4, dtype=torch.float64)
        expected[torch.arange(6), y.flatten()] = -W[y.flatten()].sqrt()
        close(curvature.factor("empirical").dense()[..., 0], expected)
    probability = d.z.sigmoid()
    curvature = output_loss(nn.BCELoss(weight=W)).curvature(probability, d.unit, 6)
    g = gradient(lambda z: F.binary_cross_entropy(z, d.unit, reduction="sum"), probability)
    close(curvature.factor("empirical").dense()[..., 0], W.sqrt() * g)
    with pytest.raises(ValueError, match="batch axis"):
        output_loss(nn.BCELoss(weight=d.unit)).curvature(probability, d.unit, 6).factor("empirical")


def test_count_where_the_loss_vanishes(randn):
    z = randn(3, 2)
    assert count(output_loss(nn.HuberLoss()), (z, z, 3)) == 6
    ignored = torch.full((3,), -100)
    assert count(output_loss(nn.NLLLoss()), (z, ignored, 3), (z, ignored.clamp(min=0), 3)) == 3
    far = torch.tensor([[100.0, 0.0]])
    assert count(output_loss(nn.MultiMarginLoss()), (far, torch.tensor([0]), 1)) == 1


def test_nothing_of_the_callers_changes(randn, randint):
    z = randn(4, 3).requires_grad_()
    y = randint(3, 4)
    module = nn.NLLLoss(weight=torch.tensor([1.0, 2.0, 3.0]))
    state = torch.get_rng_state()
    loss = output_loss(module)
    curvature = loss.walk().curvature(z, y, 4)
    curvature.factor("mc", 2, Noise(0, 0))
    curvature.hessian_product(z.detach())
    assert module.reduction == "mean" and module.weight.dtype == torch.float32
    assert z.grad is None and torch.equal(state, torch.get_rng_state())
    # the value keeps z's graph
    (g,) = torch.autograd.grad(curvature.value(), z)
    close(g, curvature.outputs(curvature.gradient()))


def test_products_under_vmap_and_without_grad_mode(randn, randint):
    z, y = randn(4, 3), randint(3, 4)
    us = randn(5, 4, 3)
    for loss in (nn.CrossEntropyLoss(), nn.SoftMarginLoss()):
        targets = y if isinstance(loss, nn.CrossEntropyLoss) else z.sign()
        with torch.no_grad():
            curvature = output_loss(loss).curvature(z, targets, 4)
            loop = torch.stack([curvature.hessian_product(u) for u in us])
            close(torch.func.vmap(curvature.hessian_product)(us), loop)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z.exp()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].exp()


@pytest.mark.parametrize(
    "loss,error,message",
    [
        (lambda z, y: z - y, ValueError, r"expected a scalar loss, got shape \(3, 2\)"),
        (lambda z, y: z.detach().sum(), ValueError, "does not depend differentiably"),
        (lambda z, y: Once.apply(z).sum(), NotImplementedError, "cannot be differentiated twice"),
    ],
)
def test_clear_errors(loss, error, message, randn):
    z = randn(3, 2)
    with pytest.raises(error, match=message):
        output_loss(loss, reduction="sum").walk().curvature(z, z, 3).hessian_product(z)


def test_substitutions_reach_into_functions(randn):
    """Margin losses have no double backward in PyTorch, called from anywhere."""
    z = randn(3, 2)
    y = torch.zeros(3, dtype=torch.long)
    loss = output_loss(lambda z, y: F.multi_margin_loss(z, y, p=2, margin=3.0), reduction="mean")
    module = nn.MultiMarginLoss(p=2, margin=3.0)
    same = output_loss(module).curvature(z, y, 3)
    close(loss.curvature(z, y, 3).hessian_product(z), same.hessian_product(z))
    assert same.hessian_product(z).abs().max() > 0
