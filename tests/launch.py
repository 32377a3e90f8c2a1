"""Processes that tests start: forked from one that has imported what each would take seconds to import by itself."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from functools import cache
from typing import Any
from unittest.mock import patch

from torch.distributed.launcher.api import LaunchConfig, elastic_launch

# and what these import; the process has no thread and has computed nothing, so that it can be forked
PRELOADED = [
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "curvops.compat",
    "curvops.tour",
]


@cache
def forked() -> Any:
    """`multiprocessing` by a process from which others are forked."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    return multiprocessing.get_context("forkserver")


def elastic(number: int, function: Callable[..., Any], *arguments: Any, restarts: int = 0) -> list[Any]:
    """What a function returns in each of so many processes, which torchrun's engine starts, and starts again.

    Raises:
        torch.distributed.elastic.multiprocessing.errors.ChildFailedError: If one of them fails.
    """
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=number,
        run_id=f"tests {os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=restarts,
        start_method=forked().get_start_method(),
    )
    # else, when started again, processes may find the addresses of those that were killed
    own = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} if restarts else {}
    handled = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")]
    handlers = {which: signal.getsignal(which) for which in handled}
    try:
        with patch.dict(os.environ, own):
            found = elastic_launch(config, function)(*arguments)
    finally:
        for which, handler in handlers.items():
            signal.signal(which, handler)
    return [found[rank] for rank in range(number)]
