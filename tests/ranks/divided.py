"""Models of ``fully_shard`` whose data are divided over the very processes that have the parts of the parameters."""

import copy
import gc
import tempfile
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from ranks.resumed import Stops, attempt
from ranks.sharded import KINDS, Checkpointed, Late, whole
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from curvops import (
    Checkpoint,
    EKFACLinearOperator,
    EmpiricalRisk,
    GatheredOperator,
    GGNDiagonalLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
    KFACLinearOperator,
    KFOCLinearOperator,
)
from curvops.divided import Parts
from curvops.sharding import local

# batches of each process, of one data set of three batches
SHARES = {2: {"uneven": ((0,), (1, 2)), "empty": ((), (0, 1, 2))}, 3: {"empty": ((0, 1), (), (2,))}}
FEW = ("hessian", "mc fisher", "ekfac")  # those that differ most
SIZES = (3, 2, 3, 1)  # of batches where each of two processes has two
KRONECKER: dict[str, tuple[Any, dict[str, Any]]] = {
    "kfac": (KFACLinearOperator, {}),
    "ekfac": (EKFACLinearOperator, {"fisher_type": "type-2", "separate_weight_and_bias": False}),
    "ekfac reduce": (EKFACLinearOperator, {"kfac_approx": "reduce", "memory_budget": 0}),
    "kfoc": (KFOCLinearOperator, {"fisher_type": "empirical"}),
    "diagonal": (GGNDiagonalLinearOperator, {}),
}


class Tied(nn.Module):
    """A weight that enters twice, next to a parameter that is not cut and one that nothing asks about."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.inner = nn.Embedding(5, 6), nn.LayerNorm(6), nn.Linear(6, 6)
        self.scale, self.head = nn.Parameter(torch.rand(6) + 0.5), nn.Linear(6, 5, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = self.norm(self.table(ids)) * self.scale
        return self.head(torch.tanh(self.inner(h)))


def problems(sizes: tuple[int, ...] = (3, 2, 1)) -> Iterator[tuple[str, nn.Module, nn.Module, list[Any], set[str]]]:
    """Models, losses, batches of a whole data set, and parameters that are not cut."""
    torch.manual_seed(1)
    layers = nn.Embedding(5, 6), nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.Tanh()), nn.Linear(6, 4)
    targets = [torch.randint(4, (size,)) for size in sizes]
    targets[0][1] = targets[1][0] = -100
    data = [(torch.randint(5, (size, 3)), y) for size, y in zip(sizes, targets, strict=True)]
    yield "checkpointed", Checkpointed(*layers).double(), nn.CrossEntropyLoss(), data, set()
    data = [(torch.randint(5, (size, 3)), torch.randn(size, 3, 5, dtype=torch.float64)) for size in sizes]
    yield "tied", Tied().double(), nn.MSELoss(reduction="sum"), data, {"scale"}


def sharded(net: nn.Module, plain: set[str], mesh: Any) -> nn.Module:
    """A copy, of which a module within is sharded by itself."""
    model = copy.deepcopy(net)
    ignored = {p for name, p in model.named_parameters() if name in plain}
    inner = model.inner if isinstance(model, Tied) else model[1]
    for module in (inner, model):
        fully_shard(module, mesh=mesh, ignored_params=ignored)
    return model


def placed(vectors: dict[str, Tensor], params: dict[str, Tensor]) -> dict[str, Tensor]:
    """Vectors cut as parameters are."""
    cut = {n: p for n, p in params.items() if hasattr(p, "placements")}
    return {
        n: distribute_tensor(v, cut[n].device_mesh, cut[n].placements) if n in cut else v for n, v in vectors.items()
    }


def difference(found: Any, expected: dict[str, Tensor]) -> float:
    return max(float((whole(found[n]) - expected[n]).abs().max()) for n in expected)


def products(make: Any, args: tuple[Any, ...], cut: tuple[Any, ...], group: Any, options: dict[str, Any]) -> float:
    """The largest difference of an operator's products from those of the model whole, with all data."""
    net, loss, params, data = args
    model, own, share = cut
    v = {name: torch.randn(*p.shape, 2, dtype=p.dtype) for name, p in params.items()}
    # the processes have room for different things, and must do the same all the same
    mine = {"memory_budget": 10 ** (9 - 5 * dist.get_rank()), "check_deterministic": make is HessianLinearOperator}
    if make is KFOCLinearOperator:  # its steps end by rounding, so that other sums may have other ends
        expected = make(net, loss, params, share, process_group=group, **{**mine, **options})
    else:
        expected = make(net, loss, params, data, **options)
    wanted = expected @ v
    op = make(model, loss, own, share, process_group=group, **{**mine, **options})
    u = placed(v, own)
    found, errors = [op @ u], list[float]()
    assert all(getattr(t, "placements", ()) == getattr(own[n], "placements", ()) for n, t in found[0].items())
    if make not in [kind for kind, _ in KRONECKER.values()]:
        with op.linearized():
            found += [op @ u, op @ u]
        name = next(n for n in own if n.endswith("weight"))
        errors.append(difference(op[name] @ {name: u[name]}, expected[name] @ {name: v[name]}))
    return max(errors + [difference(one, wanted) for one in found])


def compared(number: int, mesh: Any, group: Any) -> dict[str, float]:
    """Differences from one process that has the whole model and all data."""
    found: dict[str, float] = {}
    for name, net, loss, data, plain in problems():
        params = dict(net.named_parameters())
        for how, shares in SHARES[number].items():
            model = sharded(net, plain, mesh)
            own, share = dict(model.named_parameters()), [data[k] for k in shares[dist.get_rank()]]
            for kind, (make, options) in {**KINDS, **KRONECKER}.items():
                cut = model, own, share
                if (number, how) == (2, "uneven") if name == "tied" else kind in FEW:
                    found[f"{name}, {how}, {kind}"] = products(make, (net, loss, params, data), cut, group, options)
    return found


class Either(nn.Module):
    """A model whose layers, of one shape, follow each other in an order that the data decide; or that fails on some data."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.fails = nn.Linear(6, 6), nn.Linear(6, 6), fails

    def forward(self, X: Tensor) -> Tensor:
        late = bool(X.sum() < 0)
        if late and self.fails:
            raise ArithmeticError("bad data")
        one, other = (self.second, self.first) if late else (self.first, self.second)
        return other(torch.tanh(one(X)))


class Cracked(nn.Module):
    """A model whose backward pass fails in one of the processes."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, ids: Tensor) -> Tensor:
        return Crack.apply(self.net(ids), dist.get_rank())


class Crack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, fails: int) -> Tensor:
        ctx.fails = fails
        return z.clone()

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> Any:
        if ctx.fails:
            raise torch.OutOfMemoryError("no room")
        return gradient[0] * 1, None


class Past(nn.Module):
    """A model that gathers a parameter by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.rates = nn.Linear(6, 4), nn.Parameter(torch.rand(6))

    def forward(self, X: Tensor) -> Tensor:
        rates: Any = self.rates
        return self.layer(X * rates.full_tensor())


class Written(nn.Module):
    """A model that writes into a parameter as it runs."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            torch.clamp(self.net.inner.weight, -0.2, 0.2, out=self.net.inner.weight)
        return self.net(ids)


def refused(model: nn.Module, loss: nn.Module, share: Any, mesh: Any) -> dict[str, str]:
    """What each process says of what cannot be divided; none of them waits for another."""
    own, group, rank = dict(model.named_parameters()), dist.group.WORLD, dist.get_rank()
    make = partial(HessianLinearOperator, process_group=group)
    X, y = torch.randn(4, 6, dtype=torch.float64).abs() * (1 - 2 * rank), torch.randint(4, (4,))
    either, failing, past = (fully_shard(net.double(), mesh=mesh) for net in (Either(), Either(True), Past()))
    op = make(model, loss, own, share)
    u = {n: torch.ones(*p.shape, 2 + rank, dtype=p.dtype) for n, p in own.items()}

    def of(net: nn.Module, make: Any = make) -> str:
        return attempt(lambda: make(net, loss, dict(net.named_parameters()), [(X, y)]))

    def replaced() -> str:
        before = model.inner.weight
        if not rank:
            model.inner.weight = nn.Parameter(before.detach())
        said = attempt(lambda: op @ placed({n: t[..., 0] for n, t in u.items()}, own))
        model.inner.weight = before
        return said

    alone = [({"ids": X, "others": lambda: None}, y) for X, y in share[:rank]]
    return {
        "written": attempt(lambda: make(Written(model), loss, own, share)),
        "replaced": replaced(),
        "sent": attempt(lambda: make(lambda p, X: model(X["ids"]), loss, own, alone)),
        "order": of(either),
        "failing": of(failing),
        "backward": attempt(lambda: make(Cracked(model), loss, own, share)),
        "past": of(past),
        "past, kfac": of(past, partial(KFACLinearOperator, process_group=group)),
        "loader": attempt(lambda: make(model, loss, own, Late(share, rank))),
        "none": attempt(lambda: make(model, loss, own, [])),
        "number": attempt(lambda: make(model, loss, own, share, num_data=7)),
        "columns": attempt(lambda: op @ placed(u, own)),
        "jacobian": attempt(lambda: JacobianLinearOperator(model, own, share, process_group=group)),
        "plain": attempt(lambda: op["scale"]),
        "whole data": attempt(lambda: HessianLinearOperator(model, loss, own, share)),
    }


def axes(number: int, shape: tuple[int, int]) -> dict[str, Any]:
    """A mesh of which one axis has copies of the parts."""
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("copies", "parts"))
    _, net, loss, data, plain = next(problems())
    model, params = sharded(net, plain, mesh), dict(net.named_parameters())
    cut = (
        model,
        dict(model.named_parameters()),
        [data[k] for k in range(len(data)) if k * number // len(data) == dist.get_rank()],
    )
    found: dict[str, Any] = {}
    for kind, (make, options) in (KINDS | KRONECKER).items():
        if kind in FEW:
            error = products(make, (net, loss, params, data), cut, dist.group.WORLD, options)
            found[f"axes, {kind}"] = error
    group = mesh.get_group("copies")
    found["refused"] = {"axis": attempt(lambda: HessianLinearOperator(*cut[:1], loss, *cut[1:], process_group=group))}
    apart = sharded(net, plain, mesh["parts"])
    share = [data[k] for k in range(len(data)) if k * shape[0] // len(data) == dist.get_rank() // shape[1]]
    cut = apart, dict(apart.named_parameters()), share
    found["axes, data apart"] = products(HessianLinearOperator, (net, loss, params, data), cut, group, {})
    return found


def trained(mesh: Any) -> dict[str, float]:
    """Value, gradient, flat vectors, numbers of forward passes, memory; afterwards the model trains on as if never touched."""
    *_, (_, net, loss, data, plain) = problems(SIZES)
    model, params = sharded(net, plain, mesh), dict(net.named_parameters())
    group, rank = dist.group.WORLD, dist.get_rank()
    own, share = dict(model.named_parameters()), data[2 * rank : 2 * rank + 2]
    hooks = [dict(h) for m in model.modules() for h in (m._forward_pre_hooks, m._forward_hooks)]
    parts = {n: local(p).clone() for n, p in own.items()}
    expected = HessianLinearOperator(net, loss, params, data)
    op = HessianLinearOperator(model, loss, own, share, process_group=group)
    v = {name: torch.randn_like(p) for name, p in params.items()}
    risk = EmpiricalRisk(model, loss, own, data[:3] if rank else data[3:], process_group=group)
    found = {
        "value": max(abs(float(one - expected.risk.value())) for one in (risk.value(), risk.value_and_gradient()[0]))
    }
    slopes = expected.risk.gradient()
    found["gradient"] = max(float((whole(g) - s).abs().max()) for g, s in zip(risk.gradient(), slopes, strict=True))
    some = {n: p for n, p in own.items() if n in ("norm.weight", "inner.bias", "scale")}
    few = GGNLinearOperator(model, loss, some, share, process_group=group)
    wanted = GGNLinearOperator(net, loss, {n: params[n] for n in some}, data)
    found["gathered"] = float((GatheredOperator(few).to_dense() - wanted.to_dense()).abs().max())
    block = op["norm.*", "inner.*"] @ placed({n: t for n, t in v.items() if n.startswith("inner")}, own)
    found["block"] = difference(
        block, expected["norm.*", "inner.*"] @ {n: t for n, t in v.items() if n.startswith("inner")}
    )
    passes: list[int] = []
    counter = model.register_forward_hook(lambda *_: passes.append(0))
    with alive() as storages:
        op @ placed(v, own)
        dist.barrier()
        kept = sum(storage() is not None for storage in storages)
        assert len(storages) > 10 and kept == 0, f"{kept} of {len(storages)}"
    counter.remove()
    assert len(passes) == len(share) == len(data) // 2, f"{len(passes)} forward passes"
    every = dict(model.named_parameters(remove_duplicate=False))  # the tied one under both names
    found |= resumed(model, loss, own, share)
    assert all(every[n] is p for n, p in model.named_parameters(remove_duplicate=False)) and len(every) == len(own) + 1
    assert all(a is b for a, b in zip(own.values(), model.parameters(), strict=True))
    assert hooks == [dict(h) for m in model.modules() for h in (m._forward_pre_hooks, m._forward_hooks)]
    assert all(torch.equal(local(p), parts[n]) and p.grad is None for n, p in own.items())
    X, y = data[0]
    loss(model(X), y).backward()
    slopes = torch.autograd.grad(loss(net(X), y), list(params.values()))
    found["trained"] = max(float((whole(p.grad) - g).abs().max()) for p, g in zip(own.values(), slopes, strict=True))
    return found


def read(mesh: Any) -> dict[str, float]:
    """A loss that reads a parameter that is not cut, and functions as models; nothing is kept of graphs that are let go."""
    *_, (_, net, _, data, plain) = problems()
    model, group, rank = sharded(net, plain, mesh), dist.group.WORLD, dist.get_rank()
    params, own, share = dict(net.named_parameters()), dict(model.named_parameters()), data[1:] if rank else data[:1]

    def loss(of: nn.Module) -> Any:
        return lambda z, y: (z * of.scale.sum() - y).square().sum()

    def make(kind: Any, **options: Any) -> Any:
        return kind(lambda p, X: model(X), loss(model), own, share, reduction="sum", process_group=group, **options)

    expected = HessianLinearOperator(net, loss(net), params, data, reduction="sum")
    v = {name: torch.randn_like(p) for name, p in params.items()}
    op = make(HessianLinearOperator)
    found = {"read": difference(op @ placed(v, own), expected @ v)}
    inner = {n: t for n, t in v.items() if n.startswith("inner")}
    found["read, inner"] = difference(op["inner.*"] @ placed(inner, own), expected["inner.*"] @ inner)
    slopes = zip(op.risk.gradient(), expected.risk.gradient(), strict=True)
    found["read, gradient"] = max(float((whole(g) - s).abs().max()) for g, s in slopes)
    kept: list[int] = []
    for _ in range(3):
        make(HessianLinearOperator)
        make(KFACLinearOperator)
        op.risk.gradient()
        gc.collect()
        kept.append(sum(issubclass(type(one), Tensor) for one in gc.get_objects()))
    assert kept[1] == kept[2], kept
    return found


def resumed(model: nn.Module, loss: nn.Module, own: dict[str, Tensor], share: Any) -> dict[str, float]:
    """A Kronecker operator that is killed and made again."""
    make = partial(
        EKFACLinearOperator,
        model,
        loss,
        own,
        memory_budget=0,
        check_deterministic=False,
        process_group=dist.group.WORLD,
    )
    expected, found = make(share).to_dense(), {}
    with tempfile.TemporaryDirectory() as own_folder:
        for last in (1, 3):
            names: list[Any] = [f"{own_folder}/{last}.safetensors"]
            dist.broadcast_object_list(names)
            file = Checkpoint(names[0], every=1)
            said = attempt(partial(make, Stops(share, last), checkpoint=file))
            assert said == "KeyError: 'killed'", said
            found[f"resumed after {last}"] = float((make(share, checkpoint=file).to_dense() - expected).abs().max())
            dist.barrier()
    return found


@contextmanager
def alive() -> Iterator[list[Any]]:
    """References to the memory of each parameter that is gathered."""
    storages, before = [], Parts.whole

    def noted(self: Parts, tensor: Any) -> Tensor:
        found = before(self, tensor)
        storages.append(weakref.ref(found.untyped_storage()))
        return found

    Parts.whole = noted
    try:
        yield storages
    finally:
        Parts.whole = before


def main() -> dict[str, Any]:
    """All of it; of four processes, what needs so many."""
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    number = dist.get_world_size()
    if number == 4:
        return axes(number, (2, 2))
    mesh = init_device_mesh("cpu", (number,))
    found: dict[str, Any] = compared(number, mesh, dist.group.WORLD)
    if number == 2:
        *_, (_, net, loss, data, plain) = problems(SIZES)
        found |= trained(mesh) | read(mesh)
        found["refused"] = refused(sharded(net, plain, mesh), loss, data[2 * dist.get_rank() :][:2], mesh)
    return found
