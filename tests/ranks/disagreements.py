"""What goes wrong in one of two processes is an error in both, and the next call works."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from problems import PROBLEMS
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from curvops import (
    EKFACLinearOperator,
    EmpiricalRisk,
    GGNLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
    KFACLinearOperator,
    SpreadOperator,
)
from curvops.ranks import _OPEN


def attempt(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def told(call: Callable[[], Any]) -> str:
    """What a call warns of."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        call()
    return " ".join(str(one.message) for one in seen)


def shifted(z: Tensor, y: Tensor) -> Tensor:
    """A language model's own mean over the tokens that count."""
    return cross_entropy(z[:, :-1].flatten(0, 1), y[:, 1:].flatten())


class Failing:
    """Batches that end in an error when they are told to, or that only some passes can be begun over."""

    def __init__(self, batches: list[Any], passes: float = float("inf")) -> None:
        self.batches, self.passes, self.error = batches, passes, None

    def __iter__(self):
        self.passes -= 1
        if self.passes < 0:
            raise OSError("the disk is gone")
        yield from self.batches
        if self.error is not None:
            raise self.error


def disagreements() -> list[dict[str, str]]:
    """What each of the two processes is told."""
    rank, group = dist.get_rank(), dist.group.WORLD
    p = PROBLEMS["mlp"]()
    data = Failing(p.data(4, 2)[rank : rank + 1])
    op = HessianLinearOperator(p.model, p.loss, p.params, data, process_group=group)
    before = {name: q.detach().clone() for name, q in p.params.items()}
    v = torch.ones(p.dim, dtype=torch.float64)
    expected = HessianLinearOperator(p.model, p.loss, p.params, p.data(4, 2)) @ v
    weight = p.params["0.weight"]
    found: dict[str, str] = {}

    def made(kind: Any = HessianLinearOperator, **changes: Any) -> Callable[[], Any]:
        given = {"model_func": p.model, "loss_func": p.loss, "params": p.params, "data": data} | changes
        return lambda: kind(**given, process_group=group)

    def tried(name: str, call: Callable[[], Any]) -> None:
        found[name] = attempt(call)
        assert torch.allclose(op @ v, expected, rtol=0, atol=1e-12), name

    tried("columns", lambda: op @ torch.ones(p.dim, 2 + rank, dtype=torch.float64))
    tried(
        "vectors", lambda: op @ torch.randn(p.dim, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    )
    tried("loss", made(loss_func=nn.CrossEntropyLoss(label_smoothing=0.1 * rank)))
    tried("parameters", made(params={n: q for n, q in p.params.items() if n != "0.bias" or rank == 0}))
    tried("order", made(params=dict(sorted(p.params.items(), reverse=rank == 1))))
    tried("samples", lambda: made(GGNLinearOperator, mc_samples=1 + rank)() @ v)
    tried("seed", made(KFACLinearOperator, seed=rank))
    tried("operator", made(EKFACLinearOperator if rank else KFACLinearOperator, check_deterministic=False))
    tried("number", made(num_data=5))
    kept = list(data.batches)
    jacobian = JacobianLinearOperator(p.model, p.params, kept, process_group=group)
    kept.append(kept[0]) if rank else kept.append((p.X[:1], p.y[:1]))
    tried("outputs", lambda: jacobian @ v)
    tried("products", lambda: op.trace(num_products=-1 if rank else 6))
    tried("right side", lambda: op.damped(1.0).solve(v[rank:]))
    tried("pairs", lambda: op.eigenpairs(99 if rank else 2))
    tried("length", lambda: op @ v[rank:])
    tried("sum's length", lambda: (2 * op.T + op) @ v[rank:])
    tried("counted", lambda: made(num_data=6 if rank else None, check_deterministic=False)() @ v)
    tried("judge", made(data=Failing(data.batches, 2 if rank else 9)))
    kfac = made(KFACLinearOperator)()
    tried("decay", lambda: kfac.refresh(decay=3.0 if rank else 0.5))
    tried("other decay", lambda: kfac.refresh(decay=0.25 if rank else 0.5))
    whole = p.data(4, 2)
    for name, options in {
        "spread seed": {"seed": rank},
        "spread loss": {"loss_func": nn.CrossEntropyLoss(weight=1.0 + rank * torch.arange(3).double())},
        "spread data": {"data": whole[: 1 + rank]},
    }.items():
        given = {"model_func": p.model, "loss_func": p.loss, "params": p.params, "data": whole} | options
        alone = KFACLinearOperator(**given, check_deterministic=False)
        tried(name, lambda alone=alone: SpreadOperator(alone, group))
    alone = HessianLinearOperator(p.model, p.loss, p.params, Failing(whole), check_deterministic=False)
    twice = SpreadOperator(alone, group)
    inner = HessianLinearOperator(p.model, p.loss, p.params, Failing(whole), process_group=group)
    twice.operator = inner
    inner.risk.data.batches.error = OSError("the disk is gone") if rank else None
    tried("twice", lambda: twice @ torch.ones(p.dim, 2, dtype=torch.float64))
    tried("argument", made(data=data if rank == 0 else iter(data)))
    tried("nothing", made(data=[]))
    mc = made(GGNLinearOperator, mc_samples=1)()
    mc @ v
    data.batches.append(data.batches[0])
    found["places"] = attempt(lambda: mc @ v)
    data.batches.pop()
    with torch.no_grad():
        weight[0, 0] += 1e-12 * rank
    found["weights"] = attempt(lambda: op @ v)
    with torch.no_grad():
        weight.copy_(before["0.weight"])
    data.error = OSError("the disk is gone") if rank == 1 else None
    found["product"] = attempt(lambda: op @ v)
    found["check"] = attempt(made())
    found["kfac"] = attempt(made(KFACLinearOperator, check_deterministic=False))
    found["gradient"] = attempt(EmpiricalRisk(p.model, p.loss, p.params, data, process_group=group).gradient)
    data.error = None
    with op.linearized():
        op @ v
        with torch.no_grad():
            weight += 0.0 if rank else 1.0
        found["linearized"] = attempt(lambda: op @ v)
        with torch.no_grad():
            weight.copy_(before["0.weight"])
    tried("none", lambda: op @ v)
    lengths = [torch.arange(4 + 16 * rank).remainder(5).expand(2, -1)]
    language = nn.Embedding(5, 5).double()
    with torch.no_grad():
        language.weight.copy_(torch.linspace(-1, 1, 25).view(5, 5))
    tokens = [(t, t.roll(1)) for t in lengths]
    own = {"model_func": language, "params": dict(language.named_parameters()), "data": tokens}
    found["tokens"] = attempt(made(loss_func=shifted, reduction="mean", **own))
    for name, least in (("graph of one", 3), ("graph of none", 9)):  # of process 0's four data, and of process 1's two

        def severed(params: dict[str, Tensor], X: Tensor, least: int = least) -> Tensor:
            return p.model(X) if len(X) >= least else p.model(X).detach()

        found[name] = told(made(KFACLinearOperator, model_func=severed))
    assert all(torch.equal(q, before[name]) for name, q in p.params.items())
    assert not _OPEN  # which would hold the group after its end
    several: list[Any] = [None, None]
    dist.all_gather_object(several, found)
    return several
