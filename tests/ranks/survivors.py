"""Started by torchrun with two processes, of which one kills itself at its first start: they go on from their checkpoints."""

import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ending import end
from survive.cases import Counted, Loader, Stop, convolutional

from curvops import Checkpoint, EKFACLinearOperator, GGNLinearOperator, KFACLinearOperator
from curvops.spectrum import eigenpairs

FIRST = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
OPERATORS = {"kfac": KFACLinearOperator, "ekfac": EKFACLinearOperator, "swept": EKFACLinearOperator}
BATCHES = [[0, 1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11]]  # of each process


def die(count: int) -> None:
    """What process 1 does at its first start, after so many steps."""
    if FIRST and count == int(sys.argv[3]) and dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def main(folder: Path, name: str, _: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    *problem, data = convolutional()
    own = [data[k] for k in BATCHES[rank]]
    passes: list[int] = []
    problem[0].register_forward_pre_hook(lambda *_: passes.append(0))
    group: Any = {"process_group": dist.group.WORLD, "check_deterministic": False}

    def compute(stop: Stop, checkpoint: Checkpoint | None) -> tuple[torch.Tensor, int]:
        passes.clear()
        if name == "eigenpairs":
            matrix = Counted(GGNLinearOperator(*problem, own, **group), stop)
            found = eigenpairs(matrix, 1, subspace=6, max_products=12, checkpoint=checkpoint).vectors
        else:
            options = {"memory_budget": 0} if name == "swept" else {}
            found = OPERATORS[name](*problem, Loader(own, stop), checkpoint=checkpoint, **options, **group).to_dense()
        return found, len(passes)

    found, its_passes = compute(die, Checkpoint(folder / f"{name}.safetensors", every=2))
    alone, all_passes = compute(lambda _: None, None)
    report = {"restarted": not FIRST, "same": torch.equal(found, alone), "saved": all_passes - its_passes}
    several: list[Any] = [None, None]
    dist.all_gather_object(several, report)
    end(folder / f"{name}.json", several)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]), *sys.argv[2:])
