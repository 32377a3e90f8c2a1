"""Products of models whose parameters are cut over two processes."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from curvops import EFLinearOperator, GGNLinearOperator, HessianLinearOperator, KFACLinearOperator, SpreadOperator

KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "hessian": (HessianLinearOperator, {}),
    "ggn": (GGNLinearOperator, {}),
    "mc fisher": (GGNLinearOperator, {"mc_samples": 2}),
    "ef": (EFLinearOperator, {}),
}


class Cut(nn.Module):
    """A model with all parameters cut along their first axis, for inputs and outputs that are whole."""

    def __init__(self, net: nn.Module, mesh: Any) -> None:
        super().__init__()
        self.net, self.mesh = net, mesh
        for module in net.modules():
            for name, p in list(module._parameters.items()):
                module._parameters[name] = nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)]))

    def forward(self, X: Tensor) -> Tensor:
        return self.net(distribute_tensor(X, self.mesh, [Replicate()])).full_tensor()


def models(net: nn.Module, mesh: Any) -> Iterator[tuple[str, nn.Module]]:
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    yield "tensor parallel", parallelize_module(copy.deepcopy(net), mesh, plan)
    yield "cut", Cut(copy.deepcopy(net), mesh)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def attempt(call: Any) -> str:
    try:
        return f"no error: {call()}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def refused(op: Any, v: Any, problem: tuple[Any, ...]) -> dict[str, str]:
    return {
        "flat": attempt(lambda: op @ torch.ones(op.shape[1], dtype=torch.float64)),
        "plain": attempt(lambda: op @ v),
        "dense": attempt(op.to_dense),
        "trace": attempt(op.trace),
        "group": attempt(lambda: EFLinearOperator(*problem, process_group=dist.group.WORLD)),
        "spread": attempt(lambda: SpreadOperator(op, dist.group.WORLD)),
        "kfac": attempt(lambda: KFACLinearOperator(*problem)),
    }


def sharded() -> dict[str, Any]:
    """Differences from the whole model's products, shares, and errors."""
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    net, loss = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double(), nn.CrossEntropyLoss()
    X, y = torch.randn(7, 6, dtype=torch.float64), torch.randint(4, (7,))
    data, params = [(X[:3], y[:3]), (X[3:], y[3:])], dict(net.named_parameters())
    v = {name: torch.randn(*p.shape, 2, dtype=p.dtype) for name, p in params.items()}
    found: dict[str, Any] = {}
    for title, model in models(net, mesh):
        own = {name.removeprefix("net."): p for name, p in model.named_parameters()}
        before = {name: p.detach().to_local().clone() for name, p in own.items()}
        placed = {name: distribute_tensor(v[name], mesh, p.placements) for name, p in own.items()}
        for kind, (make, options) in KINDS.items():
            expected = make(net, loss, params, data, **options) @ v
            op = make(model, loss, own, data, **options)
            results = [op @ placed]
            with op.linearized():
                results += [op @ placed, op @ placed]
            results.append(dict(zip(own, op @ list(placed.values()), strict=True)))
            layers = {**(op["0.*"] @ {n: placed[n] for n in own if n[0] == "0"})}
            first = make(net, loss, params, data, **options)["0.*"] @ {n: v[n] for n in own if n[0] == "0"}
            if title == "cut":  # rows and columns of different layers
                block = op["0.*", "2.*"] @ {n: placed[n] for n in own if n[0] == "2"}
                layers = {**layers, **{f"block {n}": t for n, t in block.items()}}
                block = make(net, loss, params, data, **options)["0.*", "2.*"] @ {n: v[n] for n in own if n[0] == "2"}
                first = {**first, **{f"block {n}": t for n, t in block.items()}}
            errors = [float((whole(r[n]) - expected[n]).abs().max()) for r in results for n in own]
            errors += [float((whole(layers[n]) - first[n]).abs().max()) for n in layers]
            found[f"{title}, {kind}"] = max(errors)
            placements = {r[n].placements == own[n].placements for r in results for n in own}
            assert placements == {True}, f"{title}, {kind}"
        shares = sum(p.to_local().numel() for p in own.values()), sum(r.to_local().numel() for r in results[0].values())
        total = sum(p.numel() for p in own.values())
        found[f"{title}, share"] = [shares[0] / total, shares[1] / (2 * total), op.domain.dim / total]
        gradient = HessianLinearOperator(net, loss, params, data).risk.gradient()
        parts = op.risk.gradient()
        found[f"{title}, gradient"] = max(
            float((whole(a) - b).abs().max()) for a, b in zip(parts, gradient, strict=True)
        )
        found[f"{title}, errors"] = refused(op, v, (model, loss, own, data))
        assert all(torch.equal(p.detach().to_local(), before[name]) for name, p in own.items())
    fsdp = copy.deepcopy(net)
    fully_shard(fsdp)
    found["fully_shard"] = attempt(lambda: HessianLinearOperator(fsdp, loss, dict(fsdp.named_parameters()), data))
    return found
