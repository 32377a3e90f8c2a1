"""What the taps see: the signature of a pass, what may mix the data, and modules that run their layers in other ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from curvops.kronecker.rules import RULES
from curvops.kronecker.taps import Taps
from kronecker.cases import Net, build, check, close, dense_ggn, integers, real, seeded

# what a model of two layers, a norm and a table may do
WAYS: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "plain": lambda m, x: m.norm(m.a(x).tanh()),
    "other parameter": lambda m, x: m.norm(m.b(x).tanh()),
    "other operation": lambda m, x: m.norm(m.a(x).sin()),
    "other axis": lambda m, x: m.norm(m.a(x).roll(1, 0)),
    "one axis": lambda m, x: m.norm(m.a(x).roll(1, 1)),
    "mean over data": lambda m, x: m.norm(m.a(x).tanh()) + m.a(x).mean(0),
    "detached": lambda m, x: m.norm(m.a(x).detach().tanh()),
    "factor": lambda m, x: m.norm(m.a(x).tanh()) * 0.0,
    "views": lambda m, x: m.norm(m.a(x).view(-1, 3, 1).expand(-1, 3, 1).flatten(1).tanh()),
    "other output": lambda m, x: [m.norm(m.a(x).tanh()), m.norm(m.b(x).tanh())][0],
    "other of two outputs": lambda m, x: [m.norm(m.a(x).tanh()), m.norm(m.b(x).tanh())][1],
}
TABLES: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "rows of a table": lambda m, x: m.norm(m.a(x) + m.table[torch.arange(len(x)) % 2]),
    "other rows of a table": lambda m, x: m.norm(m.a(x) + m.table[torch.arange(len(x)) % 3]),
}


def signature(way: Callable[[Net, Tensor], Tensor], n: int) -> Any:
    net = seeded(
        lambda: Net(way, a=nn.Linear(3, 3), b=nn.Linear(3, 3), norm=nn.LayerNorm(3), table=nn.Parameter(real(4, 3)))
    )
    with Taps(dict(net.named_parameters()), RULES, n) as taps:
        z = net(real(n, 3, seed=n))
    return taps.signature(z)


def test_a_signature_tells_operations_apart() -> None:
    found = {name: signature(way, 6) for name, way in (WAYS | TABLES).items()}
    for name, one in found.items():
        assert [other for other in found if one.covers(found[other])] == [name]


@pytest.mark.parametrize("name", WAYS)
def test_a_signature_covers_other_data_in_another_number(name: str) -> None:
    found = {n: signature(WAYS[name], n) for n in (1, 2, 3, 6, 32)}
    for n in (2, 3, 6, 32):
        assert all(found[n].covers(later) for later in found.values())
    assert not found[1].covers(found[6])  # a proof on one datum says nothing of several


@pytest.mark.parametrize("n", [3, 4, 8])
def test_what_may_mix_the_data_by_their_values(n: int) -> None:
    layer, attention = nn.Linear(4, 4).double(), nn.MultiheadAttention(4, 2, batch_first=True).double()
    weight_norm = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 16, 2).double())
    lstm = nn.LSTM(4, 4, batch_first=True).double()
    table = nn.Parameter(real(6, 4))
    plain: list[Callable[[Tensor], Tensor]] = [
        lambda x: attention(layer(x), x, x)[0].mean(1),
        lambda x: F.adaptive_avg_pool1d(weight_norm(x.mT).relu(), 1).flatten(1),
        lambda x: lstm(x)[0][:, -1],
        lambda x: (layer(x) + table[torch.arange(x.shape[1])]).flatten(0, 1).sin() * table.norm(),
        lambda x: (layer(x) - layer(x).mean(-2, keepdim=True)).unflatten(-1, (2, 2)).amax(-1),
    ]
    mixing: list[Callable[[Tensor], Tensor]] = [
        lambda x: layer(x) + 0.0 * layer(x).mean(0),
        lambda x: layer(x[:, 0]) + layer(x[:, 0]).sum(0),
        lambda x: layer(x) / layer(x).max(),
        lambda x: layer(x) + layer(x)[0, 1],
        lambda x: layer(x[:, 0]) / layer(x[:, 0]).std(0),
    ]
    for several, expected in ((plain, False), (mixing, True)):
        for forward in several:
            x = real(n, 5, 4)
            parameters = nn.ModuleList([layer, attention, weight_norm, lstm])
            taps = Taps({"table": table, **dict(parameters.named_parameters())}, RULES, n)
            with taps:
                forward(x)
            # inputs or states with as many entries as there are data might be a graph of the data
            assert taps.data_dependent is (expected or (n == 4 and forward in plain[:3:2]))


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
def test_checkpointed_and_compiled_modules(kind: str) -> None:
    def plain() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = plain()

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=False)

    rest = nn.CrossEntropyLoss(), real(5, 3), integers(2, 5)
    expected = build(kind, (plain(), *rest), 3, 2)
    for model in (Wrapped(), torch.compile(plain(), backend="aot_eager")):
        found = build(kind, (model, *rest), 3, 2)
        close(found.to_dense(), expected.to_dense())
        assert [row.why for row in found.explain().rows] == [row.why for row in expected.explain().rows]


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
def test_a_layer_that_is_converted_as_it_runs_keeps_its_blocks(kind: str) -> None:
    """As the routers of mixtures of experts do; where the precision is the same, nothing is changed."""

    def run(m: Net, x: Tensor) -> Tensor:
        return m.head(m.router.to(torch.float64)(x).tanh())

    model = seeded(lambda: Net(run, router=nn.Linear(3, 4), head=nn.Linear(4, 2)))
    case = model, nn.CrossEntropyLoss(), real(5, 3), integers(2, 5)
    op = build(kind, case, 3, 2)
    assert {row.why for row in op.explain().rows} == {"tapped"}
    check(kind, op, dense_ggn(case, 3, 2))


def test_a_dispatch_mode_around_it_changes_nothing() -> None:
    class Plain(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    model = seeded(lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)))
    case = model, nn.CrossEntropyLoss(), real(5, 2, 3, 3), integers(2, 5)
    expected = build("kfac", case, 3, 2)
    with Plain():  # such as one that counts operations; it shows those of backward passes, which take the parameters
        found = build("kfac", case, 3, 2)
    assert [row.why for row in found.explain().rows] == [row.why for row in expected.explain().rows]
    close(found.to_dense(), expected.to_dense())
