"""What a batch's loss is to the risk: seen, or refused with the name of the option that settles it."""

import pytest
import torch
import torch.nn.functional as F
from kronecker.cases import Net as Made
from oracles import KINDS, Case, real
from torch import nn

from curvops import EmpiricalRisk, GGNLinearOperator, HessianLinearOperator
from trust.support import Net, labels, right_or_refused, rotate, used

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


def masked(n, k):
    return {"y": labels(n), "mask": torch.arange(n) > 0}


def weighted(z, y, w, mean=True):
    return (F.cross_entropy(z, y, reduction="none") * w).sum() / (w.sum() if mean else 1)


FORMATS = {
    "tuple": (lambda y, w: (y, w), lambda t: t),
    "list": (lambda y, w: [y, w], lambda t: t),
    "dict": (lambda y, w: {"labels": y, "mask": w, "name": "masked", "scale": 1.0}, lambda t: (t["labels"], t["mask"])),
    "nested": (lambda y, w: {"a": [(y, None)], "b": {"c": w}}, lambda t: (t["a"][0][0], t["b"]["c"])),
    "tensor": (lambda y, w: torch.stack([y, w], 1), lambda t: (t[:, 0].long(), t[:, 1])),
    "items": (
        lambda y, w: [{"y": int(a), "w": float(b)} for a, b in zip(y, w, strict=True)],
        lambda t: (torch.tensor([d["y"] for d in t]), torch.tensor([d["w"] for d in t])),
    ),
}


@pytest.mark.parametrize("form, kinds", rotate(FORMATS, ("Hessian", "EKFAC"), ("GGN", "GGNDiagonal")))
def test_weights_in_any_format(form, kinds):
    build, read = FORMATS[form]
    net = Net()

    def case(w, reduction, sizes):
        batches = [(X, (y, w(len(X), k))) for k, (X, y) in enumerate(data(classes, sizes))]
        together = [torch.cat(parts) for parts in zip(*(y for _, y in batches), strict=True)]
        return Case(
            net,
            lambda z, t: weighted(z, *read(t), mean=reduction == "mean"),
            [(X, build(*y)) for X, y in batches],
            {"reduction": reduction},
            total=lambda zs, _: weighted(torch.cat(zs), *together, mean=reduction == "mean"),
        )

    for sizes in ((9,), (5, 4), (1, 1, 1, 1), (1, 7)):
        case(weights, "sum", sizes).check(*kinds)
        case(lambda n, k: torch.ones(n), "mean", sizes).check(*kinds)
    # weighted; masked as a whole, so that some means are no number; and alike within each batch, but not between them
    first, apart = (lambda n, k: (torch.arange(n) > 0).double()), (lambda n, k: torch.full((n,), 1 - k / 2))
    refused = [(weights, (5, 4)), (weights, (1, 7)), (first, (3, 5)), (first, (3, 3, 2)), (apart, (4, 4))]
    for w, sizes in refused:
        for kind in kinds:
            with pytest.raises(ValueError, match=REFUSAL):
                used(case(w, "mean", sizes), kind)


REFUSED = {
    "weighted mean": (lambda z, y: weighted(z, *y), pair, "mean"),
    "masked mean": (lambda z, y: F.cross_entropy(z[y["mask"]], y["y"][y["mask"]]), masked, "mean"),
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
    "sum and a constant": (lambda z, y: F.cross_entropy(z, y, reduction="sum") + 0.3, classes, "sum"),
    "squared sum": (lambda z, y: F.cross_entropy(z, y, reduction="sum") ** 2, classes, "sum"),
}  # fmt: skip


@pytest.mark.parametrize("sizes", [(5, 4), (1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("name, kind", rotate(REFUSED, "Hessian", "EKFAC", "risk"))
def test_refused(name, kind, sizes):
    loss, y, reduction = REFUSED[name]
    if name in ("ignored labels", "masked mean") and sizes != (5, 4):
        sizes = (3, 2)  # undefined for one datum
    case = Case(Net(), loss, data(y, sizes), {"reduction": reduction})
    with pytest.raises(ValueError, match=REFUSAL if kind != "EKFAC" else f"{REFUSAL}|not convex"):
        if kind == "risk":
            EmpiricalRisk(case.model, loss, case.params, case.data, reduction=reduction).value()
        else:
            used(case, kind)


def cumulative(net, X):
    return net.head(net.table(X).cumsum(1).tanh())


def shifted(z, y, reduction="mean"):
    return F.cross_entropy(z[:, :-1].flatten(0, 1), y[:, 1:].flatten(), reduction=reduction)


def language(lengths, size, reduction):
    def total(zs, ys):
        return sum(shifted(z, y, "sum") for z, y in zip(zs, ys, strict=True))

    X = [torch.arange(size * L).view(size, L) ** 2 % 5 for L in lengths]
    batches, options = list(zip(X, X, strict=True)), {"reduction": reduction}
    ragged = len(set(lengths)) > 1
    net = Made(cumulative, table=nn.Embedding(5, 3), head=nn.Linear(3, 5))
    return Case(net, lambda z, y: shifted(z, y, reduction), batches, options, total=total if ragged else None)


RAGGED = [(lengths, size) for lengths in [(4, 12, 20), (20, 4), (4, 4, 5)] for size in (1, 2)]


@pytest.mark.parametrize("sizes, kind", rotate(RAGGED, *KINDS))
def test_means_over_tokens_of_ragged_batches(sizes, kind):
    with pytest.raises(ValueError, match=REFUSAL):
        used(language(*sizes, "mean"), kind)


@pytest.mark.parametrize("size, kinds", rotate([1, 2], ("Hessian", "EKFAC"), ("GGN", "GGNDiagonal")))
def test_other_sums_and_means_over_tokens(size, kinds):
    language((4, 8, 6), size, "sum").check(*kinds)
    language((4, 4), size, "mean").check(*kinds)


ACCEPTED = {
    "mean and a constant": (lambda z, y: F.cross_entropy(z, y) + 0.3, classes, "mean"),
    "no target": (lambda z, y: z.cosh().mean(), lambda n, k: None, "mean"),
    "numbers": (lambda z, y: F.cross_entropy(z, torch.tensor(y)), lambda n, k: classes(n, k).tolist(), "mean"),
    "reconstruction": (lambda z, y: (z - y).pow(4).mean(), targets, "mean"),
    "focal": (lambda z, y: ((1 - z.softmax(1).gather(1, y[:, None])) ** 2).sum(), classes, "sum"),
}


@pytest.mark.parametrize("sizes, kind", rotate([(5, 4), (1, 1, 1), (9,), (1,)], "Hessian", "GGN"))
@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name, sizes, kind):
    loss, y, reduction = ACCEPTED[name]
    Case(Net(), loss, data(y, sizes), {"reduction": reduction}).check(kind)


def own_forward(loss):
    plain = loss.forward
    loss.forward = lambda z, y: 2 * plain(z * 1.5, y)  # which no copy follows, so that it may be refused


def own_class(method, change):
    def become(loss):
        kind = type(loss)
        loss.__class__ = type("Own", (kind,), {method: lambda self, z, y: change(getattr(kind, method), self, z, y)})

    return become


class OtherOption(nn.CrossEntropyLoss):
    def __getattribute__(self, name):
        return 0.3 if name == "label_smoothing" else super().__getattribute__(name)


CALLS = {
    "hook": lambda loss: loss.register_forward_hook(lambda m, args, out: 3 * out),
    "pre-hook": lambda loss: loss.register_forward_pre_hook(lambda m, args: (args[0] * 1.5 + 0.3, args[1])),
    "own forward": own_forward,
    "own __call__": own_class("__call__", lambda plain, self, z, y: 3 * plain(self, z, y)),
    "subclass": own_class("forward", lambda plain, self, z, y: plain(self, 2 * z, y)),
}
FORMS = {
    "cross-entropy": (lambda: nn.CrossEntropyLoss(), classes),
    "cross-entropy with options": (lambda: nn.CrossEntropyLoss(torch.arange(3.0) + 1, label_smoothing=0.2), classes),
    "cross-entropy, sum": (lambda: nn.CrossEntropyLoss(reduction="sum"), classes),
    "an option of its own": (OtherOption, classes),
    "binary cross-entropy": (lambda: nn.BCEWithLogitsLoss(), lambda n, k: (targets(n, k) > 0).double()),
    "compiled": (lambda: torch.compile(nn.CrossEntropyLoss(), backend="eager"), classes),
    "squared error": (lambda: nn.MSELoss(), targets),
    "huber": (lambda: nn.HuberLoss(delta=0.5), targets),
}


@pytest.mark.parametrize(
    "form, how", [*rotate([*FORMS, *FORMS], *CALLS, "nothing"), *(("compiled", way) for way in CALLS)]
)
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of the compiler
def test_a_loss_is_what_its_call_gives(form, how):
    loss, y = FORMS[form][0](), FORMS[form][1]
    CALLS.get(how, lambda loss: loss)(loss)
    case, message = Case(Net(), loss, data(y)), REFUSAL if how == "own forward" else "never"
    right_or_refused(case, ["Hessian", "GGN", "GGNDiagonal"], message)


ALTERED = {
    "value": lambda out, z: 2 * out,
    "gradient": lambda out, z: out + (z - z.detach()).sum(),
    "curvature": lambda out, z: out.detach() * z.sum() / z.sum().detach(),
}


@pytest.mark.parametrize(
    "form, how", rotate(["cross-entropy, sum", "binary cross-entropy", "squared error"] * 3, *ALTERED)
)
def test_a_hook_on_every_module(form, how):
    loss, y = FORMS[form][0](), FORMS[form][1]
    loss.reduction = "sum"
    case = Case(Net(), loss, data(y, (1,)))
    before = case.truth("Hessian")

    def alter(module, inputs, out):
        return ALTERED[how](out, inputs[0]) if module is loss else None

    hooked = nn.modules.module.register_module_forward_hook(alter)
    try:
        truth = case.truth("Hessian")
        case.check("Hessian", "GGN", "EKFAC")
    finally:
        hooked.remove()
    assert not torch.equal(before, truth)
    case.check("Hessian")


def ranked(z, y):
    """Cox's partial likelihood of a batch (its data are coupled)."""
    z = z[y.argsort(descending=True), 0]
    return -(z - torch.logcumsumexp(z, 0)).sum()


def contrasted(z, y):
    """InfoNCE of a batch."""
    return F.cross_entropy(F.normalize(z) @ F.normalize(z.roll(1, 1)).T, torch.arange(len(z)), reduction="sum")


@pytest.mark.parametrize("loss", [ranked, contrasted])
@pytest.mark.parametrize("sizes", [(8,), (4, 4), (5, 3)])
def test_a_loss_of_whole_batches_is_summed_over_them(loss, sizes):
    """As the error of one that couples its data advises: each batch is one datum."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    X, y = real(8, 3), real(8)
    data = list(zip(X.split(sizes), y.split(sizes), strict=True))
    params = dict(model.named_parameters())
    flat = torch.nn.utils.parameters_to_vector(params.values()).detach()

    def total(theta):
        parts = dict(zip(params, theta.split([p.numel() for p in params.values()]), strict=True))
        own = {name: part.view_as(params[name]) for name, part in parts.items()}
        return sum(loss(torch.func.functional_call(model, own, (X,)), y) for X, y in data)

    options = {"reduction": "sum", "batch_size_fn": lambda X: 1}
    hessian = HessianLinearOperator(model, loss, params, data, **options)
    torch.testing.assert_close(
        hessian.to_dense(), torch.autograd.functional.hessian(total, flat), rtol=1e-9, atol=1e-11
    )
    ggn = GGNLinearOperator(model, loss, params, data, **options)
    one_by_one = torch.stack([ggn @ e for e in torch.eye(len(flat)).double()], 1)
    torch.testing.assert_close(ggn.to_dense(), one_by_one)
    torch.testing.assert_close(ggn @ real(len(flat), 3).roll(1), one_by_one @ real(len(flat), 3).roll(1))


def test_batches_of_one_datum_with_flat_outputs_are_compared_all_the_same():
    """That each batch is one datum is nobody's word there."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Flatten(0, 1)).double()
    params, X, y = dict(model.named_parameters()), real(4, 5, 3), torch.arange(20).view(4, 5) % 4
    data = [(X[k : k + 1], y[k : k + 1]) for k in range(4)]

    def regularised(z, y):
        return F.cross_entropy(z, y.flatten(), reduction="sum") + sum(p.square().sum() for p in params.values())

    for loss in (regularised, lambda z, y: F.cross_entropy(z, y.flatten())):
        with pytest.raises(ValueError, match="the loss of two batches joined is not the sum"):
            HessianLinearOperator(model, loss, params, data, reduction="sum")


@pytest.mark.parametrize("cls", [HessianLinearOperator, GGNLinearOperator])
def test_a_loss_without_a_second_derivative_is_named(cls):
    def ctc(z, y):
        sizes = torch.full((len(z),), z.shape[1]), torch.full((len(z),), 2)
        return F.ctc_loss(z.transpose(0, 1).log_softmax(-1), y, *sizes, reduction="sum")

    model, data = nn.Linear(3, 4).double(), [(real(2, 6, 3), torch.tensor([[1, 2], [3, 1]]))]
    with pytest.raises(
        NotImplementedError, match=r"(no second derivative of|cannot be differentiated twice).*plain operations"
    ):
        cls(model, ctc, dict(model.named_parameters()), data, reduction="sum").to_dense()
