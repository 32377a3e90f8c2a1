"""A fast way that is refuted or unsupported gives way to the reference, with a word; `linearized` keeps what was computed."""

import pytest
import torch
from conformance import close, draws
from kronecker.cases import Net
from problems import PROBLEMS, Interrupting, custom
from torch import nn

from curvops import EFLinearOperator, EmpiricalRisk, GGNLinearOperator, HessianLinearOperator
from curvops.products import ggn, hessian, proofs, rules
from curvops.products.batch import HeldRows
from curvops.products.record import Recorder
from curvops.products.reference import OutputLinearization
from curvops.products.risk_operator import RiskOperator

KINDS = [HessianLinearOperator, GGNLinearOperator, EFLinearOperator]
RULES = ["matrix_pays", "together_pays", "rows_pay", "pulls_pay", "kept_rows_pay", "forward_mode_pays"]


@pytest.fixture
def always(monkeypatch):
    for name in RULES:
        monkeypatch.setattr(rules, name, lambda *_: True)
    monkeypatch.setattr(rules, "FEW", 2)


def never(monkeypatch):
    for name in RULES:
        monkeypatch.setattr(rules, name, lambda *_: False)
    monkeypatch.setattr(rules, "LARGEST_MATRIX", 0)


@pytest.mark.parametrize("problem", ["mlp", "cnn"])
def test_all_ways_give_the_same(cls, problem, monkeypatch):
    p = PROBLEMS[problem]()
    V = draws(p.dim, 5)
    with monkeypatch.context() as patch:
        never(patch)
        op = cls(*p.args(2, 4))
        expected, text = op.to_dense(), op.explain()
        assert "vmap" not in text and "by layer" not in text
    for name in RULES:
        with monkeypatch.context() as patch:
            never(patch)
            patch.setattr(rules, "LARGEST_MATRIX", 4096)
            patch.setattr(rules, name, lambda *_: True)
            op = cls(*p.args(2, 4))
            close(op @ V, expected @ V)
            close(op @ V[:, 0], expected @ V[:, 0])
            close(op.to_dense(), expected)
            with op.linearized():
                close(op @ V, expected @ V)
                close(op.to_dense(), expected)


WAYS = [
    (HessianLinearOperator, hessian, "layered_hessian", "to_dense", "by layer"),
    (HessianLinearOperator, hessian, "jvp", "columns", "forward over reverse by vmap"),
    (GGNLinearOperator, ggn, "pulled_rows", "to_dense", "rows Sᵀ J by vmap"),
    (EFLinearOperator, ggn, "pulled_rows", "columns", "rows Sᵀ J by vmap"),
    (GGNLinearOperator, ggn, "jvp", "by_vmap", "J v and Jᵀ u by vmap"),
]


@pytest.mark.parametrize("cls,module,function,work,name", WAYS)
@pytest.mark.parametrize("lie", ["wrong", "nan", "fails"])
def test_a_refuted_way_is_not_taken(cls, module, function, work, name, lie, always, monkeypatch):
    p = PROBLEMS["mlp"]()
    monkeypatch.setattr(rules, "forward_mode_pays", lambda *_: False)
    monkeypatch.setattr(rules, "matrix_pays", lambda *_: False)
    if work == "by_vmap":
        monkeypatch.setattr(rules, "rows_pay", lambda *_: False)
    expected = cls(*p.args(2, 4)) @ torch.eye(p.dim).double()
    plain = getattr(module, function)

    def lying(*args, **options):
        if lie == "fails":
            raise RuntimeError("no batching rule")
        found = plain(*args, **options)
        factor = torch.nan if lie == "nan" else 1.01
        if function == "jvp":
            out, tangent = found
            return out, {k: t * factor for k, t in tangent.items()} if isinstance(tangent, dict) else tangent * factor
        return (t * factor for t in found) if function == "pulled_rows" else found * factor

    monkeypatch.setattr(module, function, lying)
    op = cls(*p.args(2, 4))
    found = op.to_dense() if work == "to_dense" else op @ draws(p.dim, 5)
    close(found, expected if work == "to_dense" else expected @ draws(p.dim, 5))
    text = op.explain()
    assert name in text and ("unsupported here" if lie == "fails" else "differs from the reference by") in text


@pytest.mark.parametrize("cls,module", [(HessianLinearOperator, hessian), (GGNLinearOperator, ggn)])
def test_as_many_columns_go_together_as_there_is_room_for(cls, module, monkeypatch):
    p, taken = PROBLEMS["mlp"](), []
    for name in ("matrix_pays", "rows_pay", "pulls_pay"):
        monkeypatch.setattr(rules, name, lambda *_: False)
    V, plain = draws(p.dim, 10), module.tangents
    expected = cls(*p.args(2, 4), memory_budget=1) @ V  # one by one
    monkeypatch.setattr(module, "tangents", lambda some, space: taken.append(len(some)) or plain(some, space))
    (X, _), _ = p.args(2, 4)[3]
    with Recorder(2) as record:
        p.model(X)
    one = record.entries // 2
    # of the last two, the batches would take each other's room, or each columns' own whatever it is
    for entries, chunks in ((2**25, [10]), (6 * 4 * one, [10, 6, 4]), (1, [4, 4, 2])):
        monkeypatch.setattr(rules, "LARGEST_TANGENTS", entries)
        op = cls(*p.args(2, 4), check_deterministic=False)
        close(op @ V, expected)
        assert taken == chunks and "vmap" in op.explain()
        taken.clear()
    op = cls(*p.args(2, 4), check_deterministic=False, memory_budget=1)
    close(op @ V, expected)
    assert not taken and "vmap" not in op.explain()


@pytest.mark.parametrize("cls,passes", [(GGNLinearOperator, 6 * 3), (EFLinearOperator, 6)])
@pytest.mark.parametrize("mixing", [False, True], ids=["asks a value", "batch norm in train mode"])
def test_rows_by_a_backward_pass_each_where_vmap_is_unsupported(cls, passes, mixing, monkeypatch):
    class Asking(nn.Module):
        def forward(self, X):
            return X if X.sum().item() > 1e9 else X.tanh()

    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8) if mixing else Asking(), nn.Linear(8, 3)).double()
    data = [(draws(6, 4, seed=1), torch.arange(6) % 3)]
    op = cls(net, nn.CrossEntropyLoss(), dict(net.named_parameters()), data, check_deterministic=False)
    pulls = []
    plain = OutputLinearization.pull
    monkeypatch.setattr(OutputLinearization, "pull", lambda self, *args: pulls.append(1) or plain(self, *args))
    found, text = op.to_dense(), op.explain()
    assert "unsupported here" in text and "one by one: rows Sᵀ J, a backward pass for each" in text
    assert passes <= len(pulls) <= passes + 2  # the reference's product that vmap is compared with
    monkeypatch.setattr(rules, "pulls_pay", lambda *_: False)
    close(found, op.to_dense())
    (X, y), flat = data[0], torch.cat([p.flatten() for p in net.parameters()])

    def outputs(theta):
        parts = theta.split([p.numel() for p in net.parameters()])
        named = {n: t.view_as(p) for (n, p), t in zip(net.named_parameters(), parts, strict=True)}
        return torch.func.functional_call(net, named, (X,))

    J, p = torch.autograd.functional.jacobian(outputs, flat), net(X).softmax(1)
    if cls is GGNLinearOperator:
        S = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    else:
        g = p - nn.functional.one_hot(y, 3)
        S = g.unsqueeze(2) * g.unsqueeze(1)
    close(found, torch.einsum("ncp,ncd,ndq->pq", J, S, J).detach() / 6)


@pytest.mark.parametrize("kind", [GGNLinearOperator, EFLinearOperator])
def test_batches_whose_graphs_have_a_part_in_common_go_together(kind, always):
    class Keeping(nn.Module):
        def __init__(self, keeps):
            super().__init__()
            torch.manual_seed(1)
            self.weight, self.keeps, self.kept = nn.Parameter(torch.randn(3, 4).double()), keeps, None

        def forward(self, x):
            if self.kept is None or not self.keeps:
                self.kept = self.weight.sin()
            return x @ self.kept.T

    data = [(draws(2, 4, seed=k), torch.arange(2)) for k in range(3)]
    V, found = draws(12, 6), []
    for keeps in (True, False):
        net = Keeping(keeps)
        op = kind(net, nn.CrossEntropyLoss(), {"weight": net.weight}, data, check_deterministic=False)
        found.append(op @ V)
    assert "equals the reference's" in op.explain()
    close(*found)


@pytest.mark.parametrize("room,passes", [(3.9, 0), (4.1, 1)])
def test_a_program_is_made_where_there_is_room_to_make_it(room, passes, monkeypatch):
    p, made, plain = PROBLEMS["cnn"](), [], ggn.linearized_push
    monkeypatch.setattr(rules, "forward_mode_pays", lambda *_: True)
    monkeypatch.setattr(rules, "kept_rows_pay", lambda *_: False)
    monkeypatch.setattr(ggn, "linearized_push", lambda *args: made.append(1) or plain(*args))
    op, hold = GGNLinearOperator(*p.args(6), check_deterministic=False), GGNLinearOperator._hold
    expected = op @ draws(p.dim)
    monkeypatch.setattr(GGNLinearOperator, "_hold", lambda self, product, times: hold(self, product, room))
    with op.linearized():
        close(op @ draws(p.dim), expected)
        close(op @ draws(p.dim), expected)
    assert len(made) == passes


def test_rows_are_made_beside_what_is_kept(monkeypatch):
    """A few data at a time, as far as the budget has room beside the batches before."""
    p, taken, wanted, plain = PROBLEMS["mlp"](), [], [], ggn.pulled_rows
    op, V = GGNLinearOperator(*p.args(3, 3), check_deterministic=False), draws(p.dim, 3)
    expected = op @ V

    def counting(*args):
        *others, granted = args
        for some in plain(*others, lambda size: wanted.append(size) or granted(size)):
            taken.append(len(some) // 3)
            yield some

    monkeypatch.setattr(ggn, "pulled_rows", counting)
    for budget, together in ((lambda: 10**9, [3, 3]), (lambda: wanted[0], [3, 2, 1])):
        op.memory_budget = budget()
        with op.linearized():
            close(op @ V, expected)
            close(op @ V, expected)
        assert taken == together
        taken.clear()


# a product with a parameter that no mode sees and that has no forward mode
hidden_product = custom("Hidden", torch.mul, lambda g, x, w: (g * w, (g * x).sum_to_size(w.shape)))


def convolutional(way=lambda conv, h: conv(h)):
    """A net for which forward mode pays."""

    def forward(net, x):
        return net.head(net.way(net.second, net.first(x).tanh()).mean((2, 3)))

    torch.manual_seed(3)
    model = Net(forward, first=nn.Conv2d(1, 3, 3), second=nn.Conv2d(3, 3, 3), head=nn.Linear(3, 3), way=way).double()
    X, y = draws(24, 64).view(24, 1, 8, 8), torch.arange(24) % 3
    return model, nn.CrossEntropyLoss(), dict(model.named_parameters()), [(X[:12], y[:12]), (X[12:], y[12:])]


def test_forward_mode_serves_where_it_is_proved(always):
    args = convolutional()
    risk = EmpiricalRisk(*args)
    op, other = GGNLinearOperator.of(risk), EFLinearOperator.of(risk)
    v = draws(op.shape[1])
    with pytest.MonkeyPatch.context() as patch:
        never(patch)
        expected = [cls(*args) @ v for cls in (GGNLinearOperator, EFLinearOperator)]
    close(op @ v, expected[0])
    assert "J v: forward mode" in op.explain() and len(risk.proofs) == 1
    close(other @ v, expected[1])
    assert len(risk.proofs) == 1  # of the risk: the second operator's pass is the same


@pytest.mark.parametrize("later", [False, True])
def test_forward_mode_that_misses_a_parameter_is_not_trusted(later, always):
    """Two heads whose blocks do not touch: vᵀ G v = ‖Sᵀ J v‖² alone would not tell."""
    args = convolutional()
    model = args[0]
    hidden = nn.Parameter(torch.ones(1, 1, 1, dtype=torch.float64))
    model.register_parameter("hidden", hidden)
    view = hidden.view(1, 1)  # which stand-ins do not reach

    def second(conv, h):
        use = not later or bool(h.sum() < cut)
        return conv(h) * view if use else conv(h)

    sums = [model.first(X).tanh().sum().item() for X, _ in args[3]]
    cut = sum(sums) / 2
    model.way = second
    args = (model, args[1], dict(model.named_parameters()), args[3])
    v = draws(sum(p.numel() for p in model.parameters()))
    with pytest.MonkeyPatch.context() as patch:
        never(patch)
        expected = GGNLinearOperator(*args, check_deterministic=False) @ v
    op = GGNLinearOperator(*args, check_deterministic=False)
    close(op @ v, expected)
    if not later:
        assert "J v: reverse over reverse (forward mode is not the adjoint" in op.explain()


def test_the_free_check_catches_a_forward_mode_that_changes_its_mind(always, monkeypatch):
    args = convolutional()
    op = GGNLinearOperator(*args)
    v = draws(op.shape[1])
    expected = op @ v
    assert "J v: forward mode" in op.explain()
    plain = proofs.jvp
    monkeypatch.setattr(proofs, "jvp", lambda *a: tuple(1.01 * t for t in plain(*a)))
    close(op @ v, expected)
    monkeypatch.setattr(proofs, "jvp", lambda *a: tuple(0.0 * t for t in plain(*a)))
    close(op @ v, expected)


def test_passes_are_told_apart():
    def record(size, run, x):
        recorder = Recorder(size)
        leaf = torch.ones(3, requires_grad=True)
        with recorder:
            recorder.finish(run(x * leaf))
        return recorder

    def plain(h):
        return h.tanh().sum(1)

    few, many = record(2, plain, torch.ones(2, 3)), record(6, plain, torch.ones(6, 3))
    assert few.covers(many) and many.covers(few) and few.fresh
    assert not few.covers(record(6, lambda h: h.sin().sum(1), torch.ones(6, 3)))
    assert not few.covers(record(6, lambda h: hidden_product(h, h).tanh().sum(1), torch.ones(6, 3)))
    assert not few.covers(record(6, lambda h: h.tanh().sum(0), torch.ones(6, 3)))
    assert not few.covers(record(6, lambda h: h[:, :2].tanh().sum(1), torch.ones(6, 3)))
    shared = torch.ones(3, requires_grad=True).exp()
    assert not record(2, lambda h: h * shared, torch.ones(2, 3)).fresh  # its graph is somebody else's too


def test_rules_are_of_counts_alone():
    assert rules.matrix_pays(300, 400) and not rules.matrix_pays(299, 400)
    assert not rules.matrix_pays(10_000, rules.LARGEST_MATRIX + 1)
    record = Recorder(2)
    assert rules.together_pays(4, record) and not rules.together_pays(3, record)
    for record.work, dear, pays in (
        (rules.SMALL + 1, False, (False, False)),
        (rules.SMALL + 1, True, (True, True)),
        (16 * rules.SMALL + 1, True, (False, True)),
        (64 * rules.SMALL + 1, True, (False, False)),
    ):
        for record.convolves, record.dear in ((dear, False), (False, dear)):
            assert tuple(rules.together_pays(4, record, jacobian) for jacobian in (False, True)) == pays
    assert rules.columns_together(0, None) == rules.columns_together(1000, None) == rules.CHUNK
    assert rules.columns_together(2**30, None) == rules.TOGETHER and rules.columns_together(1000, 20_000) == 5
    assert rules.rows_pay(16, 100, 683, 20, 500_000) and not rules.rows_pay(16, 10**6, 10**6, 100, 500_000)
    assert RiskOperator._fast.__isabstractmethod__


@pytest.fixture(params=KINDS)
def cls(request):
    return request.param


def counted(cls, budget=None, sizes=(2, 4)):
    """An operator, and a list that grows with each run of its model."""
    p, calls = PROBLEMS["mlp"](), []
    p.model.register_forward_hook(lambda *_: calls.append(1))
    return calls, cls(*p.args(*sizes), check_deterministic=False, memory_budget=budget), p


@pytest.mark.parametrize("rows", [True, False])
def test_the_model_runs_once_for_each_batch(cls, rows, monkeypatch):
    monkeypatch.setattr(rules, "kept_rows_pay", lambda *_: rows)
    calls, op, p = counted(cls)
    v, V = draws(p.dim), draws(p.dim, 3)
    expected, columns = op @ v, op @ V
    with op.linearized() as same, op.linearized():
        assert same is op
        close(op @ v, expected)
        calls.clear()
        for _ in range(3):
            close(op @ v, expected)
            close(op @ V, columns)
        close(op.to_dense() @ v, expected)
        assert not calls and "2 of 2 batches kept" in op.explain()
        held = rows and cls is not HessianLinearOperator
        assert all(isinstance(product, HeldRows) == held for product in op._kept._products.values())
    op @ v
    assert len(calls) >= 2


def test_what_exceeds_the_budget_is_computed_anew(cls, monkeypatch):
    monkeypatch.setattr(rules, "kept_rows_pay", lambda *_: False)
    calls, op, p = counted(cls, sizes=(2, 2, 2))
    v = draws(p.dim)
    expected = op @ v
    with op.linearized():
        op @ v
        each = op._kept._size // 3 * 11 // 10
    for budget, runs in ((0, 3), (each, 2), (2 * each, 1), (3 * each, 0)):
        calls, op, p = counted(cls, budget, sizes=(2, 2, 2))
        with op.linearized():
            close(op @ v, expected)
            calls.clear()
            for k in range(1, 4):
                close(op @ v, expected)
                assert len(calls) == k * runs
            assert op._kept._size <= budget and f"{3 - runs} of 3 batches kept" in op.explain()


def test_a_failure_inside_leaves_a_context_that_works(cls):
    p = PROBLEMS["mlp"]()
    loader = Interrupting(p.data(2, 4))
    op = cls(p.model, p.loss, p.params, loader)
    v = draws(p.dim)
    expected = op @ v
    with op.linearized():
        loader.error = RuntimeError("disk")
        with pytest.raises(RuntimeError, match="disk"):
            op @ v
        loader.error = None
        for _ in range(2):
            close(op @ v, expected)


def test_a_paddings_row_is_a_constant_in_forward_mode_too():
    net = nn.Sequential(nn.Embedding(5, 3, padding_idx=0), nn.Flatten(), nn.Tanh(), nn.Linear(12, 3)).double()
    nn.init.normal_(net[0].weight)  # the padding's row is no zero, and is used
    data = [(torch.arange(24).reshape(6, 4) % 5, torch.arange(6) % 3)]
    op = HessianLinearOperator(net, nn.CrossEntropyLoss(), dict(net.named_parameters()), data)
    found = op.to_dense()
    assert "forward over reverse by layer (a random combination equals" in op.explain()
    close(found, torch.stack([op @ v for v in torch.eye(op.shape[1]).double()], 1))
    assert not found[:3].any()
