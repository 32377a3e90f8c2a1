"""Started twice: one of the processes is killed or stops, and the other says so."""

import os
import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from problems import PROBLEMS

from curvops import KFACLinearOperator

TIMEOUT = 5


class Ending:
    """Batches that end with a signal to the process itself."""

    def __init__(self, batches, end):
        self.batches, self.end = batches, end

    def __iter__(self):
        yield from self.batches
        if self.end:
            os.kill(os.getpid(), self.end)


def main(folder: Path, rank: int, end: int) -> None:
    """One of two processes, of which the other ends with a signal."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", world_size=2, rank=rank, timeout=timedelta(seconds=TIMEOUT)
    )
    p = PROBLEMS["mlp"]()
    batches = Ending(p.data(4, 2)[rank : rank + 1], end if rank else 0)
    start = time.monotonic()
    try:
        KFACLinearOperator(
            p.model, p.loss, p.params, batches, process_group=dist.group.WORLD, check_deterministic=False
        )
    except Exception as error:
        cause = type(error.__cause__).__name__
        (folder / "said").write_text(f"{type(error).__name__}: {error}\n{cause}\n{time.monotonic() - start}")
