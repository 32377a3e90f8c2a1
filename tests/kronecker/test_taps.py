"""What the taps see: parameters taken by an index, and the signature of a pass, beside plain autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from curvops.kronecker.rules import RULES
from curvops.kronecker.taps import Taps
from kronecker.cases import build, close, dense_ggn, integers, real


class Indexed(nn.Module):
    """One parameter that enters by a function of it and the input, before a small head."""

    def __init__(self, shape: tuple[int, ...], apply: Callable[[Tensor, Tensor], Tensor], width: int) -> None:
        super().__init__()
        self.p = nn.Parameter(real(*shape, seed=3))
        self.head = nn.Linear(width, 2).double()
        with torch.no_grad():
            for parameter in self.head.parameters():
                parameter.copy_(real(*parameter.shape, seed=4))
        self._apply_parameter = apply

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self._apply_parameter(self.p, x)).flatten(1))


ROW, COLUMN = torch.arange(3)[:, None], torch.arange(3)[None]
TRIANGLE = torch.tensor([[0, 1, 2], [1, 3, 4], [2, 4, 5]])
W = real(3, 3, seed=7)


def bounded_attention(p: Tensor, x: Tensor) -> Tensor:
    """SAM's relative positions: rows of a table by differences of places, in the product with the queries."""
    return torch.einsum("nqc,qkc->nqk", x, p[ROW - COLUMN + 2])


def swin(p: Tensor, x: Tensor) -> Tensor:
    """Swin's: a bias of the scores, from a table by an index."""
    bias = p[(ROW - COLUMN + 2).flatten()].view(3, 3, 2).permute(2, 0, 1).contiguous()
    return torch.softmax(x @ x.mT + bias.unsqueeze(0)[:, 0], -1) @ x


# name: shape of the parameter, its use, shape of a datum, width of the head's input
REPEATS: dict[str, tuple[tuple[int, ...], Callable[[Tensor, Tensor], Tensor], tuple[int, ...], int]] = {
    "circulant": ((3,), lambda p, x: F.linear(x, p[(ROW - COLUMN) % 3]), (3,), 3),
    "circulant, over positions": ((3,), lambda p, x: x @ p[(COLUMN - ROW) % 3], (2, 3), 6),
    "Toeplitz": ((5,), lambda p, x: x @ p[ROW - COLUMN + 2].T, (3,), 3),
    "Toeplitz by take": ((5,), lambda p, x: x @ torch.take(p, ROW - COLUMN + 2), (3,), 3),
    "Toeplitz by unfold": ((5,), lambda p, x: F.linear(x, p.unfold(0, 3, 1).flip(0)), (3,), 3),
    "symmetric": ((6,), lambda p, x: F.linear(x, p[TRIANGLE]), (3,), 3),
    "index_select of rows": ((2, 3), lambda p, x: F.linear(x, p.index_select(0, torch.tensor([0, 1, 0]))), (3,), 3),
    "gather": ((2, 3), lambda p, x: F.linear(x, p.gather(1, torch.tensor([[0, 0, 2], [1, 2, 2]]))), (3,), 2),
    "repeated convolution": ((2, 1, 2), lambda p, x: F.conv1d(x, p[[0, 1, 0]]), (1, 3), 6),
    "repeats within a slice": ((4,), lambda p, x: F.linear(x, p[TRIANGLE % 4][:2]), (3,), 2),
    "looked up twice": ((2, 3), lambda p, x: F.embedding((x > 0).long(), p[torch.tensor([1, 0, 1])]), (2,), 6),
    "by cat": ((3,), lambda p, x: x @ torch.stack([p, torch.cat([p[1:], p[:1]]), p.flip(0)]), (3,), 3),
    "by as_strided": ((5,), lambda p, x: x @ torch.as_strided(p, (3, 3), (1, 1)), (3,), 3),
    "block diagonal": ((2, 2), lambda p, x: F.linear(x, torch.block_diag(p, p)), (4,), 4),
    "circular padding": ((1, 1, 2), lambda p, x: F.conv1d(x, F.pad(p, (1, 1), mode="circular")), (1, 5), 2),
    "symmetric from a triangle": ((3, 3), lambda p, x: F.linear(x, p.triu() + p.triu(1).T), (3,), 3),
    "written into zeros": (
        (2,),
        lambda p, x: x @ torch.zeros(3, 3).double().index_put((ROW, COLUMN % 2), p[:1]),
        (3,),
        3,
    ),
    "repeated": ((2,), lambda p, x: x * p.repeat(2), (4,), 4),
    "tiled bias": ((2,), lambda p, x: F.linear(x, W, torch.tile(p, (2,))[:3]), (3,), 3),
    "a list as index": ((2, 3), lambda p, x: F.linear(x, p[[0, 0, 1]]), (3,), 3),
    "a mask as index": ((4,), lambda p, x: F.linear(x, W, p[torch.tensor([True, False, True, True])]), (3,), 3),
    "an index of an index": ((3,), lambda p, x: F.linear(x, p[TRIANGLE % 3].T[[1, 2]]), (3,), 2),
    "normalised by": ((2,), lambda p, x: F.layer_norm(x, (3,), p[[0, 1, 1]], p[[1, 1, 0]]), (2, 3), 6),
    "with the index first": (
        (3, 2),
        lambda p, x: torch.index_select(dim=0, index=torch.tensor([1, 1]), input=p) @ x[..., None],
        (2,),
        2,
    ),
    "two bilinear terms": ((2,), lambda p, x: F.bilinear(x, x, p[TRIANGLE[:2, :2] % 2][None]), (2,), 1),
    "transposed convolution": (
        (1, 2),
        lambda p, x: F.conv_transpose1d(x, p[[0, 0]][:, :, None].expand(2, 2, 2)),
        (2, 3),
        8,
    ),
    "expanded weight": ((3,), lambda p, x: F.linear(x, p.expand(2, 3)), (3,), 2),
    "expanded weight, as many as data": ((3,), lambda p, x: F.linear(x, p.expand(4, 3)), (3,), 4),
    "indexed bias": ((2,), lambda p, x: F.linear(x, W, p[torch.tensor([0, 1, 0])]), (3,), 3),
    "indexed bias over positions": ((2,), lambda p, x: F.linear(x, W, p[[1, 1, 0]]), (2, 3), 6),
    "weight and bias of one": ((3,), lambda p, x: F.linear(x, p[(ROW - COLUMN) % 3], p[[0, 0, 1]]), (3,), 3),
    "interleaved bias": ((2,), lambda p, x: x + p.repeat_interleave(2), (4,), 4),
    "expanded vector": ((1,), lambda p, x: x * p.expand(3), (3,), 3),
    "vector": ((2,), lambda p, x: x * p[torch.tensor([0, 1, 1])], (3,), 3),
    "relative positions, as SAM's": ((5, 2), bounded_attention, (3, 2), 9),
    "relative positions, as Swin's": ((5, 2), swin, (3, 2), 6),
}


@pytest.mark.parametrize("name", REPEATS)
@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.MSELoss()], ids=["ce", "mse"])
def test_repeats_of_an_index(name: str, loss: Any) -> None:
    shape, apply, datum, width = REPEATS[name]
    y = integers(2, 4) if isinstance(loss, nn.CrossEntropyLoss) else real(4, 2, seed=8)
    problem = Indexed(shape, apply, width), loss, real(4, *datum, seed=1), y
    expected = dense_ggn(problem)
    close(build("diagonal", problem).diagonal(), expected.diagonal())
    for sizes in ((), (3, 1)):
        ekfac = build("ekfac", problem, *sizes)
        for slot in map(ekfac.domain.slice, ekfac.domain.names):
            close(ekfac.diagonal()[slot].sum(), expected.diagonal()[slot].sum())
        close(ekfac.trace(), expected.trace())
    places = torch.cat([placed.positions for placed in ekfac.blocks])
    assert len(places.unique()) == len(places) <= len(expected)


class Branches(nn.Module):
    """A model that does one thing or another."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(3, 3).double(), nn.Linear(3, 3).double(), nn.LayerNorm(3).double()
        self.table = nn.Parameter(real(4, 3))
        self.how = "plain"

    def forward(self, x: Tensor) -> Tensor:
        n = len(x)
        h, k = self.a(x), self.b(x)
        if self.how == "plain":
            return self.norm(h.tanh())
        if self.how == "other parameter":
            return self.norm(k.tanh())
        if self.how == "other operation":
            return self.norm(h.sin())
        if self.how == "other axis":
            return self.norm(h.roll(1, 0))
        if self.how == "one axis":
            return self.norm(h.roll(1, 1))
        if self.how == "mean over data":
            return self.norm(h.tanh()) + h.mean(0)
        if self.how == "detached":
            return self.norm(h.detach().tanh())
        if self.how == "factor":
            return self.norm(h.tanh()) * 0.0
        if self.how == "rows of a table":
            return self.norm(h + self.table[torch.arange(n) % 2])
        if self.how == "other rows of a table":
            return self.norm(h + self.table[torch.arange(n) % 3])
        if self.how == "value":
            return self.norm(h.tanh() if (x.sum() > 0).item() else k.tanh())
        return self.norm(h.view(n, 3, 1).expand(n, 3, 1).flatten(1).tanh())


HOWS = ["plain", "other parameter", "other operation", "other axis", "one axis", "mean over data", "detached", "factor"]
HOWS += ["rows of a table", "other rows of a table", "views"]


def tapped(model: nn.Module, x: Tensor) -> tuple[Taps, Tensor]:
    taps = Taps(dict(model.named_parameters()), RULES, len(x))
    with taps:
        z = model(x)
    return taps, z


def test_a_signature_tells_operations_apart() -> None:
    model, found = Branches(), {}
    for how in HOWS:
        model.how = how
        taps, z = tapped(model, real(6, 3))
        found[how] = taps.signature(z)
    for how, signature in found.items():
        assert [other for other in HOWS if signature.covers(found[other])] == [how]


@pytest.mark.parametrize("how", [how for how in HOWS if "rows" not in how])
def test_a_signature_covers_other_data_in_another_number(how: str) -> None:
    model = Branches()
    model.how = how
    signatures = {}
    for n in (1, 2, 3, 6, 32):
        taps, z = tapped(model, real(n, 3, seed=n))
        signatures[n] = taps.signature(z)
    for n in (2, 3, 6, 32):
        assert all(signatures[n].covers(later) for later in signatures.values())
    assert not signatures[1].covers(signatures[6])  # a proof on one datum says nothing of several


def test_a_signature_sees_a_branch_on_values() -> None:
    model = Branches()
    model.how = "value"
    x = real(6, 3).abs()
    (one, z), (other, w), (again, v) = (tapped(model, t) for t in (x, -x, 2 * x))
    assert not one.signature(z).covers(other.signature(w))
    assert one.signature(z).covers(again.signature(v))


def test_which_of_two_results_is_the_output() -> None:
    """A choice that no operation shows."""
    model = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)])
    found = []
    for k in range(2):
        taps = Taps(dict(model.named_parameters()), RULES, 4)
        x = torch.ones(4, 3)
        with taps:
            z = [layer(x) for layer in model][k]
        found.append(taps.signature(z))
    assert not found[0].covers(found[1]) and not found[1].covers(found[0])


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


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.rnn, self.head = nn.LayerNorm(3).double(), nn.LSTM(3, 2).double(), nn.Linear(2, 2).double()
        self.calls = 0

    def inner(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.head(self.rnn(self.norm(x))[0])

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


def test_checkpointing_runs_again_as_it_ran() -> None:
    model = Checkpointed()
    x = real(2, 4, 3)
    params = list(model.parameters())
    expected = torch.autograd.grad(model.inner(x).sum(), params)
    model.calls = 0
    taps, z = tapped(model, x)
    before = len(taps.uses)
    found = taps.gradients(z.sum(), [*params, *(use.edge for use in taps.uses)])
    assert model.calls == 2 and len(taps.uses) == before == 6  # norm, gates, two steps, head
    for gradient, one in zip(found, expected, strict=False):
        close(gradient, one)


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


def test_parameters_and_slices_without_entries() -> None:
    class Empty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.p = nn.Linear(3, 2).double(), nn.Parameter(real(4))
            self.none = nn.Parameter(real(0, 3))

        def forward(self, x: Tensor) -> Tensor:
            both = torch.cat([self.layer(x), F.linear(x, self.none), x @ self.layer.weight[:0].T], 1)
            return both * self.p[:2] + self.p[2:2].sum() + self.p.split([2, 0, 2])[2]

    model = Empty()
    taps, z = tapped(model, real(5, 3))
    assert z.shape == (5, 2) and not taps.unknowns
    assert {view.name for use in taps.uses for view in _views(use)} == {"layer.weight", "layer.bias", "p"}


def _views(use: Any) -> list[Any]:
    parts = (use.vector,) if hasattr(use, "vector") else (use.weight, use.bias)
    return [view for view in parts if view is not None]


class Zoo(nn.Module):
    """One layer of each kind that applies a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.linear = nn.Embedding(5, 4), nn.Linear(4, 6)
        self.convolution = nn.Conv1d(6, 4, 2, stride=2, groups=2, padding=1)
        self.transposed = nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1, groups=2, padding=1, dilation=2)
        self.bilinear, self.free = nn.Bilinear(6, 6, 3), nn.Parameter(torch.randn(2, 3, 2))
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        h = self.convolution(self.linear(self.embedding(ids)).movedim(-1, 1))
        h = self.transposed(h.tanh()).movedim(1, -1)
        h = self.bilinear(h, h).unflatten(-1, (1, 3)).expand(-1, -1, 2, -1)
        return torch.einsum("nthc,hcd->nthd", h, self.free).flatten(1)


def test_what_is_known_without_inputs() -> None:
    model = Zoo()
    taps, z = tapped(model, integers(5, 3, 4))
    assert len(taps.uses) == 7 and not taps.unknowns
    for use in taps.uses:
        if use.weight is not None:
            a = use.inputs()
            if use.one_hot:
                a = a.dense(torch.float64)
            assert use.input_shape == tuple(a.shape[-2:]) and use.lead == a.shape[:-2]
    assert [use.one_hot for use in taps.uses].count(True) == 1
    # and the rows make up the gradients
    slopes = torch.autograd.grad(z.square().sum(), [use.edge for use in taps.uses], retain_graph=True)
    model_gradients = {}
    for use, g in zip(taps.uses, slopes, strict=True):
        rows = use.outputs(g)
        if use.bias is not None:
            model_gradients[use.bias.name] = rows.flatten(-2).flatten(0, -2).sum(0)
        if use.weight is not None:
            a = use.inputs() if not use.one_hot else use.inputs().dense(torch.float64)
            pair = (rows, a) if use.input_side == "right" else (a, rows)
            left, right = (t.flatten(0, -3) for t in pair)
            model_gradients[use.weight.name] = torch.einsum("mgl,mgr->glr", left, right).flatten()
    parameters = dict(model.named_parameters())
    expected = torch.autograd.grad(z.square().sum(), list(parameters.values()))
    assert set(parameters) == set(model_gradients)
    for name, gradient in zip(parameters, expected, strict=True):
        close(model_gradients[name], gradient.flatten())
