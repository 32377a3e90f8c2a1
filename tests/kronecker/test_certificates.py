"""What was proved on one batch or for one operator is not taken for another: each beside autograd, batch by batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kronecker.cases import KINDS, Net, build, check, close, ggn_of_batches, integers, params, real, seeded


def net(forward: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    """Three layers, of which a forward pass uses what it likes."""
    return seeded(lambda: Net(forward, a=nn.Linear(3, 4), b=nn.Linear(3, 4), head=nn.Linear(4, 2)))


def quantised(net: Any, x: Tensor) -> Tensor:
    h = torch.tanh(net.a(x))
    scale = h.abs().max().detach()
    return net.head(h + ((h / scale).round() * scale - h).detach())


def standardised(net: Any, x: Tensor) -> Tensor:
    h = net.a(x)
    return net.head((h - h.mean(0).detach()) / h.std(0).detach())


def by_size(net: Any, x: Tensor) -> Tensor:
    return net.head(torch.tanh(net.a(x))) / len(x)


def by_scale(net: Any, x: Tensor) -> Tensor:
    return net.head(torch.tanh(net.a(x)) * (1.0 / x.abs().max().item()))


def first_two_learn(net: Any, x: Tensor) -> Tensor:
    """The output of a datum is the same alone; its gradient is not."""
    return net.head(torch.cat([net.a(x[:2]).tanh(), net.a(x[2:]).tanh().detach()]))


def all_but_the_last_learn(net: Any, x: Tensor) -> Tensor:
    return net.head(torch.cat([net.a(x[:-1]).tanh(), net.a(x[-1:]).tanh().detach()]))


DYNAMIC = {f.__name__: f for f in (quantised, standardised, by_size, by_scale, first_two_learn, all_but_the_last_learn)}


def negative(x: Tensor) -> bool:
    """Of the second batch only."""
    return bool(x[0, 0] < 0)


def other_layer(net: Any, x: Tensor) -> Tensor:
    return net.head(torch.tanh(net.b(x) if negative(x) else net.a(x)))


def other_layer_of_two_results(net: Any, x: Tensor) -> Tensor:
    """Both are computed, and the choice is seen by no operation."""
    return net.head([net.a(x).tanh(), net.b(x).tanh()][len(x) % 2])


def one_more_use(net: Any, x: Tensor) -> Tensor:
    h = net.a(x)
    return net.head(torch.tanh(h + net.b(x) if negative(x) else h))


def not_at_first(net: Any, x: Tensor) -> Tensor:
    return net.head(torch.tanh(net.a(x) + (1.0 if negative(x) else 0.0) * net.b(x)))


def bias_alone(net: Any, x: Tensor) -> Tensor:
    h = torch.tanh(net.a(x) + (net.b.bias if negative(x) else 0))
    return net.head(h)


def other_operation(net: Any, x: Tensor) -> Tensor:
    """Applied by what no rule knows."""
    h = torch.tanh(net.a(x))
    return torch.kron(h, net.head.weight[0, :1])[:, :2] + net.head(h) if negative(x) else net.head(h)


def mixing(net: Any, x: Tensor) -> Tensor:
    h = net.a(x)
    return net.head(torch.tanh(h + h.mean(0) if negative(x) else h))


def mixing_along_another_axis(net: Any, x: Tensor) -> Tensor:
    """The same operations and shapes; the setting of one differs."""
    return net.head(torch.tanh(net.a(x).roll(1, 0 if negative(x) else 1)))


def reordered(net: Any, x: Tensor) -> Tensor:
    h = net.a(x)
    return net.head(torch.tanh(h + h.flip(0 if negative(x) else 1)))


def mixing_by_a_gate(net: Any, x: Tensor) -> Tensor:
    """No branch at all: the mean counts for nothing in the first batch."""
    h = net.a(x)
    return net.head(torch.tanh(h + (x[:, :1] < 0) * h.mean(0)))


def scaled_by_the_largest(net: Any, x: Tensor) -> Tensor:
    h = net.a(x)
    return net.head(torch.tanh(h / h.abs().max().clamp(max=0.1 + 9 * negative(x))))


LATER = {
    f.__name__: f
    for f in (
        *(other_layer, other_layer_of_two_results, one_more_use, not_at_first, bias_alone, other_operation),
        *(mixing, mixing_along_another_axis, reordered, mixing_by_a_gate, scaled_by_the_largest),
    )
}


def problem(forward: Callable[[Any, Tensor], Tensor], sizes: tuple[int, ...]) -> tuple[nn.Module, Any, Tensor, Tensor]:
    X = real(sum(sizes), 3)
    X[: sizes[0], 0], X[sizes[0] :, 0] = X[: sizes[0], 0].abs(), -X[sizes[0] :, 0].abs()
    return net(forward), nn.CrossEntropyLoss(), X, integers(2, sum(sizes))


def expected(given: tuple[nn.Module, Any, Tensor, Tensor], sizes: tuple[int, ...]) -> Tensor:
    model, _, X, y = given
    return ggn_of_batches(model, list(zip(X.split(sizes), y.split(sizes), strict=True)))


@pytest.mark.parametrize("sizes", [(6, 5), (4, 4, 1)])
@pytest.mark.parametrize("name", DYNAMIC)
def test_a_second_operator_of_a_model(name: str, sizes: tuple[int, ...]) -> None:
    given = problem(DYNAMIC[name], sizes)
    if name == "standardised":
        sizes = (4, 5)  # the spread of one datum is none
        given = problem(standardised, sizes)
    matrix = expected(given, sizes)
    for kind in ("ekfac", "kfac", "ekfac", "diagonal"):
        op = build(kind, given, *sizes, check_deterministic=False)
        check(kind, op, matrix)


@pytest.mark.parametrize("sizes", [(6, 5), (4, 4, 1)])
@pytest.mark.parametrize("kind", ["ekfac", "diagonal", "kfac"])
@pytest.mark.parametrize("name", LATER)
def test_a_later_batch_that_does_something_else(name: str, kind: str, sizes: tuple[int, ...]) -> None:
    given = problem(LATER[name], sizes)
    matrix = expected(given, sizes)
    check(kind, build(kind, given, *sizes, check_deterministic=False), matrix)


def quietly_negative(x: Tensor) -> bool:
    """The same, by a number that no signature holds."""
    return x[0, 0].item() < 0


class Applied(torch.autograd.Function):
    """A linear map that no tap sees."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return slopes[0] @ weight, slopes[0].T @ x


def traced(net: Any, x: Tensor) -> Tensor:
    return net.head(net.traced[quietly_negative(x)](x))


def view_made_before(net: Any, x: Tensor) -> Tensor:
    return net.head(net.a(x) + (-x[:, :1]).relu() * (x @ net.view))


def other_view_made_before(net: Any, x: Tensor) -> Tensor:
    return net.head(net.b(x) + x @ (net.view if quietly_negative(x) else net.other))


def other_weight_of_a_function(net: Any, x: Tensor) -> Tensor:
    return net.head(Applied.apply(x, (net.b if quietly_negative(x) else net.a).weight))


def gated_function(net: Any, x: Tensor) -> Tensor:
    return net.head(torch.where(x[:, :1] < 0, Applied.apply(x, net.b.weight), net.a(x)))


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize("sizes", [(6, 5), (9, 8)])
@pytest.mark.parametrize(
    "forward", [traced, view_made_before, other_view_made_before, other_weight_of_a_function, gated_function]
)
def test_a_later_batch_that_uses_a_parameter_unseen(
    forward: Callable[[Any, Tensor], Tensor], sizes: tuple[int, ...]
) -> None:
    given = problem(forward, sizes)
    model: Any = given[0]
    model.view, model.other = model.b.weight.T, model.a.weight.T
    if forward is traced:
        model.traced = nn.ModuleList(torch.jit.trace(layer, real(5, 3)) for layer in (model.a, model.b))
        model.a = model.b = None
    for kind in ("ekfac", "diagonal"):
        check(kind, build(kind, given, *sizes), expected(given, sizes))


def by_groups(net: Any, x: Tensor) -> Tensor:
    same = (x[:, 2:] == x[:, 2:].T).to(x)
    return net.head(torch.tanh(same / same.sum(1, keepdim=True) @ net.a(x)))


def by_graph(net: Any, x: Tensor) -> Tensor:
    return net.head(torch.tanh(net.graphs[quietly_negative(x)] @ net.a(x)))


def by_lists(net: Any, x: Tensor) -> Tensor:
    h = net.a(x)
    return net.head(torch.tanh(h + h[x[:, 2].int().numpy()]))


@pytest.mark.parametrize("forward", [by_groups, by_graph, by_lists])
def test_a_later_batch_that_mixes_the_data_in_its_middle(forward: Callable[[Any, Tensor], Tensor]) -> None:
    given, places = problem(forward, (10, 10)), torch.arange(10)
    mixed = torch.tensor([0, 1, 2, 2, 2, 3, 3, 7, 8, 9])
    given[2][:, 2] = torch.cat([places, mixed])
    model: Any = given[0]
    model.graphs = [torch.eye(10, dtype=torch.float64), torch.eye(10, dtype=torch.float64)[mixed]]
    for kind in ("ekfac", "diagonal"):
        check(kind, build(kind, given, 10, 10), expected(given, (10, 10)))


def tied_later(net: Any, x: Tensor) -> Tensor:
    z = net.head(net.a(x))
    return z @ net.head.weight[:, :2] if negative(x) else z


@pytest.mark.parametrize("kind", ["kfac", "diagonal"])
def test_blocks_that_overlap_do_not_merge(kind: str) -> None:
    model, loss, X, y = problem(tied_later, (6, 5))
    one, other = (build(kind, (model, loss, X[part], y[part])) for part in (slice(0, 6), slice(6, 11)))
    for first, second in ((one, other), (other, one)):
        with pytest.raises(ValueError, match=r"merge: 'head.weight' has blocks that overlap, here \w+ \("):
            first.merge(second)


def positions(net: Any, x: Tensor) -> Tensor:
    return net.head(torch.tanh(net.a(x) + net.p[: x.shape[1]])).mean(1)


def chosen(net: Any, x: Tensor) -> Tensor:
    """Rows by an index that repeats some, and other ones for other lengths."""
    return net.head(torch.tanh(net.a(x) + net.p[torch.arange(x.shape[1]) % 2 + (x.shape[1] > 2)])).mean(1)


@pytest.mark.parametrize("kind", ["ekfac", "diagonal"])
@pytest.mark.parametrize("lengths", [(3, 3), (2, 4), (4, 2), (3, 4, 3)])
@pytest.mark.parametrize("forward", [positions, chosen])
def test_parts_of_a_parameter_that_change_from_batch_to_batch(
    forward: Callable[[Any, Tensor], Tensor], lengths: tuple[int, ...], kind: str
) -> None:
    model = net(forward)
    model.p = nn.Parameter(real(5, 4, seed=9))
    data = [(real(3, length, 3, seed=length), integers(2, 3, seed=length)) for length in lengths]
    matrix = ggn_of_batches(model, data)
    op = KINDS[kind](model, nn.CrossEntropyLoss(), params(model), data, fisher_type="type-2")
    close(op.trace(), matrix.trace())
    check(kind, op, matrix)
    where = op.domain.slice("p")
    close(op.diagonal()[where].sum(), matrix.diagonal()[where].sum())
    places = torch.cat([placed.positions for placed in op.blocks])
    assert len(places.unique()) == len(places)
