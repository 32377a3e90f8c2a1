"""What a batch's loss is to the risk: seen, or refused with the name of the option that settles it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvops import EmpiricalRisk
from trust.oracle import KINDS, Case, close, real
from trust.support import CE, Net, labels, right_or_refused

REFUSAL = r"(?s)reduction.*sum|sum.*reduction"


def data(y, sizes=(5, 4)):
    return [(real(n, 3, seed=n + k), y(n, k)) for k, n in enumerate(sizes)]


def classes(n, k):
    return (labels(n) + k) % 3


def targets(n, k):
    return real(n, 3, seed=k + 5)


def weights(n, k):
    return real(n, seed=k).abs() + 0.1


def pair(n, k):
    return labels(n), weights(n, k)


def table(n, k):
    return {"y": labels(n), "w": weights(n, k), "mask": torch.arange(n) > 0}


def weighted(z, y, w, mean=True):
    return (F.cross_entropy(z, y, reduction="none") * w).sum() / (w.sum() if mean else 1)


REFUSED = {
    "weighted mean": (lambda z, y: weighted(z, *y), pair, "mean"),
    "weighted mean, y in a dict": (lambda z, y: weighted(z, y["y"], y["w"]), table, "mean"),
    "weighted mean, y in one tensor": (lambda z, y: weighted(z, y[:, 0].long(), y[:, 1]), lambda n, k: torch.stack(pair(n, k), 1), "mean"),
    "masked mean": (lambda z, y: F.cross_entropy(z[y["mask"]], y["y"][y["mask"]]), table, "mean"),
    "mean that is called a sum": (lambda z, y: F.cross_entropy(z, y), classes, "sum"),
    "sum that is called a mean": (lambda z, y: F.cross_entropy(z, y, reduction="sum"), classes, "mean"),
    "ignored labels": (lambda z, y: F.cross_entropy(z, y), lambda n, k: labels(n).masked_fill(torch.arange(n) < 1, -100), "mean"),
    "class weights": (lambda z, y: F.cross_entropy(z, y, torch.arange(3.0) + 1), classes, "mean"),
    "root of the mean": (lambda z, y: F.mse_loss(z, y).sqrt(), targets, "mean"),
    "norm": (lambda z, y: (z - y).norm(), targets, "sum"),
    "contrast": (lambda z, y: F.cross_entropy(z @ z.T, torch.arange(len(z))), classes, "mean"),
    "variance": (lambda z, y: z.var(0, correction=0).sum(), classes, "mean"),
    "mean over entries of the target": (lambda z, y: (z[:, 0].cosh() * y).sum() / y.sum(), weights, "mean"),
    "divided by a number in y": (lambda z, y: F.cross_entropy(z, y[0], reduction="sum") / y[1], lambda n, k: (labels(n), n + k), "mean"),
    "mean over the labels seen": (lambda z, y: F.cross_entropy(z, y, reduction="sum") / len(y.unique()), lambda n, k: labels(n) % (2 + k), "mean"),
    "squared sum": (lambda z, y: F.cross_entropy(z, y, reduction="sum") ** 2, classes, "sum"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["Hessian", "EKFAC", "risk"])
@pytest.mark.parametrize("sizes", [(5, 4), (1, 1, 1, 1), (2, 1)], ids=str)
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, sizes, kind):
    loss, y, reduction = REFUSED[name]
    if name in ("ignored labels", "masked mean") and sizes != (5, 4):
        sizes = (3, 2)  # undefined for one datum
    case = Case(Net(), loss, data(y, sizes), {"reduction": reduction})
    with pytest.raises(ValueError, match=REFUSAL if kind != "EKFAC" else f"{REFUSAL}|not convex"):
        if kind == "risk":
            EmpiricalRisk(case.model, loss, case.params, case.data, reduction=reduction).value()
        else:
            op = case.make(kind)
            op @ torch.ones(op.shape[1])


class Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(5, 3), nn.Linear(3, 5)

    def forward(self, X):
        return self.head(self.table(X).cumsum(1).tanh())


def shifted(z, y, reduction="mean"):
    return F.cross_entropy(z[:, :-1].flatten(0, 1), y[:, 1:].flatten(), reduction=reduction)


def language(lengths, size, reduction):
    X = [torch.arange(size * L).view(size, L) ** 2 % 5 for L in lengths]
    options = {"reduction": reduction}
    total = (
        None
        if len(set(lengths)) == 1
        else lambda zs, ys: sum(shifted(z, y, "sum") for z, y in zip(zs, ys, strict=True))
    )
    return Case(Language(), lambda z, y: shifted(z, y, reduction), list(zip(X, X, strict=True)), options, total=total)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("lengths", [(4, 12, 20), (20, 4), (4, 4, 5)], ids=str)
def test_means_over_tokens_of_ragged_batches(lengths, size, kind):
    case = language(lengths, size, "mean")
    with pytest.raises(ValueError, match=REFUSAL):
        op = case.make(kind)
        op @ torch.ones(op.shape[1])


@pytest.mark.parametrize("kind", ["Hessian", "GGN", "GGNDiagonal", "EKFAC"])
@pytest.mark.parametrize("size", [1, 2])
def test_other_sums_and_means_over_tokens(size, kind):
    language((4, 12, 20), size, "sum").check(kind)
    language((4, 4, 4), size, "mean").check(kind)


def by_pairs(loss):
    return lambda zs, ys: loss(torch.cat(zs), tuple(map(torch.cat, zip(*ys, strict=True))))


ACCEPTED = {
    "weighted sum": (lambda z, y: weighted(z, *y, mean=False), pair, "sum", by_pairs(lambda z, y: weighted(z, *y, mean=False))),
    "equal weights": (lambda z, y: weighted(z, *y), lambda n, k: (labels(n), torch.ones(n)), "mean", by_pairs(lambda z, y: weighted(z, *y))),
    "no target": (lambda z, y: z.cosh().mean(), lambda n, k: None, "mean", lambda zs, ys: torch.cat(zs).cosh().mean()),
    "numbers": (lambda z, y: F.cross_entropy(z, torch.tensor(y), reduction="sum"), lambda n, k: classes(n, k).tolist(), "sum", lambda zs, ys: F.cross_entropy(torch.cat(zs), torch.tensor([k for y in ys for k in y]), reduction="sum")),
    "reconstruction": (lambda z, y: (z - y).pow(4).mean(), targets, "mean", None),
    "focal": (lambda z, y: ((1 - z.softmax(1).gather(1, y[:, None])) ** 2).sum(), classes, "sum", None),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["Hessian", "GGN"])
@pytest.mark.parametrize("sizes", [(5, 4), (1, 1, 1), (9,), (1,)], ids=str)
@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name, sizes, kind):
    loss, y, reduction, total = ACCEPTED[name]
    Case(Net(), loss, data(y, sizes), {"reduction": reduction}, total=total).check(kind)


def hook(loss):
    loss.register_forward_hook(lambda m, args, out: 3 * out)


def pre_hook(loss):
    loss.register_forward_pre_hook(lambda m, args: (args[0] * 1.5 + 0.3, args[1]))


def own_forward(loss):
    plain = loss.forward
    loss.forward = lambda z, y: 2 * plain(z * 1.5, y)  # which no copy follows, so that it may be refused


def own_call(loss):
    loss.__class__ = type(
        "Own", (type(loss),), {"__call__": lambda self, z, y: 3 * super(type(self), self).__call__(z, y)}
    )


def subclass(loss):
    loss.__class__ = type(
        "Own", (type(loss),), {"forward": lambda self, z, y: super(type(self), self).forward(2 * z, y)}
    )


FORMS = {
    "cross-entropy": (lambda: nn.CrossEntropyLoss(), classes),
    "cross-entropy with options": (lambda: nn.CrossEntropyLoss(torch.arange(3.0) + 1, label_smoothing=0.2), classes),
    "cross-entropy, sum": (lambda: nn.CrossEntropyLoss(reduction="sum"), classes),
    "binary cross-entropy": (lambda: nn.BCEWithLogitsLoss(), lambda n, k: (targets(n, k) > 0).double()),
    "squared error": (lambda: nn.MSELoss(), targets),
    "huber": (lambda: nn.HuberLoss(delta=0.5), targets),
}


@pytest.mark.parametrize("kind", ["Hessian", "GGN", "GGNDiagonal"])
@pytest.mark.parametrize("how", [hook, pre_hook, own_forward, own_call, subclass])
@pytest.mark.parametrize("form", FORMS)
def test_a_loss_is_what_its_call_gives(form, how, kind):
    loss, y = FORMS[form][0](), FORMS[form][1]
    how(loss)
    right_or_refused(Case(Net(), loss, data(y)), kind, REFUSAL if how is own_forward else "never")


def test_a_hook_on_every_module():
    hooked = nn.modules.module.register_module_forward_hook(lambda m, _, out: 2 * out if m is CE else None)
    try:
        for kind in ("Hessian", "GGN", "EKFAC"):
            Case(Net(), CE, data(classes)).check(kind)
    finally:
        hooked.remove()


def test_the_constant_is_that_of_the_loss_as_it_is():
    case = Case(Net(), nn.CrossEntropyLoss(torch.ones(3)), data(classes))
    risk = EmpiricalRisk(case.model, case.loss, case.params, case.data)
    for weight in ([1.0, 1.0, 1.0], [5.0, 1.0, 1.0], [0.0, 0.0, 2.0]):
        case.loss.weight.copy_(torch.tensor(weight))
        close(risk.value(), case.risk(case.outputs()))
