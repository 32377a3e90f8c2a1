"""Products of models whose parameters are cut over two processes."""

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from ranks.resumed import attempt, resumed
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint

import curvops.fully_shard
from curvops import (
    EFLinearOperator,
    EKFACLinearOperator,
    GatheredOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    KFACLinearOperator,
    SpreadOperator,
)

KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "hessian": (HessianLinearOperator, {}),
    "ggn": (GGNLinearOperator, {}),
    "mc fisher": (GGNLinearOperator, {"mc_samples": 2}),
    "ef": (EFLinearOperator, {}),
}
KRONECKER: dict[str, tuple[Any, dict[str, Any]]] = {
    "kfac": (KFACLinearOperator, {}),
    "ekfac": (
        EKFACLinearOperator,
        {"fisher_type": "type-2", "kfac_approx": "reduce", "separate_weight_and_bias": False},
    ),
}


class Tokens(nn.Module):
    """Parameters that enter in all ways: looked up, added, scaling, through another function, twice, never."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(5, 6), nn.Parameter(torch.randn(3, 6))
        self.norm, self.rates, self.layer = nn.LayerNorm(6), nn.Parameter(torch.randn(6)), nn.Linear(6, 6)
        self.head, self.unused = nn.Linear(6, 4), nn.Parameter(torch.randn(2))

    def forward(self, ids: Tensor) -> Tensor:
        h = self.norm(self.table(ids) + self.places) * self.rates.exp()
        return self.head(torch.tanh(self.layer(torch.tanh(self.layer(h))))).mean(1)


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


class Repeated(nn.Module):
    """A model with all parameters on each process, which divides the rows of its inputs among them."""

    def __init__(self, net: nn.Module, mesh: Any) -> None:
        super().__init__()
        self.net, self.mesh = net, mesh
        for module in net.modules():
            for name, p in list(module._parameters.items()):
                module._parameters[name] = nn.Parameter(distribute_tensor(p.detach(), mesh, [Replicate()]))

    def forward(self, X: Tensor) -> Tensor:
        return self.net(distribute_tensor(X, self.mesh, [Shard(0)])).full_tensor()


def repeated(net: nn.Module, loss: nn.Module, data: Any, mesh: Any) -> dict[str, Any]:
    """Parameters that are DTensors but not cut: the processes keep alike, and no group adds up their gradients again."""
    model = Repeated(copy.deepcopy(net), mesh)
    own, params = {n.removeprefix("net."): p for n, p in model.named_parameters()}, dict(net.named_parameters())
    v = {name: torch.randn(p.shape, dtype=p.dtype) for name, p in params.items()}
    placed = {name: distribute_tensor(t, mesh, [Replicate()]) for name, t in v.items()}
    expected = GGNLinearOperator(net, loss, params, data) @ v
    op = GGNLinearOperator(model, loss, own, data, memory_budget=1 if dist.get_rank() else 10**9)
    with op.linearized():
        results = [op @ placed, op @ placed]
    error = max(float((whole(r[n]) - expected[n]).abs().max()) for r in results for n in own)
    group = attempt(lambda: GGNLinearOperator(model, loss, own, data, process_group=dist.group.WORLD))
    return {"repeated": error, "repeated, errors": {"group": group}}


def two_axes(net: nn.Module, loss: nn.Module, data: Any) -> dict[str, float]:
    """A mesh with an axis for the parameters and one for the data, of which each process has a share."""
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data", "parts"))
    model, params = Cut(copy.deepcopy(net), mesh["parts"]), dict(net.named_parameters())
    own, group = {n.removeprefix("net."): p for n, p in model.named_parameters()}, mesh.get_group("data")
    v = {name: torch.randn(p.shape, dtype=p.dtype) for name, p in params.items()}
    placed = {name: distribute_tensor(t, mesh["parts"], [Shard(0)]) for name, t in v.items()}
    found = {}
    for make in (GGNLinearOperator, KFACLinearOperator):
        expected = make(net, loss, params, data) @ v
        result = make(model, loss, own, [data[dist.get_rank()]], process_group=group) @ placed
        found[f"two axes, {make.__name__}"] = max(float((whole(result[n]) - expected[n]).abs().max()) for n in own)
    return found


class Late:
    """Batches that fail in one of the processes."""

    def __init__(self, batches: Any, fails: int) -> None:
        self.batches, self.fails = batches, fails

    def __iter__(self) -> Iterator[Any]:
        yield self.batches[0]
        if self.fails:
            raise OSError("the disk is gone")
        yield self.batches[1]


class Clamped(nn.Module):
    """A model that changes a parameter as it runs."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, X: Tensor) -> Tensor:
        self.net[2].weight.data.clamp_(min=0)
        return self.net(X)


class Complex(nn.Module):
    """A real parameter that is used as a complex one, and row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.filter, self.head = nn.Parameter(torch.randn(6, 2)), nn.Linear(6, 4)

    def forward(self, X: Tensor) -> Tensor:
        return self.head((torch.stack(list(torch.view_as_complex(self.filter))) * X * X.exp()).abs().log())


class Checkpointed(nn.Sequential):
    """Layers one of which is run again in the backward pass."""

    def forward(self, X: Tensor) -> Tensor:
        first, second, *others = self
        X = checkpoint(second, first(X), use_reentrant=False)
        for layer in others:
            X = layer(X)
        return X.mean(1)


def fully_sharded(loss: nn.Module, mesh: Any) -> dict[str, Any]:
    """Models of ``fully_shard``: products, what is kept of the gathered parameters, training afterwards, errors."""
    torch.manual_seed(1)
    layers = nn.Embedding(5, 6), nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.Tanh()), nn.Linear(6, 4)
    net = Checkpointed(*layers).double()
    X, y = torch.randint(5, (7, 3)), torch.randint(4, (7,))
    data, params, model = [(X[:3], y[:3]), (X[3:], y[3:])], dict(net.named_parameters()), copy.deepcopy(net)
    for module in (model[1], model):
        fully_shard(module, mesh=mesh)
    own = dict(model.named_parameters())
    hooks = [dict(h) for m in model.modules() for h in (m._forward_pre_hooks, m._forward_hooks)]
    v = {name: torch.randn(*p.shape, 2, dtype=p.dtype) for name, p in params.items()}
    placed = {name: distribute_tensor(v[name], mesh, p.placements) for name, p in own.items()}
    found: dict[str, Any] = {}
    for kind, (make, options) in {**KINDS, **KRONECKER}.items():
        # the processes have room for different things, and must do the same all the same
        mine = {**options, "memory_budget": 10**7 * dist.get_rank()} if kind in KRONECKER else options
        expected, op = make(net, loss, params, data, **options) @ v, make(model, loss, own, data, **mine)
        results = [op @ placed]
        if kind in KINDS:
            with gathers() as storages, op.linearized():
                results += [op @ placed, op @ placed]
                dist.barrier()  # the last collective call of another process may hold its result for a moment
                alive = sum(storage() is not None for storage in storages)
                assert len(storages) > 10 and alive == 0, f"{kind}: {alive} of {len(storages)}"
        found[f"fully_shard, {kind}"] = max(
            float((whole(r[n]) - expected[n]).abs().max()) for r in results for n in own
        )
    plain, inputs = Complex().double(), torch.randn(7, 6, dtype=torch.float64)
    cut = fully_shard(copy.deepcopy(plain), mesh=mesh)
    u = {name: torch.randn_like(p) for name, p in plain.named_parameters()}
    spread = {name: distribute_tensor(u[name], mesh, p.placements) for name, p in cut.named_parameters()}
    expected = HessianLinearOperator(plain, loss, dict(plain.named_parameters()), [(inputs, y)]) @ u
    product = HessianLinearOperator(cut, loss, dict(cut.named_parameters()), [(inputs, y)]) @ spread
    found["fully_shard, complex"] = max(float((whole(product[n]) - expected[n]).abs().max()) for n in u)
    many = [(torch.randint(5, (6, 3)), torch.randint(4, (6,))) for _ in range(6)]
    again = resumed(model, loss, own, many, (4, 1), (9, 0))
    found |= {f"fully_shard, resumed after {key}": error for key, error in again.items()}
    assert hooks == [dict(h) for m in model.modules() for h in (m._forward_pre_hooks, m._forward_hooks)]
    loss(model(X), y).backward()
    slopes = torch.autograd.grad(loss(net(X), y), list(params.values()))
    found["fully_shard, trained"] = max(
        float((whole(p.grad) - g).abs().max()) for p, g in zip(own.values(), slopes, strict=True)
    )
    other = [(X[:3], y[:3]), (X[3:], 3 - y[3:] if dist.get_rank() else y[3:])]
    fewer, half = data[: 2 - dist.get_rank()], copy.deepcopy(net)
    fully_shard(half, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    holder = SimpleNamespace(model=model)
    found["fully_shard, refused"] = {
        "loader": attempt(lambda: HessianLinearOperator(model, loss, own, Late(data, dist.get_rank()))),
        "hidden": attempt(lambda: HessianLinearOperator(lambda p, X: holder.model(X), loss, own, data)),
        "in place": attempt(lambda: HessianLinearOperator(Clamped(model), loss, own, data)),
        "data": attempt(lambda: HessianLinearOperator(model, loss, own, other)),
        "fewer": attempt(lambda: HessianLinearOperator(model, loss, own, fewer)),
        "precision": attempt(lambda: HessianLinearOperator(half, loss, dict(half.named_parameters()), data)),
    }
    # after failures, too
    assert hooks == [dict(h) for m in model.modules() for h in (m._forward_pre_hooks, m._forward_hooks)]
    assert all(a is b for a, b in zip(own.values(), model.parameters(), strict=True))
    with torch.no_grad():
        model(X)
    found["fully_shard, refused"]["gathered"] = attempt(
        lambda: HessianLinearOperator(model, loss, dict(model.named_parameters()), data)
    )
    return found


@contextmanager
def gathers() -> Iterator[list[Any]]:
    """References to the memory of each parameter that is gathered for an operation."""
    storages, before = [], curvops.fully_shard.gathered

    def noted(tensor: Tensor) -> Tensor:
        found = before(tensor)
        storages.append(weakref.ref(found.untyped_storage()))
        return found

    curvops.fully_shard.gathered = noted
    try:
        yield storages
    finally:
        curvops.fully_shard.gathered = before


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def refused(op: Any, v: Any, problem: tuple[Any, ...]) -> dict[str, str]:
    return {
        "flat": attempt(lambda: op @ torch.ones(op.shape[1], dtype=torch.float64)),
        "plain": attempt(lambda: op @ v),
        "dense": attempt(op.to_dense),
        "trace": attempt(op.trace),
        "group": attempt(lambda: EFLinearOperator(*problem, process_group=dist.group.WORLD)),
        "spread": attempt(lambda: SpreadOperator(op, dist.group.WORLD)),
    }


def kronecker(net: nn.Module, model: nn.Module, loss: nn.Module, data: Any, *kinds: str) -> dict[str, float]:
    """Differences of some Kronecker operators, which have all of a cut model's blocks whole, from those of the whole model."""
    params, own = dict(net.named_parameters()), {n.removeprefix("net."): p for n, p in model.named_parameters()}
    v = {name: torch.randn(*p.shape, 2, dtype=p.dtype) for name, p in params.items()}
    placed = {name: distribute_tensor(v[name], p.device_mesh, p.placements) for name, p in own.items()}
    found = {}
    for kind in kinds:
        make, options = KRONECKER[kind]
        expected = make(net, loss, params, data, **options)
        op = make(model, loss, own, data, **options, memory_budget=10**7 * dist.get_rank())
        inverse, solved = op.inverse(damping=0.1), expected.inverse(damping=0.1) @ v
        errors = [float((op.to_dense() - expected.to_dense()).abs().max())]
        for given, result in ((placed, inverse @ placed), (v, inverse @ v)):
            assert all(isinstance(t, DTensor) == isinstance(given[n], DTensor) for n, t in result.items()), kind
            errors += [float((whole(t) - solved[n]).abs().max()) for n, t in result.items()]
        assert all(t.placements == own[n].placements for n, t in (op @ placed).items()), kind
        assert "each process has all blocks whole" in str(op.explain())
        found[kind] = max(errors)
    found["refreshed"] = float((op.refresh().to_dense() - expected.refresh().to_dense()).abs().max())
    return found


def gathered(net: nn.Module, model: nn.Module, loss: nn.Module, data: Any) -> dict[str, float]:
    """What needs flat vectors, of matrices that stay cut."""
    params, own = dict(net.named_parameters()), {n.removeprefix("net."): p for n, p in model.named_parameters()}
    found = {}
    for kind, (make, options) in KINDS.items():
        expected, op = (
            make(net, loss, params, data, **options),
            GatheredOperator(make(model, loss, own, data, **options)),
        )
        assert (op.shape, op.psd, op.symmetric) == (expected.shape, expected.psd, expected.symmetric)
        v = {name: torch.randn(*p.shape, 2, dtype=p.dtype) for name, p in params.items()}
        placed = {name: distribute_tensor(v[name], p.device_mesh, p.placements) for name, p in own.items()}
        products, wanted = (op @ v, op @ placed), expected @ v
        assert all(isinstance(t, DTensor) and t.placements == own[n].placements for n, t in products[1].items()), kind
        errors = [float((whole(r[n]) - wanted[n]).abs().max()) for r in products for n in own]
        # of the last layer, and for one kind all: each product sends messages
        last, its = op["2.*"], expected["2.*"]
        for of in (
            lambda some: some @ torch.eye(some.shape[1], dtype=some.dtype),
            lambda some: some.trace(num_products=6),
            lambda some: some.diagonal(num_products=6),
            lambda some: some.eigenpairs(1).values,
            lambda some: some.solve(torch.ones(some.shape[0], dtype=some.dtype), damping=2.0).x,
        )[: 5 if kind == "hessian" else 1]:
            with last.linearized(), its.linearized():
                errors.append(float((of(last) - of(its)).abs().max()))
        block = torch.ones(its.shape[1], dtype=its.dtype)
        errors.append(float((op["0.*", "2.*"] @ block - expected["0.*", "2.*"] @ block).abs().max()))
        said = attempt(lambda op=op: op @ torch.full((op.shape[1],), 1.0 + dist.get_rank(), dtype=op.dtype))
        assert said.startswith("RanksError") and "the processes multiply different vectors. Give all" in said, said
        found[f"gathered, {kind}"] = max(errors)
    return found


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
        if title == "tensor parallel":
            found["tensor parallel, kfac"] = max(kronecker(net, model, loss, data, "kfac").values())
        own = {name.removeprefix("net."): p for name, p in model.named_parameters()}
        before = {name: p.detach().to_local().clone() for name, p in own.items()}
        placed = {name: distribute_tensor(v[name], mesh, p.placements) for name, p in own.items()}
        for kind, (make, options) in KINDS.items():
            expected = make(net, loss, params, data, **options) @ v
            # the processes have room for different things, and must do the same all the same
            op = make(model, loss, own, data, **options, memory_budget=1 if dist.get_rank() else 10**9)
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
    found |= gathered(net, model, loss, data)
    found |= repeated(net, loss, data, mesh) | two_axes(net, loss, data)
    many = [(torch.randn(6, 6, dtype=torch.float64), torch.randint(4, (6,))) for _ in range(6)]
    again = resumed(model, loss, own, many, (4, 0), (9, 1))
    found |= {f"cut, resumed after {key}": error for key, error in again.items()}
    net, X = Tokens().double(), torch.randint(5, (7, 3))
    cut, data = Cut(copy.deepcopy(net), mesh), [(X[:3], y[:3]), (X[3:], y[3:])]
    found |= {f"tokens, {kind}": error for kind, error in kronecker(net, cut, loss, data, "ekfac").items()}
    found |= fully_sharded(loss, mesh)
    return found
