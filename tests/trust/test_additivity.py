"""What a batch's loss is to the risk: seen, or refused with the name of the option that settles it."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvops import EmpiricalRisk
from trust.oracle import KINDS, Case, close, labels, real

REFUSAL = r"(?s)reduction.*sum|sum.*reduction"


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))


def weights(n, seed):
    return real(n, seed=seed).abs() + 0.1


def data(y, sizes=(5, 4)):
    return [(real(n, 3, seed=n + k), y(n, k)) for k, n in enumerate(sizes)]


def weighted(z, y):
    return (F.cross_entropy(z, y[0], reduction="none") * y[1]).sum() / y[1].sum()


def masked(z, y):
    keep = y["mask"].bool()
    return F.cross_entropy(z[keep], y["label"][keep])


def contrast(z, y):
    return F.cross_entropy(z @ z.T, torch.arange(len(z)))


LABELS = lambda n, k: (labels(n) + k) % 3  # noqa: E731
PAIR = lambda n, k: (labels(n), weights(n, k))  # noqa: E731
TABLE = lambda n, k: {"label": labels(n), "mask": torch.arange(n) > 0}  # noqa: E731

REFUSED = {
    "weighted mean": (weighted, PAIR, "mean"),
    "weighted mean, y in a dict": (lambda z, y: weighted(z, (y["y"], y["w"])), lambda n, k: {"y": labels(n), "w": weights(n, k)}, "mean"),
    "weighted mean, y in one tensor": (lambda z, y: weighted(z, (y[:, 0].long(), y[:, 1])), lambda n, k: torch.stack(PAIR(n, k), 1), "mean"),
    "masked mean": (masked, TABLE, "mean"),
    "mean that is called a sum": (lambda z, y: F.cross_entropy(z, y), LABELS, "sum"),
    "sum that is called a mean": (lambda z, y: F.cross_entropy(z, y, reduction="sum"), LABELS, "mean"),
    "ignored labels": (lambda z, y: F.cross_entropy(z, y), lambda n, k: labels(n).masked_fill(torch.arange(n) < 1, -100), "mean"),
    "class weights": (lambda z, y: F.cross_entropy(z, y, torch.arange(3.0) + 1), LABELS, "mean"),
    "root of the mean": (lambda z, y: F.mse_loss(z, y).sqrt(), lambda n, k: real(n, 3, seed=k + 5), "mean"),
    "norm": (lambda z, y: (z - y).norm(), lambda n, k: real(n, 3, seed=k + 5), "sum"),
    "contrast": (contrast, LABELS, "mean"),
    "variance": (lambda z, y: z.var(0, correction=0).sum(), LABELS, "mean"),
    "mean over entries of the target": (lambda z, y: (z[:, 0] * y).sum() / y.sum(), lambda n, k: weights(n, k), "mean"),
    "divided by a number in y": (lambda z, y: F.cross_entropy(z, y[0], reduction="sum") / y[1], lambda n, k: (labels(n), n + k), "mean"),
    "mean over labels seen": (lambda z, y: F.cross_entropy(z, y, reduction="sum") / len(y.unique()), lambda n, k: labels(n) % (2 + k), "mean"),
    "squared sum": (lambda z, y: F.cross_entropy(z, y, reduction="sum") ** 2, LABELS, "sum"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["Hessian", "GGN", "EF", "EKFAC"])
@pytest.mark.parametrize("sizes", [(5, 4), (1, 1, 1, 1), (2, 1)], ids=str)
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, sizes, kind):
    loss, y, reduction = REFUSED[name]
    if name in ("ignored labels", "masked mean") and sizes != (5, 4):
        sizes = (3, 2)  # undefined for one datum
    case = Case(net(), loss, data(y, sizes), {"reduction": reduction})
    with pytest.raises(ValueError, match=REFUSAL if kind != "EKFAC" else f"{REFUSAL}|not convex"):
        op = case.make(kind)
        op @ torch.ones(op.shape[1])


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_the_risk(name):
    loss, y, reduction = REFUSED[name]
    model = net()
    with pytest.raises(ValueError, match=REFUSAL):
        EmpiricalRisk(model, loss, dict(model.named_parameters()), data(y), reduction=reduction).value()


class Lookup(nn.Module):
    """A language model."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(5, 3), nn.Linear(3, 5)

    def forward(self, X):
        return self.head(self.table(X).cumsum(1).tanh())


def shifted(z, y, reduction="mean"):
    return F.cross_entropy(z[:, :-1].flatten(0, 1), y[:, 1:].flatten(), reduction=reduction)


def sentences(lengths, size=2):
    batches = [torch.arange(size * L).view(size, L) ** 2 % 5 for L in lengths]
    return [(X, X) for X in batches]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("lengths", [(4, 12, 20), (20, 4), (4, 4, 5)], ids=str)
def test_means_over_tokens_of_ragged_batches(lengths, size, kind):
    case = Case(Lookup(), lambda z, y: shifted(z, y), sentences(lengths, size), {"reduction": "mean"})
    with pytest.raises(ValueError, match=REFUSAL):
        op = case.make(kind)
        op @ torch.ones(op.shape[1])


def tokens(zs, ys):
    return sum(shifted(z, y, "sum") for z, y in zip(zs, ys, strict=True))


@pytest.mark.parametrize("kind", ["Hessian", "GGN", "GGNDiagonal", "EKFAC"])
def test_sums_over_tokens_of_ragged_batches(kind):
    loss = functools.partial(shifted, reduction="sum")
    Case(Lookup(), lambda z, y: loss(z, y), sentences((4, 12, 20)), {"reduction": "sum"}, total=tokens).check(kind)
    Case(Lookup(), loss, sentences((4, 7)), {"reduction": "sum"}, total=tokens).check(kind)


@pytest.mark.parametrize("kind", ["Hessian", "GGN", "GGNDiagonal", "EKFAC"])
@pytest.mark.parametrize("size", [1, 2])
def test_means_over_tokens_of_even_batches(size, kind):
    Case(Lookup(), lambda z, y: shifted(z, y), sentences((4, 4, 4), size), {"reduction": "mean"}).check(kind)


def joined_pairs(loss):
    return lambda zs, ys: loss(torch.cat(zs), tuple(map(torch.cat, zip(*ys, strict=True))))


def joined_tables(loss):
    return lambda zs, ys: loss(torch.cat(zs), {k: torch.cat([y[k] for y in ys]) for k in ys[0]})


def weighted_sum(z, y):
    return (F.cross_entropy(z, y[0], reduction="none") * y[1]).sum()


def weighted_table(z, y):
    return (F.cross_entropy(z, y["label"], reduction="none") * y["mask"]).sum() / len(z)


ACCEPTED = {
    "weighted sum": (weighted_sum, PAIR, "sum", joined_pairs(weighted_sum)),
    "equal weights": (weighted, lambda n, k: (labels(n), torch.ones(n)), "mean", joined_pairs(weighted)),
    "masked, over the number": (weighted_table, TABLE, "mean", joined_tables(weighted_table)),
    "no target": (lambda z, y: z.cosh().mean(), lambda n, k: None, "mean", lambda zs, ys: torch.cat(zs).cosh().mean()),
    "numbers": (
        lambda z, y: F.cross_entropy(z, torch.tensor(y), reduction="sum"),
        lambda n, k: LABELS(n, k).tolist(),
        "sum",
        lambda zs, ys: F.cross_entropy(torch.cat(zs), torch.tensor(sum(ys, [])), reduction="sum"),
    ),
    "reconstruction": (lambda z, y: (z - y).pow(4).mean(), lambda n, k: real(n, 3, seed=k + 5), "mean", None),
    "focal": (lambda z, y: ((1 - z.softmax(1).gather(1, y[:, None])) ** 2).sum(), LABELS, "sum", None),
}


@pytest.mark.parametrize("kind", ["Hessian", "GGN"])
@pytest.mark.parametrize("sizes", [(5, 4), (1, 1, 1), (9,), (1,)], ids=str)
@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name, sizes, kind):
    loss, y, reduction, total = ACCEPTED[name]
    Case(net(), loss, data(y, sizes), {"reduction": reduction}, total=total).check(kind)


class OwnCall(nn.CrossEntropyLoss):
    def __call__(self, z, y):
        return 3 * super().__call__(z, y)


class OwnForward(nn.CrossEntropyLoss):
    def forward(self, z, y):
        return super().forward(2 * z, y)


class OwnSquare(nn.MSELoss):
    def forward(self, z, y):
        return super().forward(z.sinh(), y)


def changed(loss, how):
    if how == "hook":
        loss.register_forward_hook(lambda m, args, out: 3 * out)
    if how == "pre-hook":
        loss.register_forward_pre_hook(lambda m, args: (args[0] * 1.5 + 0.3, args[1]))
    if how == "forward on the instance":
        plain = loss.forward
        loss.forward = lambda z, y: 2 * plain(z * 1.5, y)
    if how == "nested":
        loss = nn.Sequential(loss)
        loss.forward = lambda z, y: loss[0](z * 2, y)
    return loss


BINARY = lambda n, k: (real(n, 3, seed=k + 5) > 0).double()  # noqa: E731
REAL = lambda n, k: real(n, 3, seed=k + 5)  # noqa: E731
FORMS = {
    "cross-entropy": (lambda: nn.CrossEntropyLoss(), LABELS),
    "cross-entropy with options": (lambda: nn.CrossEntropyLoss(torch.ones(3), label_smoothing=0.2), LABELS),
    "binary cross-entropy": (lambda: nn.BCEWithLogitsLoss(), BINARY),
    "squared error": (lambda: nn.MSELoss(), REAL),
    "huber": (lambda: nn.HuberLoss(delta=0.5), REAL),
}


@pytest.mark.parametrize("kind", ["Hessian", "GGN", "GGNDiagonal"])
@pytest.mark.parametrize("how", ["hook", "pre-hook", "forward on the instance", "nested"])
@pytest.mark.parametrize("form", FORMS)
def test_a_loss_is_what_its_call_gives(form, how, kind):
    loss, y = FORMS[form]
    options = {"reduction": "mean"} if how == "nested" else {}
    Case(net(), changed(loss(), how), data(y), options).check(kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", [OwnCall(), OwnForward(), OwnForward(reduction="sum"), OwnForward(label_smoothing=0.3)])
def test_subclasses(loss, kind):
    Case(net(), loss, data(LABELS)).check(kind)


@pytest.mark.parametrize("kind", ["Hessian", "GGN"])
def test_a_subclass_of_squared_error(kind):
    Case(net(), OwnSquare(), data(REAL)).check(kind)


def test_a_hook_on_every_module():
    handle = nn.modules.module.register_module_forward_hook(
        lambda m, args, out: 2 * out if isinstance(m, nn.CrossEntropyLoss) else None
    )
    try:
        case = Case(net(), nn.CrossEntropyLoss(), data(LABELS))
        for kind in ("Hessian", "GGN", "EKFAC"):
            case.check(kind)
    finally:
        handle.remove()


def test_a_loss_that_depends_on_the_batch_through_its_state():
    """The constant belongs to the loss as it is at the product, not as it was before."""
    loss = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0]))
    case = Case(net(), loss, data(LABELS))
    risk = EmpiricalRisk(case.model, loss, case.params, case.data)
    close(risk.value(), case.risk(case.outputs()))
    loss.weight.mul_(torch.tensor([5.0, 1.0, 1.0]))
    close(risk.value(), case.risk(case.outputs()))
