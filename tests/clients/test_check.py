"""`curvops.check`: right models pass, wrong ones fail where they are wrong, and what cannot be told is not judged."""

from importlib import import_module

import pytest
import torch
from conformance import Untouched
from kronecker.cases import Net
from problems import custom
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import curvops
from curvops import EKFACLinearOperator, GGNDiagonalLinearOperator, KFACLinearOperator, KFOCLinearOperator
from curvops.clients.checks import twin
from curvops.clients.checks.report import Report, Row

module = import_module("curvops.clients.check")
X, Y = torch.randn(6, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 2, 1, 1, 0, 2])
CE = nn.CrossEntropyLoss()
KRONECKER = ["GGNDiagonal", "EKFAC, type-2", "KFAC, type-2", "KFOC, type-2", "KFAC, Monte Carlo"]
# backwards with a wrong derivative, 2x in place of 6x, and with a wrong factor
cubed = custom("Cubed", lambda x: x**3, lambda g, x: g * (x**2 + 2 * x.detach() ** 2))
doubled = custom("Doubled", lambda x: x**2, lambda g, x: 3 * g * x)


class Product(torch.autograd.Function):
    """A linear map that takes a parameter where no stand-in is seen."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g @ w, g.T @ x


def mlp(function=torch.tanh, first: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(first or nn.Linear(6, 4), Net(lambda _, x: function(x)), nn.Linear(4, 3))


def check(model: nn.Module, loss=CE, data=None, **options) -> Report:
    return curvops.check(model, loss, dict(model.named_parameters()), data or [(X, Y)], **options)


def verdicts(report: Report, verdict: str) -> set[str]:
    return {row.operator for row in report.rows if row.verdict == verdict}


def cnn():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sigmoid(), nn.Flatten(), nn.Linear(64, 5))
    return model.eval(), torch.rand(4, 3, 6, 6), torch.randint(5, (4,))


def transformer():
    encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation="gelu", batch_first=True)
    model = Net(lambda s, x: s.o(s.e(s.t(x)).mean(1)), t=nn.Embedding(11, 8), e=encoder, o=nn.Linear(8, 5))
    return model, torch.randint(11, (5, 6)), torch.randint(5, (5,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", [lambda: (mlp(), X, Y), cnn, transformer], ids=["mlp", "cnn", "transformer"])
def test_all_is_well(make, dtype):
    model, X, y = make()
    model, X = model.to(dtype), X.to(dtype) if X.is_floating_point() else X
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with Untouched(model, [X, y]):
        report = check(model, data=[(X, y)])
    assert verdicts(report, "ok") == {row.operator for row in report.rows}, report
    assert report.ok and len(report.rows) == 18


@pytest.mark.parametrize(
    ("loss", "y"),
    [
        (nn.MSELoss(), torch.rand(6, 3)),
        (nn.BCEWithLogitsLoss(reduction="sum"), torch.rand(6, 3).round()),
        (nn.functional.cross_entropy, Y),
        (nn.CrossEntropyLoss(), torch.tensor([-100, 0, 1, -100, 2, 1])),
    ],
)
def test_losses(loss, y):
    report = check(mlp(), loss, [(X, y)])
    assert verdicts(report, "ok") == {row.operator for row in report.rows}, report


def test_functions_of_parameters():
    model = mlp()
    problem = lambda p, X: torch.func.functional_call(model, p, (X,)), CE, dict(model.named_parameters()), [(X, Y)]
    report = curvops.check(*problem)
    assert verdicts(report, "ok") == {row.operator for row in report.rows}, report


def test_a_loss_that_reads_parameters():
    model = mlp()
    report = check(model, lambda z, y: CE(z, y) + 0.1 * model[0].weight.square().sum(), reduction="mean")
    assert verdicts(report, "ok") == {row.operator for row in report.rows}, report


def test_a_function_that_takes_parameters_is_judged():
    first = Net(lambda s, x: Product.apply(x, s.w.weight), w=nn.Linear(6, 4, bias=False))
    assert verdicts(check(mlp(first=first)), "not judged") == set()


def test_a_wrong_backward_fails():
    report = check(mlp(doubled))
    assert verdicts(report, "FAILED") == {"gradient", "Hessian", "GGN", "EF", "Jacobian"}
    assert not report.ok


def test_a_wrong_second_derivative_fails():
    report = check(mlp(cubed))
    failed = [row for row in report.rows if row.verdict == "FAILED"]
    assert [(row.operator, row.against) for row in failed] == [("Hessian", "central differences of the gradient")]
    assert failed[0].difference > failed[0].allowed


OFF = {
    "noise": lambda made: torch.randn_like(made),
    "a row": lambda made: made * (torch.arange(len(made)) > 0)[:, None],
    "scaled": lambda made: made * 1.01,
}


@pytest.mark.parametrize("off", OFF.values(), ids=OFF)
@pytest.mark.parametrize(
    "kind", [KFACLinearOperator, EKFACLinearOperator, KFOCLinearOperator, GGNDiagonalLinearOperator]
)
def test_wrong_kronecker_products_fail(kind, off, monkeypatch):
    own, name = kind._apply, kind.__name__.removesuffix("LinearOperator")
    rows = tuple(row for row in module.CHECKS if row[0] in (name, f"{name}, type-2"))
    monkeypatch.setattr(module, "CHECKS", rows)
    model, data = mlp().double(), [(X.double(), Y)]
    assert check(model, data=data).ok
    monkeypatch.setattr(kind, "_apply", lambda op, columns: off(own(op, columns)))
    report = check(model, data=data)
    assert verdicts(report, "FAILED") == {rows[0][0]}
    monkeypatch.setattr(kind, "_apply", own)
    monkeypatch.setattr(kind, "to_dense", lambda op: torch.zeros(op.shape, dtype=op.dtype))
    assert verdicts(check(model, data=data), "FAILED") == {rows[0][0]}


@pytest.mark.parametrize(("own", "stated"), [("mean", "sum"), ("sum", "mean")])
def test_a_wrong_reduction_fails(own, stated):
    report = check(mlp(), lambda z, y: nn.functional.cross_entropy(z, y, reduction=own), reduction=stated)
    assert verdicts(report, "FAILED") == {"risk"} and f"reduction='{stated}'" in str(report)


def test_what_varies_fails():
    report = check(nn.Sequential(nn.Dropout(), mlp()))
    assert "model and data" in verdicts(report, "FAILED") and "dropout in train mode" in str(report)
    assert "Hessian" not in str(report)
    loader = DataLoader(TensorDataset(torch.rand(200, 6), torch.randint(3, (200,))), batch_size=4, shuffle=True)
    assert "shuffles" in str(check(mlp(), data=loader))


def test_kinks_are_not_judged():
    model = mlp(torch.relu)
    with torch.no_grad():
        model[0].bias.zero_()  # on data that are zero, at the kink
    report = check(model, data=[(0 * X, Y)])
    assert verdicts(report, "FAILED") == set()
    assert {"gradient", "Hessian", "GGN", "EF", "Jacobian"} <= verdicts(report, "not judged")
    assert verdicts(check(mlp(torch.relu)), "FAILED") == set()


def test_what_mixes_data_has_no_terms():
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))
    with Untouched(model):
        report = check(model)
    assert verdicts(report, "not judged") == set(KRONECKER) and report.ok
    assert any("batch norm in train mode" in note for note in report.notes)


def test_without_convexity_there_is_no_factor():
    report = check(mlp(), lambda z, y: z.sin().sum(-1).mean(), reduction="mean")
    assert verdicts(report, "not judged") == {"GGN, Monte Carlo", *KRONECKER} and report.ok


def test_a_sure_model_is_not_called_wrong():
    model = mlp()
    with torch.no_grad():
        model[2].weight.mul_(400)
    assert check(model).ok


def test_a_perfect_fit_is_not_called_wrong():
    model = mlp()
    assert check(model, nn.MSELoss(), [(X, model(X).detach())]).ok


def test_bad_input_is_an_error():
    with pytest.raises(TypeError, match="expected batches"):
        check(mlp(), data=[X])
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        check(mlp(), data=[(X[:, :3], Y)])
    with pytest.raises(TypeError, match="seed"):
        check(mlp(), seed="zero")


@pytest.mark.parametrize("size", [1, 2, 6])
def test_a_few_data_of_the_first_batches(size):
    data = list(zip(X.split(size), Y.split(size), strict=True))
    report = check(mlp(), data=data)
    assert report.title.startswith("4 data in") and report.ok


def test_central_differences():
    def at(step: float) -> Tensor:
        return torch.tensor([step, 1.0], dtype=torch.float64).sin()

    assert torch.allclose(twin.slope(at), torch.tensor([1.0, 0.0], dtype=torch.float64), atol=1e-8)
    for function in (torch.abs, torch.relu, lambda x: x.abs().sqrt(), lambda x: (1e6 * x).sin()):
        with pytest.raises(twin.NotJudged):
            twin.slope(lambda step, f=function: f(torch.tensor([step], dtype=torch.float64)))


def test_the_table():
    rows = Row("a", "b", 0.5, 1.0, "ok", "", 1.0), Row("c", "d", None, None, "FAILED", "why", 0.5)
    report = Report("title", rows, ("note",))
    assert not report.ok and Report("title", rows[:1]).ok
    text = str(report).splitlines()
    assert [line.split() for line in text[2:4]] == [
        ["a", "b", "5.0e-01", "1.0e+00", "ok", "1.0"],
        ["c", "d", "FAILED", "0.5", "why"],
    ]
    assert text[-2:] == ["1 ok, 1 FAILED, 0 not judged; 1.5 s", "note"]
