"""What a command does, for its time, to the streams and the signals of its process."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import TextIO


class Terminated(KeyboardInterrupt):
    """SIGTERM has come, as schedulers and `timeout` send it."""


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM ends what runs as Ctrl-C does; a second one ends the process at once.

    Not where whoever calls has a handler, nor under torchrun, whose processes may wait for each other in code that no
    handler interrupts.
    """
    ours = threading.current_thread() is threading.main_thread() and "TORCHELASTIC_RUN_ID" not in os.environ
    if not ours or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    process = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if os.getpid() != process:  # one that was forked
            os.kill(os.getpid(), signal.SIGTERM)
        raise Terminated

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def legible() -> Iterator[None]:
    """Signs that the encoding of a stream lacks are printed by their numbers."""
    with contextlib.ExitStack() as stack:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stack.callback(_answer_errors, stream, stream.errors)
                _answer_errors(stream, "backslashreplace")
        yield


def _answer_errors(stream: io.TextIOWrapper, errors: str | None) -> None:
    with contextlib.suppress(ValueError):  # it was closed
        stream.reconfigure(errors=errors)


@contextlib.contextmanager
def diverted(stdout: TextIO) -> Iterator[None]:
    """What is written to stdout goes to stderr: by Python, and, where stdout is the process's own, by all else."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        try:
            own = os.path.samestat(os.fstat(stdout.fileno()), os.fstat(1))
            other = sys.stderr.fileno()
        except (AttributeError, OSError, ValueError):  # a stream in memory, or none
            own = False
        if own:
            stdout.flush()
            kept = os.dup(1)
            stack.callback(os.close, kept)
            stack.callback(os.dup2, kept, 1)
            if os.name == "posix":  # what C code has printed and not yet written
                stack.callback(ctypes.CDLL(None).fflush, None)
            os.dup2(other, 1)
        yield
