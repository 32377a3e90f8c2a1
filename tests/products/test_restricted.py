"""Blocks of some parameters: the matrix's own, and nothing is computed that they do not need."""

import pytest
import torch
from conformance import close, draws
from torch import nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from curvops import EFLinearOperator, GGNLinearOperator, HessianLinearOperator, JacobianLinearOperator

KINDS = {
    "hessian": HessianLinearOperator,
    "ggn": GGNLinearOperator,
    "fisher": lambda *a, **k: GGNLinearOperator(*a, mc_samples=2, **k),
    "ef": EFLinearOperator,
}


def problem(depth=3, width=4, size=5):
    torch.manual_seed(0)
    layers = [(f"layer{k}", nn.Sequential(nn.Linear(width, width), nn.Tanh())) for k in range(depth)]
    model = nn.Sequential()
    for name, layer in layers:
        model.add_module(name, layer)
    model = model.double()
    data = [(torch.randn(n, width, dtype=torch.float64), torch.randint(width, (n,))) for n in (size, size - 2)]
    return model, nn.CrossEntropyLoss(), dict(model.named_parameters()), data


@pytest.mark.parametrize("function", [False, True], ids=["module", "function"])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_those_of_the_matrix(kind, function):
    model, loss, params, data = problem()
    if function:
        module = model
        model = lambda p, X: functional_call(module, p, (X,))  # noqa: E731
    op = KINDS[kind](model, loss, params, data)
    dense, where = op.to_dense(), op.domain.slice
    for name in ("layer0.0", "layer2.0"):
        own = op[f"{name}.*"]
        place = slice(where(f"{name}.weight").start, where(f"{name}.bias").stop)
        assert own.symmetric and own.psd == op.psd and own.domain.names == [f"{name}.weight", f"{name}.bias"]
        close(own.to_dense(), dense[place, place])
        close(own @ draws(20), dense[place, place] @ draws(20))
    rows, columns = slice(0, 20), where("layer2.0.weight")
    cross = op["layer0.*", "layer2.0.weight"]
    assert cross.shape == (20, 16) and not cross.symmetric
    close(cross.to_dense(), dense[rows, columns])
    close(cross.T.to_dense(), dense[columns, rows])
    vectors = cross.T @ [torch.ones(4, 4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)]
    close(vectors[0].flatten(), dense[columns, rows].sum(1))
    overlapping = op[["layer0.*", "layer1.*"], ["layer1.*", "layer2.*"]]
    close(overlapping.to_dense(), dense[:40, 20:])
    close((2 * op + op)["layer1.*"].to_dense(), 3 * dense[20:40, 20:40])


def test_columns_of_a_jacobian():
    model, _, params, data = problem()
    op = JacobianLinearOperator(model, params, data)
    close(op["output", "layer1.*"].to_dense(), op.to_dense()[:, 20:40])
    assert op["output", "layer1.*"].domain.names == ["layer1.0.weight", "layer1.0.bias"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_of_ten_layers_takes_a_third_of_the_whole_at_most(kind):
    model, loss, params, data = problem(depth=10, width=32, size=16)

    class Multiplications(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                left, right = args[-2:]
                self.total += left.numel() * right.shape[1]
            return func(*args, **(kwargs or {}))

    def work(op):
        with Multiplications() as counter:
            op @ torch.ones(op.shape[1], dtype=torch.float64)
        return counter.total

    op = KINDS[kind](model, loss, params, data, check_deterministic=False)
    assert 3 * work(op["layer9.*"]) <= work(op)
    assert 2 * work(op["layer9.*", "layer8.*"]) <= work(op)


def test_inside_linearized_a_block_is_computed_as_the_model_is():
    model, loss, params, data = problem()
    op = HessianLinearOperator(model, loss, params, data)
    with op["layer1.*"].linearized() as block:
        first = block @ draws(20)
        close(block @ draws(20), first)
    with torch.no_grad():
        params["layer2.0.weight"].mul_(2)
    close(op["layer1.*"] @ draws(20), op.to_dense()[20:40, 20:40] @ draws(20))


@pytest.mark.filterwarnings("ignore:.*batch norm in train mode")
@pytest.mark.parametrize("form", ["closure", "object"])
def test_buffers_of_a_module_inside_a_function_stay(form):
    """Batch norm counts its batches in train mode; a slice finds the module where the whole operator does."""

    class Called:
        def __init__(self, module):
            self.module = module

        def __call__(self, p, X):
            return functional_call(self.module, p, (X,))

    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    function = Called(module) if form == "object" else lambda p, X: functional_call(module, p, (X,))
    data = [(torch.randn(6, 3, dtype=torch.float64), torch.randint(2, (6,)))]
    op = HessianLinearOperator(function, nn.CrossEntropyLoss(), dict(module.named_parameters()), data)
    before = {name: t.clone() for name, t in module.state_dict().items()}
    for block in (op["0.*"], op["0.*"]["0.bias"], op["0.*", "2.*"]):
        block.to_dense()
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())
