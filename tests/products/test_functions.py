"""A model's own `torch.autograd.Function`s, whose backward passes may carry no graph, or a wrong one."""

import pytest
import torch
from conformance import Untouched, close, draws
from kronecker.cases import Net
from torch import nn

from curvops import (
    EFLinearOperator,
    EmpiricalRisk,
    GGNLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
)
from curvops.clients.check import check
from curvops.products.judge import judge_hessian

X, Y = draws(6, 3), draws(6, 2, seed=1)


class _Fused(torch.autograd.Function):
    """A layer by a kernel of its own: its gradient is right, and carries no graph."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return torch.tanh(x @ w.T)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        with torch.no_grad():
            d = g * (1 - torch.tanh(x @ w.T) ** 2)
            return d @ w, d.T @ x


class Fused(nn.Module):
    """A model of which no stand-in reaches a parameter."""

    def __init__(self, function=_Fused):
        super().__init__()
        self.w, self.head, self.function = nn.Parameter(draws(2, 3, seed=2)), nn.Linear(2, 2).double(), function

    def forward(self, x):
        return self.head(self.function.apply(x, self.w))


class Shared(nn.Module):
    """A part that stays the same in copies, as one that several models have."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2).double(), requires_grad=False)

    def forward(self, z):
        return self.scale * z

    def __deepcopy__(self, memo):
        return memo.setdefault(id(self), self)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_parameters_that_no_stand_in_reaches_are_moved_in_a_copy(dtype):
    model = Fused().to(dtype)
    versions = [p._version for p in model.parameters()]
    with Untouched(model), pytest.warns(RuntimeWarning, match="^Hessian: .*differs .*_Fused"):
        HessianLinearOperator(model, nn.MSELoss(), dict(model.named_parameters()), [(X.to(dtype), Y.to(dtype))])
    assert [p._version for p in model.parameters()] == versions


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_no_verdict_where_a_copy_shares_tensors(dtype):
    """To bring it to double precision would convert the caller's own."""
    model = nn.Sequential(Fused(), Shared()).to(dtype)
    own, tensors = {name: p for name, p in model.named_parameters() if p.requires_grad}, list(model.parameters())
    data = [(X.to(dtype), Y.to(dtype))]
    with Untouched(model):
        verdict = judge_hessian(EmpiricalRisk(model, nn.MSELoss(), own, data))
        check(model, nn.MSELoss(), own, data)
    assert verdict.error is None and "neither stand-ins nor a copy" in verdict.why
    assert all(p is q and q.dtype is dtype for p, q in zip(tensors, model.parameters(), strict=True))


class Uncopied(Fused):
    def __deepcopy__(self, memo):
        raise OSError("a handle that cannot be copied")


class _Once(_Fused):
    backward = staticmethod(torch.autograd.function.once_differentiable(_Fused.backward))


class _Refused(_Fused):
    @staticmethod
    def backward(ctx, g):
        if g.requires_grad:
            raise RuntimeError("no second derivative")
        return _Fused.backward(ctx, g)


class _Sometimes(_Fused):
    """Its backward pass carries a graph to some of what it takes."""

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        d = g * (1 - torch.tanh(x @ w.T) ** 2)
        return d @ w, d.detach().T @ x


def test_functions_that_are_marked_as_once_differentiable_have_no_hessian():
    """PyTorch's own error comes only where gradients of all leaves are asked for."""
    model = Fused(_Once)
    op = HessianLinearOperator(model, nn.MSELoss(), dict(model.named_parameters()), [(X, Y)])
    assert "it is an error here" in op.explain()
    for work in (lambda: op @ draws(12), op.to_dense):
        with pytest.raises(NotImplementedError, match=r"the backward pass of '_Once', a torch\.autograd\.Function of"):
            work()


@pytest.mark.parametrize("function", [_Fused, _Once, _Sometimes])
@pytest.mark.parametrize("check_deterministic", [True, False])
def test_j_v_is_taken_by_rows_where_a_backward_pass_carries_no_graph(function, check_deterministic, monkeypatch):
    model, v, columns = Fused(function), draws(12, seed=4), draws(12, 3, seed=5)
    rows = [torch.autograd.grad(z, list(model.parameters()), retain_graph=True) for z in model(X).flatten()]
    J = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    slopes = (2 / Y.numel()) * (model(X) - Y).detach()
    errors = torch.einsum("nc,ncd->nd", slopes, J.view(*Y.shape, 12))
    problem = model, nn.MSELoss(), dict(model.named_parameters()), [(X, Y)]
    with pytest.warns(
        RuntimeWarning, match=f"^J v takes a backward pass for each of the 12 outputs .*'{function.__name__}'"
    ):
        for cls, expected in (
            (GGNLinearOperator, 2 / Y.numel() * J.T @ J),
            (EFLinearOperator, Y.numel() * errors.T @ errors),
        ):
            op = cls(*problem, check_deterministic=check_deterministic)
            assert "wrong" not in op.explain()
            close(op @ v, expected @ v)
            close(op @ columns, expected @ columns)
            close(op.to_dense(), expected)
            with op.linearized():
                close(op @ v, expected @ v)
        close(JacobianLinearOperator(*problem[::2], [(X, Y)]) @ v, J @ v)
    monkeypatch.setattr("curvops.products.reference.MOST_ROWS", 11)
    with pytest.raises(NotImplementedError, match="is not differentiated"):
        op @ v


@pytest.mark.parametrize("cls", [HessianLinearOperator, GGNLinearOperator])
def test_no_verdict_where_the_module_cannot_be_copied(cls):
    model = Uncopied()
    op = cls(model, nn.MSELoss(), dict(model.named_parameters()), [(X, Y)])
    assert "neither stand-ins nor a copy" in op.explain()


@pytest.mark.parametrize("cls", [HessianLinearOperator, GGNLinearOperator])
def test_no_verdict_where_second_derivatives_are_an_error(cls):
    """The operator is made, and each product says what its backward pass says."""
    model = Fused(_Refused)
    op = cls(model, nn.MSELoss(), dict(model.named_parameters()), [(X, Y)])
    assert "it is an error here" in op.explain()
    for work in (
        lambda: op @ torch.ones(12).double(),
        lambda: op.trace(num_products=6),
        lambda: op.trace(num_products=6),
    ):
        with pytest.raises(RuntimeError, match="no second derivative"):
            work()


class _OnceOnly(torch.autograd.Function):
    """The backward pass of an operation, which says in a library's own words that it is the last one."""

    @staticmethod
    def forward(ctx, g, slope):
        return g * slope

    @staticmethod
    def backward(ctx, g):
        raise RuntimeError(_OnceOnly.words)


class _Pooled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return _OnceOnly.apply(g @ w, torch.ones_like(x)), g.T @ _OnceOnly.apply(x, torch.ones_like(x))


@pytest.mark.parametrize(
    "words",
    [
        "double backwards on roi_align not supported",
        "Double backward is not yet implemented for this operation",
        "deform_conv2d does not support double backward",
    ],
)
def test_a_librarys_own_words_for_no_second_derivative_are_explained(words, monkeypatch):
    """The Hessian has none; J v is there, row by row."""
    monkeypatch.setattr(_OnceOnly, "words", words, raising=False)
    model = Net(lambda m, x: m.head(_Pooled.apply(m.first(x), m.w).tanh()), first=nn.Linear(3, 3), head=nn.Linear(2, 2))
    model.w = nn.Parameter(draws(2, 3, seed=2))
    problem = model.double(), nn.MSELoss(), dict(model.named_parameters()), [(X, Y)]
    hessian, ggn = HessianLinearOperator(*problem), GGNLinearOperator(*problem)
    v = draws(hessian.shape[1])
    for work in (lambda: hessian @ v, hessian.to_dense):
        with pytest.raises(NotImplementedError, match=f"{words}.*first derivatives only"):
            work()
    rows = [torch.autograd.grad(z, list(model.parameters()), retain_graph=True) for z in model(X).flatten()]
    J = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    with pytest.warns(RuntimeWarning, match=f"backward pass for each of the 12 outputs of a batch: .*{words}"):
        close(ggn @ v, 2 / Y.numel() * J.T @ (J @ v))
        close(ggn.to_dense(), 2 / Y.numel() * J.T @ J)


class _Right(torch.autograd.Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return torch.tanh(x @ w.T)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        d = g * (1 - torch.tanh(x @ w.T) ** 2)
        return d @ w.to(d.dtype), d.T @ x.to(d.dtype)


class Half(Fused):
    """Its layers run in half precision, and it gives its output in single."""

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(x).float()


RIGHT = {
    "in the null space of J": (Fused, torch.float64, lambda v: torch.cat([v[:6] * 0, v[6:10] * 0, v[10:] * 0 + 1])),
    "zero": (Fused, torch.float64, lambda v: v * 0),
    "no number": (Fused, torch.float32, lambda v: v * torch.nan),
    "beyond single precision": (Fused, torch.float32, lambda v: v * 1e38),
    "below it": (Fused, torch.float32, lambda v: v * 1e-42),
    "in single precision": (Fused, torch.float32, lambda v: v),
    "autocast": (Half, torch.float32, lambda v: v),
}


@pytest.mark.filterwarnings("ignore:GGNLinearOperator. the product has entries that are not finite")
@pytest.mark.parametrize("what", RIGHT)
def test_right_functions_are_not_taken_by_rows(what, monkeypatch):
    """Where rounding, or what is not finite, is all that there is to compare."""
    monkeypatch.setattr("curvops.products.reference.MOST_ROWS", 0)
    kind, dtype, change = RIGHT[what]
    model = nn.Sequential(kind(_Right).to(dtype), nn.LogSoftmax(-1))
    problem = model, nn.MSELoss(), dict(model.named_parameters()), [(X.to(dtype), Y.to(dtype))]
    op, v = GGNLinearOperator(*problem, check_deterministic=False), change(draws(12)).to(dtype)
    with op.linearized():
        found = op @ v, op @ v
    assert all(torch.equal(each, op @ v) or not each.isfinite().all() for each in found)


def test_rows_are_taken_once_for_several_columns(monkeypatch):
    passes = []
    monkeypatch.setattr(_Once, "backward", staticmethod(lambda ctx, g: passes.append(0) or _Fused.backward(ctx, g)))
    model = Fused(_Once)
    op = JacobianLinearOperator(model, dict(model.named_parameters()), [(X, Y)])
    with pytest.warns(RuntimeWarning, match="J v takes a backward pass for each of the 12 outputs"):
        op @ draws(12, 3)
    assert 12 <= len(passes) < 20
