"""Several processes beside one: seconds of products and factors, and bytes that each product sends.

    torchrun --nproc-per-node 2 benchmarks/processes.py [--bytes | --sharded]
    python benchmarks/processes.py --large

Each process has one thread (torchrun's default). One process computes alone while the others wait, then each the operator
of its own share alone, without a group, then all of them together, in turns; the medians' ratios are printed, of which the
first is what the machine gives. With ``--sharded`` the same of a model of `fully_shard`. With ``--bytes`` it counts what is handed to `torch.distributed` and, on
Linux with all processes on one machine, what goes over its network device, beside the formulas of ``docs/processes.md``. With ``--large`` it
prints what these formulas give for a transformer of 10⁹ parameters on 64 GPUs.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from operator import matmul
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from models import mlp, residual
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from curvops import (
    EKFACLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
    KFACLinearOperator,
    SpreadOperator,
)

MESSAGE = 56  # bytes of each process, where they meet
REPEATS = 9


def alternating(one: Callable[[], Any], *several: Callable[[], Any]) -> list[float]:
    """Median seconds of what one process does, and of what all do."""
    calls = (one if dist.get_rank() == 0 else lambda: None, *several)
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(REPEATS + 1):
        for seconds, call in zip(times, calls, strict=True):
            dist.barrier()
            start = time.perf_counter()
            call()
            dist.barrier()
            if turn:  # the first one warms up
                seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in times]


def problem(
    name: str, number: int, repeats: int = 1
) -> tuple[nn.Module, nn.Module, dict[str, Tensor], list[Any], list[Any]]:
    """A model with its loss and parameters, so many batches, each some times as large, and those of this process."""
    torch.manual_seed(0)
    model, ((X, y), *_) = {"mlp": mlp, "residual": residual, "wide": wide, "narrow": narrow}[name]()
    batches = [(X.repeat(repeats, *[1] * (X.ndim - 1)), y.repeat(repeats))] * number
    mine = batches[dist.get_rank() :: dist.get_world_size()]
    return model, nn.CrossEntropyLoss(), dict(model.named_parameters()), batches, mine


def wide() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """An MLP with five layers of 512 inputs, whose eigenproblems are alike."""
    layers = [layer for _ in range(4) for layer in (nn.Linear(512, 512), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(512, 10)), [(torch.rand(128, 512), torch.randint(10, (128,)))]


def seconds() -> None:
    number, group = dist.get_world_size(), {"process_group": dist.group.WORLD}
    say(f"{'':44}{'one process':>14}{'shares alone':>14}{'ratio':>7}{f'{number} processes':>14}{'ratio':>7}")
    for name, batches, repeats in (("mlp", 8, 1), ("mlp", 8, 8), ("residual", 8, 1), ("residual", 32, 1)):
        *args, whole, mine = problem(name, batches, repeats)
        for kind in (HessianLinearOperator, GGNLinearOperator):
            make = partial(kind, *args, check_deterministic=False)
            operators = make(whole), make(mine), make(mine, **group)
            v = torch.ones(operators[0].shape[1])
            row(title(name, whole, f"{kind.__name__[:-14]} product"), *(partial(matmul, op, v) for op in operators))
    for name, batches, repeats in (("wide", 8, 1), ("wide", 16, 8), ("residual", 8, 1), ("residual", 64, 1)):
        *args, whole, mine = problem(name, batches, repeats)
        for kind in (KFACLinearOperator, EKFACLinearOperator):
            make = partial(decomposed, kind, *args)
            what = title(name, whole, f"{kind.__name__[:-14]} with eigh")
            row(what, partial(make, whole), partial(make, mine), partial(make, mine, **group))


def sharded_seconds() -> None:
    """Models of `fully_shard`, of which each process computes with all data, or with its share."""
    number, group, mesh = (
        dist.get_world_size(),
        {"process_group": dist.group.WORLD},
        init_device_mesh("cpu", (dist.get_world_size(),)),
    )
    say(f"{'fully_shard':44}{'one process':>14}{'all data each':>14}{'ratio':>7}{f'{number} shares':>14}{'ratio':>7}")
    for repeats in (1, 32):
        net, loss, params, whole, mine = problem("narrow", 4, repeats)
        model = copy.deepcopy(net)
        for module in (*model, model):
            if list(module.parameters()):
                fully_shard(module, mesh=mesh)
        own = dict(model.named_parameters())
        v = {name: torch.ones_like(p) for name, p in params.items()}
        parts = {name: distribute_tensor(v[name], mesh, p.placements) for name, p in own.items()}
        for kind in (HessianLinearOperator, GGNLinearOperator):
            make = partial(kind, model, loss, own, check_deterministic=False)
            one = kind(net, loss, params, whole, check_deterministic=False)
            works = (
                partial(matmul, one, v),
                partial(matmul, make(whole), parts),
                partial(matmul, make(mine, **group), parts),
            )
            row(title("9 layers", whole, f"{kind.__name__[:-14]} product"), *works)
        make = partial(KFACLinearOperator, check_deterministic=False)
        works = (
            partial(make, net, loss, params, whole),
            partial(make, model, loss, own, whole),
            partial(make, model, loss, own, mine, **group),
        )
        row(title("9 layers", whole, "KFAC"), *works)


def narrow() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """An MLP with nine layers of 256 inputs."""
    layers = [layer for _ in range(8) for layer in (nn.Linear(256, 256), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(256, 10)), [(torch.rand(64, 256), torch.randint(10, (64,)))]


def title(name: str, batches: list[Any], work: str) -> str:
    return f"{name}, {len(batches)} × {len(batches[0][1])} data, {work}"


def decomposed(kind: Any, *args: Any, **options: Any) -> None:
    """Factors with their eigendecompositions."""
    found = kind(*args, check_deterministic=False, **options)
    if kind is KFACLinearOperator:
        found.decompose()


def row(name: str, *calls: Callable[[], Any]) -> None:
    one, *several = alternating(*calls)
    say(f"{name:44}{one:13.3f}s" + "".join(f"{seconds:13.3f}s{one / seconds:7.2f}" for seconds in several))


def say(line: str) -> None:
    if dist.get_rank() == 0:
        print(line, flush=True)


class Counted:
    """Bytes that this process hands to collective calls, and that its machine's own network device has sent."""

    def __enter__(self) -> Counted:
        self.given, self._calls = 0, {name: getattr(dist, name) for name in ("all_reduce", "all_gather", "broadcast")}
        for name, call in self._calls.items():
            setattr(dist, name, self._counting(call))
        dist.barrier()
        self._before = _sent()
        return self

    def __exit__(self, *_: object) -> None:
        for name, call in self._calls.items():
            setattr(dist, name, call)
        dist.barrier()
        self.wire = _sent() - self._before

    def _counting(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            tensor = args[1] if isinstance(args[0], list) else args[0]
            self.given += tensor.numel() * tensor.itemsize
            return call(*args, **kwargs)

        return counted


def _sent() -> int:
    """Bytes that went over the loopback device."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        if line.strip().startswith("lo:"):
            return int(line.split()[9])
    return 0


def bytes_sent() -> None:
    say(f"{'':30}{'given':>12}{'formula':>12}{'sent by all':>14}{'formula':>12}")
    *args, _, mine = problem("mlp", 4)
    options = {"check_deterministic": False, "process_group": dist.group.WORLD}
    hessian, ggn = (kind(*args, mine, **options) for kind in (HessianLinearOperator, GGNLinearOperator))
    dim, size = hessian.shape[1], hessian.domain.sum_dtype.itemsize
    for columns in (1, 4, 16):
        v = torch.ones(dim, columns)
        bytes_row(f"Hessian, {columns} columns", partial(matmul, hessian, v), product(dim, columns, size))
    bytes_row("GGN, 1 column", lambda: ggn @ torch.ones(dim), product(dim, 1, size))
    jacobian = JacobianLinearOperator(args[0], args[2], mine, **options)
    u = torch.ones(jacobian.shape[0])
    bytes_row("Jacobian, J v", lambda: jacobian @ torch.ones(dim), product(len(u), 1, size))
    bytes_row("Jacobian, Jᵀ u", lambda: jacobian.T @ u, product(dim, 1, size))
    layers = [tuple(p.shape[::-1]) for p in args[2].values() if p.ndim == 2]
    joint = {"separate_weight_and_bias": False, "fisher_type": "empirical", **options}
    layers = [(a + 1, g) for a, g in layers]
    bytes_row("KFAC", lambda: KFACLinearOperator(*args, mine, **joint), kfac(layers, size))
    bytes_row("EKFAC", lambda: EKFACLinearOperator(*args, mine, **joint), ekfac(layers, size))
    spread = SpreadOperator(GGNLinearOperator(*args, mine, check_deterministic=False), dist.group.WORLD)
    bytes_row("GGN spread, 16 columns", lambda: spread @ v, spread_columns(dim, 16, 4))


class Traffic(NamedTuple):
    """Bytes that a process hands over: to be gathered by all, to be summed, and of one to be sent to the others."""

    gathered: int
    summed: int = 0
    sent: int = 0

    def of_all(self, number: int) -> int:
        """Bytes that all processes send: a message to each other one, a ring for each sum, a tree for what one has."""
        return number * (number - 1) * self.gathered + 2 * (number - 1) * self.summed + (number - 1) * self.sent


def product(dim: int, columns: int, size: int) -> Traffic:
    """A product of Hessian, GGN, Fisher: K columns of D numbers, summed."""
    return Traffic(MESSAGE, dim * columns * size)


def kfac(layers: list[tuple[int, int]], size: int) -> Traffic:
    """KFAC of layers with inputs and outputs a, g: Σ (a² + g²) numbers, summed; four messages."""
    return Traffic(4 * MESSAGE, sum(a * a + g * g for a, g in layers) * size)


def ekfac(layers: list[tuple[int, int]], size: int) -> Traffic:
    """EKFAC: KFAC, its eigenvalues and eigenvectors from one process each, and Σ a g numbers of the diagonal, summed."""
    one = kfac(layers, size)
    diagonal = sum(a * g for a, g in layers) * size
    basis = sum(a * a + a + g * g + g for a, g in layers) * size
    return Traffic(one.gathered + 2 * MESSAGE, one.summed + diagonal, basis)


def spread_columns(dim: int, columns: int, size: int) -> Traffic:
    """K columns divided among the processes: K / W of D numbers, gathered."""
    return Traffic(MESSAGE + dim * -(-columns // dist.get_world_size()) * size)


def bytes_row(name: str, call: Callable[[], Any], formula: Traffic) -> None:
    """What was counted beside the formulas."""
    with Counted() as found:
        call()
    say(f"{name:30}{found.given:12,}{sum(formula):12,}{found.wire:14,}{formula.of_all(dist.get_world_size()):12,}")


def large() -> None:
    """A transformer of 20 blocks of width 2,048 (heads' projections, an MLP of four times the width) on 64 GPUs."""
    width, number, size, rate = 2048, 64, 4, 50e9
    block = [(width + 1, 3 * width), (width + 1, width), (width + 1, 4 * width), (4 * width + 1, width)]
    layers = block * 20
    dim = sum(a * g for a, g in layers)
    print(
        f"{dim:,} parameters in {len(layers)} layers, {number} processes, {size} bytes a number, {rate / 1e9:g} GB/s a process"
    )
    print(f"{'':30}{'held, GB':>10}{'sent, GB':>10}{'seconds':>10}")
    for name, held, found in (
        ("product, 1 column", 2 * dim * size, product(dim, 1, size)),
        ("product, 16 columns", 32 * dim * size, product(dim, 16, size)),
        ("KFAC", kfac(layers, size).summed, kfac(layers, size)),
        ("EKFAC", ekfac(layers, size).summed + ekfac(layers, size).sent, ekfac(layers, size)),
        ("diagonal", dim * size, product(dim, 1, size)),
    ):
        sent = found.of_all(number) / number
        print(f"{name:30}{held / 1e9:10.1f}{sent / 1e9:10.1f}{sent / rate:10.2f}")


def main() -> None:
    if "--large" in sys.argv:
        large()
        return
    dist.init_process_group("gloo")
    (bytes_sent if "--bytes" in sys.argv else sharded_seconds if "--sharded" in sys.argv else seconds)()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
