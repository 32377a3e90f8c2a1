"""What is seen on a walk over the data: any cut into batches, batches that differ, data run alone, what is kept."""

import copy
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvops import EKFACLinearOperator, EmpiricalRisk, GGNDiagonalLinearOperator, KFACLinearOperator
from curvops.kronecker import batches as joining
from curvops.kronecker import uses
from kronecker.cases import (
    APPROXIMATIONS,
    KINDS,
    PROBLEMS,
    Net,
    build,
    check,
    close,
    cnn,
    dense_ggn,
    integers,
    mlp,
    params,
    plan,
    real,
    seeded,
    tokens,
)

SIZES = (6, 5, 6)


def three(forward):
    """A net, and its data in batches of 6, 5 and 6."""
    model = seeded(
        lambda: Net(
            forward,
            hidden=nn.Linear(3, 4),
            head=nn.Linear(4, 3),
            square=nn.Parameter(real(4, 4)),
            other=nn.Parameter(real(4, 3)),
            scale=nn.Parameter(real(4)),
        )
    )
    return model, nn.CrossEntropyLoss(), real(sum(SIZES), 3), integers(3, sum(SIZES))


@pytest.mark.parametrize("kind", ["ekfac", "kfoc"])
def test_a_further_walk_over_other_batches_is_refused(kind):
    model, loss, X, y = mlp()

    class Other:
        def __init__(self, *walks):
            self.walks = iter(walks)

        def __iter__(self):
            return iter([(X[part], y[part]) for part in next(self.walks)])

    first, second = slice(0, 3), slice(3, 6)
    for further in ([second, first], [first], [first, second, first]):
        data = Other([first, second], further)
        with pytest.raises(RuntimeError, match=r"a further walk over the data yields other batches .* shuffle=False"):
            KINDS[kind](model, loss, params(model), data, check_deterministic=False, memory_budget=0)


def later(x):
    return len(x) == 5


DIFFERENT = {
    "bias with another weight": lambda net, X: net.head(
        F.linear(net.hidden(X).tanh(), net.square, net.hidden.bias if later(X) else None)
    ),
    "bias with another weight at first": lambda net, X: net.head(
        F.linear(net.hidden(X).tanh(), net.square, None if later(X) else net.hidden.bias)
    ),
    "bias alone later": lambda net, X: net.head(
        torch.tanh(F.linear(X, net.other, net.hidden.bias) if later(X) else net.hidden(X))
    ),
    "weight without its bias": lambda net, X: net.head(
        torch.tanh(F.linear(X, net.hidden.weight) if later(X) else net.hidden(X))
    ),
    "a part of a weight": lambda net, X: net.head(
        torch.tanh(F.linear(X, net.hidden.weight[:2]).repeat(1, 2) if later(X) else net.hidden(X))
    ),
    "other parts of a weight": lambda net, X: net.head(
        torch.cat([F.linear(X, part) for part in net.hidden.weight.split([1, 3] if later(X) else [2, 2])], 1).tanh()
    ),
    "bias as a vector": lambda net, X: net.head(net.hidden(X).tanh() * (net.hidden.bias if later(X) else 1)),
    "the transpose": lambda net, X: net.head(F.linear(net.hidden(X).tanh(), net.square.T if later(X) else net.square)),
    "with and without joint bias": lambda net, X: net.head(
        F.linear(net.hidden(X).tanh(), net.square, net.scale if later(X) else None)
    ),
}


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", DIFFERENT)
def test_batches_that_use_parameters_in_different_ways(name, kind, separate):
    problem = three(DIFFERENT[name])
    op = build(kind, problem, *SIZES, separate_weight_and_bias=separate)
    places = torch.cat([placed.positions for placed in op.blocks])
    assert len(places.unique()) == len(places) == op.shape[0]
    for row in op.explain().rows:
        assert row.size <= sum(op.domain.shapes[n].numel() for n in row.names)
    check(kind, op, dense_ggn(problem, *SIZES))


@pytest.mark.parametrize("name", DIFFERENT)
def test_rows_of_batches_that_differ(name):
    """What `layers` gives makes up the diagonal of the parameters whose rows it gives."""
    op = build("diagonal", three(DIFFERENT[name]), *SIZES)
    rows = [row for row in op.layers() if row.names == ("head.weight",)]
    assert {row.batch for row in rows} == {0, 1, 2}
    total = sum(torch.einsum("npgo,npgi->noi", r.output_gradients, r.inputs).square().sum(0) for r in rows)
    close(op.state.constant * total.flatten(), op.diagonal()[op.domain.slice("head.weight")])


def test_running_out_of_memory_is_no_mixing():
    def forward(net, X):
        if len(X) < 6:
            raise torch.OutOfMemoryError("out of memory")
        return net.head(net.hidden(X).sort(0)[0].tanh())

    model, loss, X, y = three(forward)
    with pytest.raises(torch.OutOfMemoryError):
        KFACLinearOperator(model, loss, params(model), [(X[:6], y[:6])], check_deterministic=False)


@pytest.fixture
def windows(monkeypatch):
    """Windows that were formed, and the most that were there at once."""
    alive, most, formed, patches = [], [0], [], uses.patches

    def counted(*args):
        made = patches(*args)
        formed.append(made.shape)
        alive[:] = [ref for ref in alive if ref() is not None] + [weakref.ref(made.untyped_storage())]
        most[0] = max(most[0], len(alive))
        return made

    monkeypatch.setattr(uses, "patches", counted)
    return formed, most


def convolutions(size):
    def make():
        return nn.Sequential(
            *(nn.Conv2d(8, 8, 3, padding=1), nn.Tanh()) * 3, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
        )

    model = seeded(make)
    for k in (2, 4):
        model[k] = seeded(lambda: nn.Conv2d(8, 8, 3, padding=1), k)
    return model, nn.CrossEntropyLoss(), real(4, 8, size, size), integers(5, 4)


def test_no_windows_where_the_autocorrelation_answers(windows):
    formed, _ = windows
    problem = convolutions(24)
    options = {"check_deterministic": False}
    build("kfac", problem, fisher_type="empirical", **options)
    certified = len(formed)
    build("kfac", problem, **options)
    assert certified == 3 and len(formed) == 2 * certified  # each layer once, to prove that its gradient is explained


@pytest.mark.parametrize("kind", KINDS)
def test_the_windows_of_one_layer_at_a_time(kind, windows):
    formed, most = windows
    build(kind, convolutions(5), memory_budget=0, check_deterministic=False)
    assert len(formed) > 3 and most[0] == 1


def test_a_copy_without_model_and_data():
    op = copy.deepcopy(build("kfac", mlp()))
    with pytest.raises(RuntimeError, match="a copy holds neither model nor data"):
        next(op.layers())


def test_a_snapshot():
    model, loss, X, y = mlp()
    data = [(X, y)]
    op = KFACLinearOperator(model, loss, params(model), data)
    dense = op.to_dense()
    with torch.no_grad():
        model[0].weight.mul_(2)
    data.append((X, y))
    assert torch.equal(op.to_dense(), dense)
    assert not torch.equal(KFACLinearOperator(model, loss, params(model), data).to_dense(), dense)


def test_operators_of_one_risk():
    model, loss, X, y = cnn()
    risk = EmpiricalRisk(model, loss, params(model), [(X, y)])
    for kind, cls in KINDS.items():
        close(cls.of(risk, fisher_type="type-2").to_dense(), build(kind, cnn()).to_dense(), 1e-12)
    with pytest.raises(ValueError, match="fisher_type: 'forward-only' takes no gradients"):
        EKFACLinearOperator.of(risk, fisher_type="forward-only")
    diagonal = GGNDiagonalLinearOperator.of(risk)
    close(diagonal.diagonal(), dense_ggn(cnn()).diagonal())


@pytest.mark.parametrize("fisher_type", ["type-2", "mc", "empirical"])
@pytest.mark.parametrize("approximation", APPROXIMATIONS)
def test_any_cut_gives_the_same_corrected_factors(fisher_type, approximation):
    """So many data that no eigenvalue is zero, and none is repeated."""
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Flatten()))
    problem = model, nn.MSELoss(), real(40, 2, 3), real(40, 8)
    options = {"fisher_type": fisher_type, "kfac_approx": approximation, "mc_samples": 2}
    whole, parts = build("ekfac", problem, **options), build("ekfac", problem, 1, 19, 20, **options)
    close(parts.to_dense(), whole.to_dense(), 1e-9)


def kept_bytes(op):
    (note,) = [note for note in op.explain().notes if note.startswith("rows kept")]
    number, unit = note.split(": ")[1].split()
    return float(number) * {"B": 1, "kB": 1000}[unit]


@pytest.fixture
def four_steps(monkeypatch):
    """Of KFOC, whatever they have reached: where they end by themselves rounding may cost or save one."""
    monkeypatch.setattr("curvops.kronecker.kfoc.STEPS", 4)
    monkeypatch.setattr("curvops.kronecker.kfoc.CONVERGED", -1)


@pytest.mark.parametrize("fisher_type", ["type-2", "mc", "empirical"])
@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("kind", ["ekfac", "kfoc"])
def test_a_second_walk_gives_what_kept_rows_give(kind, name, fisher_type, four_steps):
    problem, options = PROBLEMS[name](), {"fisher_type": fisher_type, "check_deterministic": False}
    kept = build(kind, problem, 3, 2, 1, **options)
    dense = kept.to_dense()
    some = build(kind, problem, 3, 2, 1, memory_budget=int(0.9 * kept_bytes(kept)), **options)
    swept = build(kind, problem, 3, 2, 1, memory_budget=0, **options)
    for other in (some, swept):
        close(other.to_dense(), dense, 1e-12)
    passes = [int(next(n for n in op.explain().notes if "backward" in n).split()[0]) for op in (kept, some, swept)]
    assert passes[0] < passes[1] < passes[2]
    assert kept_bytes(swept) == 0 < kept_bytes(kept)


@pytest.mark.parametrize("problem", [cnn, tokens])
def test_the_plan_knows_what_will_be_kept(problem):
    (planned,) = [n for n in plan("ekfac", problem()).notes if n.startswith("rows of this batch")]
    (kept,) = [n for n in build("ekfac", problem()).explain().notes if n.startswith("rows kept")]
    assert planned.startswith(f"rows of this batch: {kept.removeprefix('rows kept for the second look: ')};")


@pytest.mark.parametrize("fisher_type", ["type-2", "mc", "empirical"])
@pytest.mark.parametrize("kind", KINDS)
def test_small_batches_that_go_together_give_what_they_give_alone(kind, fisher_type, four_steps, monkeypatch):
    model, loss, X, y = mlp()
    problem, sizes = (model, loss, real(29, *X.shape[1:], seed=3), y.repeat(5)[:29]), (6, 6, 6, 6, 5)
    options = {"fisher_type": fisher_type, "check_deterministic": False}
    ops = [build(kind, problem, *sizes, **options), build(kind, problem, *sizes, memory_budget=2000, **options)]
    monkeypatch.setattr(joining, "JOINED", 0)
    alone = build(kind, problem, *sizes, **options)
    for op in ops:
        close(op.to_dense(), alone.to_dense(), 1e-10)
    together, apart = (int(op.explain().notes[0].split()[0]) for op in (ops[0], alone))
    assert 5 * together == 3 * apart
