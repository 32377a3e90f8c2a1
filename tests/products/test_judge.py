"""The judge: wrong second derivatives are told by central differences, and named; at kinks it is silent."""

import warnings

import pytest
import torch
from conformance import Untouched, draws
from kronecker.cases import Net
from problems import custom
from torch import nn

from curvops import (
    EFLinearOperator,
    EKFACLinearOperator,
    EmpiricalRisk,
    GGNLinearOperator,
    HessianLinearOperator,
    KFACLinearOperator,
)
from curvops.products import judge
from curvops.products.judge import compare, judge_hessian, judge_jacobian, suspects

X, Y = draws(6, 3), draws(6, 2, seed=1)
# backwards with a wrong derivative, 2x in place of 6x, and with a wrong factor
cubed = custom("Cubed", lambda x: x**3, lambda g, x: g * (x**2 + 2 * x.detach() ** 2))
doubled = custom("Doubled", lambda x: x**2, lambda g, x: 3 * g * x)


def problem(function, X=X):
    model = nn.Sequential(nn.Linear(3, 2), Net(lambda _, x: function(x)), nn.Linear(2, 2)).double()
    return model, nn.MSELoss(), dict(model.named_parameters()), [(X, Y)]


@pytest.mark.parametrize("cls", [GGNLinearOperator, EFLinearOperator])
def test_a_wrong_jacobian_is_told(cls):
    with pytest.warns(RuntimeWarning, match="^Jacobian: .*Doubled"):
        cls(*problem(doubled))


def test_an_operation_of_pytorch_is_named(monkeypatch):
    from curvops import substitutions

    monkeypatch.setattr(substitutions, "TABLE", {})
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), nn.Tanh()).double()
    with pytest.warns(RuntimeWarning, match="_weight_norm"):
        HessianLinearOperator(model, nn.MSELoss(), dict(model.named_parameters()), [(X, Y)])


def test_a_wrong_second_derivative_is_told_at_the_caller():
    args, message = problem(cubed), r"^Hessian: .*differs from central differences .*Cubed"
    with Untouched(args[0]), pytest.warns(RuntimeWarning, match=message) as caught:
        HessianLinearOperator(*args)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GGNLinearOperator(*args)  # the Jacobian is right
        HessianLinearOperator(*args, check_deterministic=False)


@pytest.mark.parametrize("function", [torch.tanh, torch.sin, lambda x: x**3, nn.functional.gelu])
def test_right_derivatives_pass(function):
    risk = EmpiricalRisk(*problem(function))
    for judged in (judge_hessian, judge_jacobian):
        verdict = judged(risk)
        assert verdict.error is not None and verdict.error < 1e-6 and not verdict.wrong


def test_what_is_no_number_is_wrong():
    verdict = compare(torch.tensor([torch.nan, 1.0]), lambda step: torch.tensor([step, step]))
    assert verdict.wrong and verdict.account[0] == "wrong"


def test_no_verdict_at_kinks():
    at = torch.tensor([0.0, 1.0]).double()
    assert compare(torch.zeros(2).double(), lambda step: (at + step).sign()).error is None
    assert compare(at, lambda step: at * step + (abs(step) ** 0.5)).error is not None  # even parts cancel
    args = problem(torch.relu)
    for p in args[0][0].parameters():
        nn.init.zeros_(p)  # every unit sits at its kink
    risk = EmpiricalRisk(*args)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert judge_hessian(risk).error is None
    assert compare(at, lambda step: at / (step * 0)).error is None


def test_no_verdict_on_models_tied_to_their_precision():
    class Single(nn.Linear):
        def forward(self, x):
            if x.dtype == torch.float64:
                raise TypeError("single precision only")
            return super().forward(x)

    model = Single(3, 2)
    risk = EmpiricalRisk(model, nn.MSELoss(), dict(model.named_parameters()), [(X.float(), Y.float())])
    assert judge_hessian(risk).error is None
    HessianLinearOperator(model, nn.MSELoss(), dict(model.named_parameters()), [(X.float(), Y.float())])


@pytest.mark.parametrize("error", [IndexError, KeyError, AssertionError, AttributeError, ZeroDivisionError])
def test_no_verdict_on_models_and_losses_that_refuse_a_few_data(error):
    def refusing(t):
        if len(t) != len(X):
            raise error
        return t.sin()

    model, loss, params, data = problem(refusing)
    assert judge_hessian(EmpiricalRisk(model, loss, params, data)).error is None
    args = problem(torch.sin)[0], lambda z, y: (z - torch.tensor(y).unsqueeze(1)).square().mean()
    risk = EmpiricalRisk(*args, dict(args[0].named_parameters()), [(X, [1.0] * len(X))], reduction="mean")
    for judged in (judge_hessian, judge_jacobian):
        judged(risk)  # a list of targets is not cut


def test_single_precision_is_judged_in_double():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).eval()
    risk = EmpiricalRisk(model, nn.MSELoss(), dict(model.named_parameters()), [(X.float(), Y.float())])
    assert judge_hessian(risk).error < 1e-6
    few = {"0.weight": model[0].weight}  # the others, and the buffers, follow
    assert judge_hessian(EmpiricalRisk(model, nn.MSELoss(), few, [(X.float(), Y.float())])).error < 1e-6


def test_large_models_are_not_judged(monkeypatch):
    monkeypatch.setattr(judge, "LARGEST", 3)
    assert judge_hessian(EmpiricalRisk(*problem(torch.tanh))).error is None


def test_suspects_of_right_operations():
    x = X.clone().requires_grad_()
    assert suspects(lambda: torch.nn.functional.layer_norm(x.exp(), (3,)).tanh()) == []


class Padded(nn.Module):
    def __init__(self, backward=None):
        super().__init__()
        self.table, self.head, self.w = nn.Embedding(4, 3, padding_idx=0), nn.Linear(3, 2), nn.Parameter(torch.ones(3))
        nn.init.normal_(self.table.weight)
        self.cut = custom("Cut", torch.mul, backward) if backward else torch.mul

    def forward(self, X):
        return self.head(self.cut(self.table(X), self.w).tanh().sum(1))


def test_the_paddings_row_is_not_moved_but_a_parameter_without_a_gradient_is():
    data = [(torch.arange(24).reshape(8, 3) % 4, torch.arange(8) % 2)]
    for net, wrong in ((Padded(), False), (Padded(lambda g, x, w: (g * w, 0 * w)), True)):
        net = net.double()
        risk = EmpiricalRisk(net, nn.CrossEntropyLoss(), dict(net.named_parameters()), data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            verdicts = judge_hessian(risk), judge_jacobian(risk)
        assert all(verdict.error is not None and verdict.wrong is wrong for verdict in verdicts)


@pytest.mark.parametrize("cls", [HessianLinearOperator, GGNLinearOperator, EFLinearOperator])
def test_exactly_at_a_kink_there_is_no_verdict(cls):
    """Central differences agree there: they are the mean of both sides' derivatives. Zero biases and black borders do it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    nn.init.zeros_(model[0].bias)
    data = [(torch.cat([torch.zeros(3, 3).double(), X]), torch.cat([Y[:3], Y]))]
    op = cls(model, nn.MSELoss(), dict(model.named_parameters()), data)  # warnings are errors in the tests
    assert "no verdict (central differences disagree, as they do at a kink" in op.explain()


def test_products_that_are_not_finite_are_told():
    model = nn.Sequential(
        nn.Linear(3, 4, bias=False), Net(lambda _, x: x.square().sum(1, keepdim=True).sqrt())
    ).double()
    data = [(torch.cat([X, torch.zeros(1, 3).double()]), torch.ones(7, 1).double())]
    op = HessianLinearOperator(model, nn.MSELoss(), dict(model.named_parameters()), data, check_deterministic=False)
    mixed = draws(12, 3)
    mixed[:, 1] = torch.nan  # which says nothing of the others
    for work in (lambda: op @ draws(12), lambda: op @ mixed, op.to_dense):
        with pytest.warns(
            RuntimeWarning, match=r"^HessianLinearOperator: the product has entries that are not finite\."
        ):
            work()
    assert not (op @ torch.full((12,), torch.nan, dtype=torch.float64)).isfinite().any()


class Severed(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.layer, self.how = nn.Linear(3, 2).double(), how

    def forward(self, x):
        if self.how == "no_grad":
            with torch.no_grad():
                return self.layer(x)
        return self.layer(x).detach()


@pytest.mark.parametrize("how", ["no_grad", "detach"])
@pytest.mark.parametrize("cls", [HessianLinearOperator, KFACLinearOperator, EKFACLinearOperator])
def test_an_output_without_a_graph_is_told(cls, how):
    model = Severed(how)
    with pytest.warns(RuntimeWarning, match=r"its output carries no graph to the parameters, .* torch\.no_grad"):
        cls(model, nn.MSELoss(), dict(model.named_parameters()), [(X, Y)])


def normed(dtype):
    """A traced model with weight norm: second derivatives are wrong in its directions."""
    first = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
    model = nn.Sequential(first, nn.Tanh(), nn.Linear(4, 2)).to(dtype)
    with torch.no_grad():
        for k, p in enumerate(model.parameters()):
            p.copy_(draws(*p.shape, seed=k))
    return torch.jit.trace(model, X.to(dtype))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_torchscript_runs_without_its_substitute_is_told(dtype):
    """By a copy, in which parameters are moved: of first derivatives it says that they are right."""
    model = normed(dtype)
    args = nn.MSELoss(), dict(model.named_parameters()), [(X.to(dtype), Y.to(dtype))]
    message = r"^Hessian: .*differs from .*TorchScript runs _weight_norm.* before torch\.jit"
    with Untouched(model), pytest.warns(RuntimeWarning, match=message) as caught:
        HessianLinearOperator(model, *args)
    assert caught[0].filename == __file__
    assert judge_jacobian(EmpiricalRisk(model, *args)).error < 1e-6


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_what_torchscript_runs_without_its_substitute_is_told_where_there_is_no_verdict(monkeypatch):
    monkeypatch.setattr(judge, "LARGEST", 3)
    model = normed(torch.float64)
    args = nn.MSELoss(), dict(model.named_parameters()), [(X, Y)]
    with pytest.warns(RuntimeWarning, match=r"^Hessian: TorchScript runs _weight_norm.* is wrong") as caught:
        op = HessianLinearOperator(model, *args)
        GGNLinearOperator(model, *args)  # of which nothing is wrong
    assert [each.filename for each in caught] == [__file__] and "no verdict" in op.explain()


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_script_modules_and_parts_that_are_such_are_judged(dtype):
    plain = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.BatchNorm1d(4).eval(), nn.Linear(4, 2)).to(dtype)
    traced = torch.jit.trace(plain, X.to(dtype))
    for model in (traced, torch.jit.script(plain), nn.Sequential(nn.Linear(3, 3), traced).to(dtype)):
        risk = EmpiricalRisk(model, nn.MSELoss(), dict(model.named_parameters()), [(X.to(dtype), Y.to(dtype))])
        for judged in (judge_hessian, judge_jacobian):
            assert judged(risk).error < 1e-6
