"""Models: modules and functions, any subset of parameters, and what is refused with a reason."""

from types import SimpleNamespace

import pytest
import torch
from conformance import Untouched, close, draws
from kronecker.cases import Net
from oracles import KINDS, Case, real
from problems import Odd
from torch import nn
from torch.func import functional_call

from curvops import (
    EFLinearOperator,
    EmpiricalRisk,
    GGNLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
    KFACLinearOperator,
)
from curvops.clients.checks.problem import problem_of
from curvops.tour.facts import facts

OPERATORS = [HessianLinearOperator, GGNLinearOperator, EFLinearOperator, KFACLinearOperator]
X, Y = draws(6, 3), torch.tensor([0, 1, 1, 0, 1, 0])
LOSS = nn.CrossEntropyLoss()


def make(cls, model, params=None, data=((X, Y),), loss=LOSS, **options):
    if cls is KFACLinearOperator:
        options = {"fisher_type": "type-2", **options}
    return cls(model, loss, dict(model.named_parameters()) if params is None else params, list(data), **options)


@pytest.mark.parametrize(
    "wrap,kind,hint",
    [
        (lambda z: SimpleNamespace(logits=z), "SimpleNamespace", r"return self\.model\(X\)\.logits"),
        (lambda z: {"out": z}, "dict", r"return self\.model\(X\)\['name'\]"),
        (lambda z: (z, z), "tuple", r"return self\.model\(X\)\[0\]"),
    ],
)
def test_outputs_that_are_no_tensor(model, cls, wrap, kind, hint):
    with pytest.raises(TypeError, match=f"(?s)expected a tensor as output, got {kind}.*class Wrapped.*{hint}"):
        make(cls, Net(lambda net, x: wrap(net.inner(x)), inner=model))


class Several(nn.Module):
    """Takes keywords or several arguments, as Hugging Face's models do."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, scale=None, labels=None):
        return SimpleNamespace(logits=self.inner(x))


@pytest.mark.parametrize("inputs,stars", [({"x": X}, r"\*\*X"), ((X, X), r"\*X")])
def test_inputs_that_the_module_takes_one_by_one(model, cls, inputs, stars):
    message = (
        rf"(?s)Several is called as model\(X\), and X is a {type(inputs).__name__}.*self\.model\({stars}\)\.logits"
    )
    with pytest.raises(TypeError, match=message):
        make(cls, Several(model), data=[(inputs, Y)])


def test_an_error_inside_the_model_stays_its_own(model, cls):
    def forward(net, inputs):
        raise AttributeError("own")

    with pytest.raises(AttributeError, match="own"):
        make(cls, Net(forward, inner=model), data=[({"x": X}, Y)])


def test_wrong_parameters(model, cls):
    params = dict(model.named_parameters())
    for wrong, error, message in (
        ({**params, "other": torch.zeros(3).double()}, ValueError, r"has no parameter 'other'; it has '0\.weight'"),
        ({**params, "other": params["0.bias"]}, ValueError, r"'0\.bias' and 'other' are one tensor"),
        (
            {n: p.detach().clone() for n, p in params.items()},
            ValueError,
            r"'0\.weight', .* are not the tensors of the module Sequential",
        ),
        (list(params.values()), TypeError, "expected a dict of named tensors, got list"),
        (model.parameters(), TypeError, "expected a dict of named tensors, got generator"),
        ({}, ValueError, "empty dict"),
        (
            dict(nn.LazyLinear(2).named_parameters()),
            ValueError,
            "'weight', 'bias' have no entries yet .* Run the model once",
        ),
    ):
        with pytest.raises(error, match=message):
            make(cls, model, wrong)
    with pytest.raises(TypeError, match=r"expected a module or a function \(params, X\), got int"):
        make(cls, 3, params)


def test_the_order_and_values_of_the_dict_count(model, cls):
    """Parameters in another order and under other names, and a function for copies with other values than the module's."""
    whole = make(cls, model)
    dense, names = whole.to_dense(), list(dict(model.named_parameters()))
    some = [names[3], names[0], names[2]]
    index = torch.cat([torch.arange(whole.shape[0])[whole.domain.slice(n)] for n in some])
    params = dict(model.named_parameters())
    close(make(cls, model, {n: params[n] for n in some}).to_dense(), dense[index][:, index])
    close(make(cls, model, {f"my.{n}": params[n] for n in some}).to_dense(), dense[index][:, index])
    copies = {n: p.detach().clone() for n, p in params.items()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    with Untouched(model):
        close(make(cls, lambda p, x: functional_call(model, p, (x,)), copies).to_dense(), dense)
    assert (make(cls, model).to_dense() - dense).abs().max() > 1e-3


def test_frozen_and_unused_parameters(cls):
    model = Odd().double()
    params = {n: p for n, p in model.named_parameters() if "parametrizations" not in n}
    op = make(cls, model, params, loss=nn.MSELoss(), data=[(X, draws(6, 2))])  # the frozen ones are asked for
    dense = op.to_dense()
    assert not dense[op.domain.slice("unused")].any()
    assert dense[op.domain.slice("frozen.weight")].any()
    assert [p.requires_grad for p in model.frozen.parameters()] == [False, False]
    with pytest.warns(RuntimeWarning, match="use none of these parameters"):
        only = make(cls, model, {"unused": model.unused}, loss=nn.MSELoss(), data=[(X, draws(6, 2))])
    assert not only.to_dense().any() and not (only @ torch.ones(2).double()).any()


def test_both_names_of_a_tied_parameter():
    model = Odd().double()
    data = [(X, draws(6, 2))]
    expected = make(HessianLinearOperator, model, {"tied.weight": model.tied.weight}, data, nn.MSELoss())
    again = make(HessianLinearOperator, model, {"head.weight": model.tied.weight}, data, nn.MSELoss())
    close(again.to_dense(), expected.to_dense())


def test_mixed_precisions_of_parameters(cls):
    def forward(net, x):
        return net.last(torch.tanh(net.first(x.float())).double())

    model = Net(forward, first=nn.Linear(3, 3), last=nn.Linear(3, 2).double())
    op = make(cls, model)
    assert op.dtype == torch.float64
    reference = make(cls, nn.Sequential(model.first, nn.Tanh(), model.last).double())
    dense = reference.to_dense()
    model.first.float()
    close(op.to_dense(), dense, 1e-4)
    tensors = [torch.ones_like(p) for p in model.parameters()]
    assert [t.dtype for t in op @ tensors] == [t.dtype for t in tensors]
    close(torch.cat([t.flatten().double() for t in op @ tensors]), dense.sum(1), 1e-4)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_lower_precisions(model, cls, dtype, tolerance):
    expected = make(cls, model).to_dense()
    low = model.to(dtype)
    op = make(cls, low, data=[(X[:2].to(dtype), Y[:2]), (X[2:].to(dtype), Y[2:])])
    assert op.dtype == dtype and (op @ torch.ones(20, dtype=dtype)).dtype == dtype
    close(op.to_dense().double(), expected, tolerance)
    close((op @ torch.eye(20, dtype=dtype)).double(), expected, tolerance)
    if cls is KFACLinearOperator and dtype == torch.float32:
        close(op.inverse(0.1).to_dense().double(), torch.linalg.inv(expected + 0.1 * torch.eye(20).double()), tolerance)


def test_autocast_of_the_caller(cls):
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    seen = []
    model[2].register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    data = [(X.float(), Y)]
    expected = make(cls, model, data=data).to_dense()
    assert torch.bfloat16 not in seen
    seen.clear()
    with Untouched(model), torch.autocast("cpu", torch.bfloat16):
        op = make(cls, model, data=data)
        found, product = op.to_dense(), op @ torch.ones(20)
    assert torch.bfloat16 in seen
    assert found.dtype == product.dtype == torch.float32
    close(found, expected, 0.05)
    close(product, expected.sum(1), 0.05)


@pytest.mark.parametrize("cls", [HessianLinearOperator, GGNLinearOperator, EFLinearOperator])
def test_outputs_without_an_axis_of_data(cls):
    """A scalar output with squared error, and one vector of logits for one datum."""

    model = Net(lambda net, x: net.linear(x).tanh().sum(), linear=nn.Linear(3, 1)).double()
    y = torch.tensor([0.3, 0.1]).double()
    op = make(cls, model, data=[(X[:1], y[0]), (X[1:2], y[1])], loss=nn.MSELoss())
    rows = nn.Sequential(model.linear, nn.Tanh(), nn.Flatten(0))
    close(op.to_dense(), make(cls, rows, data=[(X[:2], y)], loss=nn.MSELoss()).to_dense())
    logits = nn.Sequential(nn.Linear(3, 2), nn.Flatten(0)).double()
    single = make(cls, logits, data=[(X[:1], Y[0])])
    close(single.to_dense(), make(cls, logits[0], data=[(X[:1], Y[:1])]).to_dense())


def test_models_made_in_inference_mode(cls):
    with torch.inference_mode():
        model = nn.Linear(3, 2).double()
    with pytest.raises(ValueError, match=r"params\['weight'\]: it was made in inference mode"):
        make(cls, model)


def test_a_bound_on_embedding_norms_does_not_change_the_callers_table(cls):
    model = nn.Sequential(nn.Embedding(4, 3, max_norm=0.3), nn.Flatten(), nn.Linear(6, 2)).double()
    ids = torch.tensor([[0, 1], [2, 3], [0, 3], [1, 1], [2, 0], [3, 3]])
    # PyTorch does not differentiate the bound, as central differences would tell
    options = {"data": [(ids, Y)], "check_deterministic": False}
    with Untouched(model):
        op = make(cls, model, **options)
        found = op.to_dense()
        op @ draws(26)
    model(ids)  # PyTorch's own forward enforces it in place
    model[0].max_norm = None
    again = make(cls, model, **options).to_dense()
    # KFAC gives such a table a dense block, since it enters more than a lookup
    table = 12 if cls is KFACLinearOperator else 0
    close(found[table:, table:], again[table:, table:])


def test_vector_of_the_risk(model):
    risk = EmpiricalRisk(model, LOSS, dict(model.named_parameters()), [(X, Y)])
    assert torch.equal(risk.vector([torch.ones_like(p) for p in model.parameters()], "test"), torch.ones(20).double())
    with pytest.raises(ValueError, match="expected one vector, got 2 columns"):
        risk.vector(draws(20, 2), "test")


class Residual(nn.Module):
    """The residual of a differential equation: the model's own output is differentiated in its input."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()

    def forward(self, X):
        X = X.detach().requires_grad_()
        u = self.net(X)
        (slope,) = torch.autograd.grad(u.sum(), X, create_graph=True)
        return slope - u.sin()


def test_models_that_differentiate_in_their_input():
    """Nothing is computed without gradients, which such a model needs."""
    net, loss, X, y = Residual(), nn.CrossEntropyLoss(), real(5, 3), torch.tensor([0, 2, 1, 1, 0])
    case = Case(net, loss, [(X[:2], y[:2]), (X[2:], y[2:])])
    case.check(*KINDS)
    risk, z, u = EmpiricalRisk(net, loss, case.params, case.data), net(X), real(15)
    expected = torch.autograd.grad(z.flatten() @ u, list(case.params.values()))
    with torch.no_grad():
        close(risk.value(), loss(z, y))
        close(JacobianLinearOperator(net, case.params, case.data).T @ u, torch.cat([g.flatten() for g in expected]))
    assert facts(risk)["loss_terms"] == 5
    close(problem_of(risk, loss, 0).z, z[:4])


class OwnLoss(nn.Module):
    """As Hugging Face's models are with labels."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()

    def forward(self, X):
        return nn.functional.cross_entropy(self.net(X["x"]), X["labels"])


@pytest.mark.filterwarnings("ignore:loss. it is linear")
def test_models_that_return_their_own_loss(cls):
    net, X = OwnLoss(), {"x": real(5, 3), "labels": torch.tensor([0, 2, 1, 1, 0])}
    problem = net, lambda z, y: z.sum(), dict(net.named_parameters()), [(X, torch.zeros(5))]
    with pytest.raises(ValueError, match=r"model_func: expected an output of 5 data, got one number. .* pass the loss"):
        cls(*problem, reduction="sum")
    whole = HessianLinearOperator(*problem, reduction="sum", batch_size_fn=lambda X: 1)
    expected = HessianLinearOperator(net.net, LOSS, problem[2], [(X["x"], X["labels"])])
    close(whole.to_dense(), expected.to_dense())


@pytest.mark.parametrize("compiled", [torch.jit.script, lambda net: torch.jit.trace(net, X)])
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_script_modules_with_buffers(cls, compiled):
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double().eval()
    scripted, options = compiled(net), {"fisher_type": "type-2"} if cls is KFACLinearOperator else {}
    with Untouched(scripted):
        found = make(cls, scripted, **options).to_dense()
    if cls is KFACLinearOperator:  # no operation inside is seen, so that its blocks are those of whole gradients
        close(found.diagonal(), make(GGNLinearOperator, net).to_dense().diagonal())
    else:
        close(found, make(cls, net).to_dense())


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("before", [4, 0])  # what is compiled first may serve all of a class
@pytest.mark.parametrize("sizes", [(2, 4), (1, 5)])
@pytest.mark.parametrize("kind", ["Hessian", "GGN", "GGNDiagonal", "EKFAC"])
@pytest.mark.filterwarnings("ignore:model. there are batches of one datum")
def test_torchscripts_own_derivatives_are_not_asked_for(kind, sizes, before):
    """What it has optimised, as after some calls, it differentiates by formulas of its own, of which some are wrong."""
    net, data = Images().double().eval(), list(zip(real(6, 2, 3, 3).split(sizes), Y.split(sizes), strict=True))
    net.norm.running_mean.normal_(generator=torch.Generator().manual_seed(0))
    scripted = torch.jit.script(net)
    for _ in range(before):
        LOSS(scripted(data[-1][0]), data[-1][1]).backward()
    Case(scripted, LOSS, data).check(kind, truth=Case(net, LOSS, data).truth("Hessian" if kind == "Hessian" else "GGN"))
    assert torch._C._get_graph_executor_optimize()


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.head = nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.norm(self.first(x)).tanh().mean((2, 3)))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("compiled", [torch.jit.script, lambda net: torch.jit.trace(net, real(2, 2, 3, 3))])
def test_norms_of_one_datum_in_torchscript_are_told(compiled):
    scripted, x = compiled(Images().double().eval()), real(6, 2, 3, 3)
    for cls in OPERATORS:
        with pytest.warns(
            RuntimeWarning, match=r"^model: there are batches of one datum \(2\), .*batch_norm.* before torch\.jit"
        ):
            make(cls, scripted, data=[(x[k : k + 1], Y[k : k + 1]) for k in range(2)])
        make(cls, scripted, data=[(x, Y)])


class Graph(nn.Module):
    """A graph convolution: whose neighbours are added up is a buffer, an attribute or a part of X."""

    def __init__(self, adjacency, kind):
        super().__init__()
        self.first, self.second, self.kind = nn.Linear(3, 4).double(), nn.Linear(4, 2).double(), kind
        if kind == "buffer":
            self.register_buffer("adjacency", adjacency)
        elif kind == "attribute":
            self.adjacency = adjacency

    def forward(self, X):
        adjacency = X["adjacency"] if self.kind == "X" else self.adjacency
        return self.second(adjacency @ self.first(X["x"] if self.kind == "X" else X).tanh())


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("kind", ["buffer", "attribute", "X"])
@pytest.mark.parametrize("sparse", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr])
def test_sparse_tensors(cls, sparse, kind):
    adjacency = torch.eye(6).double() + draws(6, 6).gt(0.5)
    results = []
    for form in (sparse, torch.Tensor.clone):
        torch.manual_seed(0)
        net = Graph(form(adjacency), kind)
        given = {"x": X, "adjacency": form(adjacency)} if kind == "X" else X
        options = {"fisher_type": "type-2"} if cls is KFACLinearOperator else {}
        op = make(cls, net, data=[(given, Y)], **options)
        results.append([op.to_dense()])
        if cls is not KFACLinearOperator:
            with op.linearized():
                results[-1] += [op @ torch.ones(op.shape[1]).double() for _ in range(2)]
    for found, expected in zip(*results, strict=True):
        close(found, expected)


def test_values_of_models_that_run_without_gradients_only(model):
    """As one that goes through NumPy does."""
    net = nn.Sequential(model, Net(lambda _, z: torch.from_numpy(2 * z.numpy())))
    risk = EmpiricalRisk(net, LOSS, dict(net.named_parameters()), [(X, Y)])
    close(risk.value(), LOSS(2 * model(X), Y).detach())
    with torch.inference_mode():
        close(EmpiricalRisk(model, LOSS, dict(model.named_parameters()), [(X, Y)]).value(), LOSS(model(X), Y))
