"""How a script of several processes ends."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist


def end(report: Path, found: Any) -> None:
    """Write what the first process has found, and end all of them.

    PyTorch's group waits for threads that wait for Python, which is busy ending the group: rarely, under load, for ever.
    """
    if dist.get_rank() == 0:
        report.write_text(json.dumps(found))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)
