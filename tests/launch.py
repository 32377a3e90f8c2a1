"""Processes that tests start: forked from one that has imported what each would take seconds to import by itself."""

import multiprocessing
import os
import signal
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
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

    Twice in some sixty runs PyTorch's heap broke amid messages of a process ("malloc(): unaligned tcache chunk detected"; not
    explained, and not seen under valgrind). Where one ends so, by a signal that nobody sent, a warning says it, and all run once more.

    Raises:
        torch.distributed.elastic.multiprocessing.errors.ChildFailedError: If one of them fails, or two runs end so.
    """
    try:
        return _started(number, function, arguments, restarts)
    except Crash as crash:
        warnings.warn(f"processes crashed, and are started once more: {crash.__cause__}", stacklevel=2)
    try:
        return _started(number, function, arguments, restarts)
    except Crash as crash:
        assert crash.__cause__ is not None
        raise crash.__cause__ from None


class Crash(Exception):
    """A process ended without an exception, by a signal that nobody sent."""


def _told(function: Callable[..., Any], folder: str, *arguments: Any) -> Any:
    """What a function returns; that it returned or raised is left in a folder."""
    try:
        return function(*arguments)
    finally:
        Path(folder, os.environ["RANK"]).touch()


def _started(number: int, function: Callable[..., Any], arguments: tuple[Any, ...], restarts: int) -> list[Any]:
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
    with tempfile.TemporaryDirectory() as ended:
        try:
            with patch.dict(os.environ, own):
                found = elastic_launch(config, _told)(function, ended, *arguments)
        except ChildFailedError as error:
            # the engine tells the first failure only, which may be of one that has an exception, as another is gone; one that
            # does not answer is no crash
            told = any(f"Connection {what} by peer" in str(error) for what in ("closed", "reset"))
            signalled = told or any(failure.exitcode < 0 for failure in error.failures.values())
            if signalled and not restarts and len(list(Path(ended).iterdir())) < number:
                raise Crash from error
            raise
        finally:
            for which, handler in handlers.items():
                signal.signal(which, handler)
    return [found[rank] for rank in range(number)]
