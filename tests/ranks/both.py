"""Started in two processes: all that two of them are asked, one thing after the other."""

import io
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ranks.disagreements import attempt, disagreements
from ranks.sharded import sharded

from curvops.cli import main as curvops
from curvops.sharding import LEAST

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")


def printed(call: Callable[[], Any]) -> dict[str, Any]:
    """What a call returns, and what both processes print."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        result = call()
    several: list[Any] = [None, None]
    dist.all_gather_object(several, (out.getvalue(), err.getvalue()))
    return {"result": result, "out": "".join(o for o, _ in several), "err": "".join(e for _, e in several)}


def main(folder: Path, *spectrum: str) -> dict[str, Any]:
    """All of it, in a folder."""
    warnings.simplefilter("ignore")
    sys.path.append(BENCHMARKS)
    from processes import bytes_sent

    os.chdir(folder)
    dist.init_process_group("gloo")
    cut = sharded() if torch.__version__ >= LEAST else attempt(sharded)
    found = {"disagreements": disagreements(), "sharded": cut, "bytes": printed(bytes_sent)["out"]}
    for name in ("problem", "failing"):
        command = ["spectrum", f"own.py:{name}", "--output", name, *spectrum]
        found[name] = printed(lambda command=command: curvops(command))
    return found
