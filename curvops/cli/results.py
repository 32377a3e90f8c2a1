"""Results on disk: written when they are finished, and not computed again with the same settings."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from curvops.cli import processes
from curvops.cli.failures import Failure
from curvops.cli.problem import Problem
from curvops.cli.session import Session
from curvops.files import read_tensors, write_tensors
from curvops.tour.identity import differences, identity

Found = tuple[dict[str, Tensor], dict[str, Any]]


def problem_settings(problem: Problem) -> dict[str, Any]:
    """What tells this problem from another: its names, and its `identity`."""
    return {"problem": problem.target, "params": list(problem.params), **identity(problem.risk)}


def kept_or_computed(
    path: Path, settings: Mapping[str, Any], compute: Callable[[], Found], session: Session, fresh: bool, format: str
) -> Found:
    """Tensors and what is known about them from a file of the same settings, else computed and written.

    Raises:
        Failure: If the file is of other settings, or none of ours.
    """
    if path.exists() and not fresh:
        try:
            tensors, about = read_tensors(path, format)
        except ValueError as error:
            raise Failure(f"{str(error).rstrip('.')}; --fresh computes it anew") from None
        expect_same(path, about.get("settings"), settings)
        session.note(f"'{path}' is there, and is not computed again")
        session.kept.append(path)
        return tensors, about
    start = time.perf_counter()
    tensors, about = compute()
    about |= {"settings": dict(settings), "seconds": time.perf_counter() - start}
    if processes.is_first():
        write_tensors(path, tensors, about, format)
    session.kept.append(path)
    return tensors, about


def expect_same(path: Path, found: Any, settings: Mapping[str, Any]) -> None:
    """A failure, if a file was computed with other settings; it names those that differ."""
    found = found if isinstance(found, dict) else {}
    if "problem" in found and found["problem"] != settings.get("problem"):
        raise Failure(
            f"'{path}' is of another problem ({found['problem']}); --fresh computes it anew, --output puts it elsewhere"
        )
    if differ := differences(found, settings):
        raise Failure(
            f"'{path}' was computed with other settings ({', '.join(differ)}); --fresh computes it anew, --output puts it elsewhere"
        )
