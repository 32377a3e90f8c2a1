"""Started in two processes, of which one kills itself at its first start: they go on from their checkpoints."""

import os
import signal
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ranks.sharded import Cut
from survive.cases import Counted, Loader, Stop, convolutional
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from curvops import Checkpoint, EKFACLinearOperator, GGNLinearOperator, KFACLinearOperator
from curvops.spectrum import eigenpairs

OPERATORS = {
    "kfac": KFACLinearOperator,
    "ekfac": EKFACLinearOperator,
    "swept": EKFACLinearOperator,
    "cut": EKFACLinearOperator,
}
BATCHES = [[0, 1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11]]  # of each process


def main(folder: Path, name: str, last: int) -> dict[str, Any]:
    """The same with a checkpoint and without; at its first start process 1 kills itself after so many steps."""
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    rank, first = dist.get_rank(), os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    *problem, data = convolutional()
    own = [data[k] for k in BATCHES[rank]]
    group: Any = {"process_group": dist.group.WORLD, "check_deterministic": False}
    if name == "cut":  # the processes have parts of the parameters, and both all data
        own = [(X.flatten(1), y) for X, y in data]
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(72, 6), nn.Tanh(), nn.Linear(6, 4)).double()
        model = Cut(net, init_device_mesh("cpu", (2,)))
        problem, group = [model, problem[1], dict(model.named_parameters())], {"check_deterministic": False}
    passes: list[int] = []
    problem[0].register_forward_pre_hook(lambda *_: passes.append(0))

    def die(count: int) -> None:
        if first and count == last and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    def compute(stop: Stop, checkpoint: Checkpoint | None) -> tuple[torch.Tensor, int]:
        passes.clear()
        if name == "eigenpairs":
            matrix = Counted(GGNLinearOperator(*problem, own, **group), stop)
            found = eigenpairs(matrix, 1, subspace=6, max_products=12, checkpoint=checkpoint).vectors
        else:
            options = {"memory_budget": 0} if name in ("swept", "cut") else {}
            found = OPERATORS[name](*problem, Loader(own, stop), checkpoint=checkpoint, **options, **group).to_dense()
        return found, len(passes)

    found, its_passes = compute(die, Checkpoint(folder / f"{name}.safetensors", every=2))
    alone, all_passes = compute(lambda _: None, None)
    return {"restarted": not first, "same": torch.equal(found, alone), "saved": all_passes - its_passes}
