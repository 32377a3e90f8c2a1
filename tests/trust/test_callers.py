"""What loaders, modules and threads do beside us: buffers written over, state that a forward pass keeps, contexts that overlap."""

import copy

import pytest
import torch
from oracles import IMPLICIT, Case, close, real
from torch.nn.utils import parametrizations, parametrize
from torch.utils.data import DataLoader, TensorDataset

from curvops import HessianLinearOperator
from trust.support import CE, Model, Net, data


class Reusing:
    """A loader that writes each batch over the one before, behind PyTorch's back."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        buffer = torch.zeros_like(self.batches[0][0]).numpy()
        for X, y in self.batches:
            buffer[: len(X)] = X.numpy()
            yield torch.from_numpy(buffer)[: len(X)], y


@pytest.mark.parametrize("kind", [*IMPLICIT, "EKFAC", "KFAC"])
def test_a_loader_that_reuses_its_buffer(kind):
    batches = [(X[:2], y[:2]) for X, y in data()]
    net = Net()
    plain, reused = (Case(net, CE, d).make(kind) for d in (batches, Reusing(batches)))
    V = real(31, 9)
    for _ in range(2):
        close(reused @ V[:, 0], plain @ V[:, 0])
    close(reused @ V, plain @ V)
    close(reused.to_dense(), plain.to_dense())
    with reused.linearized():
        for _ in range(2):
            close(reused @ V, plain @ V)


@pytest.mark.parametrize("kind", IMPLICIT)
def test_power_iterations_are_put_back_after_fast_ways(kind):
    def counting(net, X):
        net.calls += 1
        return net.b(net.a(X).tanh())

    net = Model(counting)
    net.register_buffer("calls", torch.zeros(()), persistent=False)
    net.register_buffer("none", None)
    parametrizations.spectral_norm(net.b)
    state = net.b.parametrizations.weight[0]
    with torch.no_grad():
        net.b.parametrizations.weight.original.copy_(real(3, 4))
    case = Case(net, CE, data(), params={n: p for n, p in net.named_parameters() if n[0] != "c"})
    op, before, V = case.make(kind), copy.deepcopy(state.state_dict()), real(31, 31)
    expected = op @ V[:, 0]
    op @ V
    op.to_dense()
    assert all(torch.equal(state.state_dict()[name], b) for name, b in before.items())
    assert net.calls == 0 and net.none is None
    close(op @ V[:, 0], expected)


def test_what_a_module_stores_is_no_dead_wrapper():
    def forward(n, X):
        n.seen, n.calls = n.b(n.a(X).tanh()), n.calls + 1
        return n.seen

    net = Model(forward)
    net.calls = 0
    op = Case(net, CE, data()).make("Hessian")
    op @ torch.ones(op.shape[1])
    before = net.calls
    op.to_dense()
    assert torch.isfinite(net.seen).all() and net.calls <= before + 2  # of the reference, and of no trial


@pytest.mark.parametrize("kind", [*IMPLICIT, "EKFAC"])
def test_cached_parametrizations_with_all_checks(kind):
    net = Net()
    parametrizations.weight_norm(net.b)
    case = Case(net, CE, data())
    expected = case.make(kind).to_dense()
    with parametrize.cached():
        close(case.make(kind, check_deterministic=True).to_dense(), expected)


def test_contexts_that_overlap():
    case = Case(Net(), CE, data())
    op, v = case.make("GGN"), torch.ones(31)
    first, second = op.linearized(), op.linearized()
    first.__enter__()
    op @ v
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    with torch.no_grad():
        case.params["a.weight"].mul_(3)
    close(op @ v, case.truth("GGN") @ v)


def test_another_order_of_batches_is_refused_where_some_are_kept():
    X, y = real(40, 3), torch.arange(40) % 3
    net = Net()
    loader = DataLoader(TensorDataset(X, y), 10, shuffle=True)
    op = HessianLinearOperator(net, CE, dict(net.named_parameters()), loader, check_deterministic=False)
    with op.linearized():
        op @ torch.ones(31)
        op.memory_budget = op._kept._size // 2
    with op.linearized(), pytest.raises(RuntimeError, match="yields other batches than before"):
        for seed in range(9):
            torch.manual_seed(seed)
            op @ torch.ones(31)
