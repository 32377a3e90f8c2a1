"""`curvops tour`: curvature matrices as figures, a page and files."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click
import torch

from curvops.cli.commands import SETUPS
from curvops.cli.problem import find_device, load_problem
from curvops.cli.session import Session
from curvops.tour.compute import Finished
from curvops.tour.files import load_matrices
from curvops.tour.own import tour
from curvops.tour.run import run_tour


def run(session: Session, *, target: str | None, setups: list[str] | None, **given: Any) -> None:
    """The tour of the user's problem, or that of the built-in setups."""
    if target is None:
        _built_in(session, setups or list(SETUPS), **given)
    elif setups:
        raise click.UsageError(f"--setups chooses among built-in models, and {target!r} is a problem of your own")
    else:
        _own(session, target, **given)


def _built_in(
    session: Session, setups: list[str], *, output: str, device: str | None, dtype: str | None, seed: int,
    params: tuple[str, ...], batches: int | None, threads: int | None, memory: int | None, fresh: bool,
) -> None:  # fmt: skip
    for name, value in (("--params", params), ("--batches", batches), ("--memory", memory), ("--fresh", fresh)):
        if value:
            raise click.UsageError(f"{name} belongs to a problem of your own: curvops tour MODULE:PROBLEM {name}")
    if threads is not None:
        torch.set_num_threads(threads)
    finished = Finished()
    session.kept.append(finished)
    run_tour(
        output, setups=setups, device=None if device is None else find_device(device),
        dtype=getattr(torch, dtype or "float32"), seed=seed, finished=finished, say=session.say,
    )  # fmt: skip
    files = {str(path): load_matrices(path) for path in finished.matrices} if session.as_json else {}
    costs = {name: {title: asdict(cost) for title, cost in file.costs.items()} for name, file in files.items()}
    session.answer({"output": output, "matrices": costs, "figures": [str(path) for path in finished.figures]})


def _own(
    session: Session, target: str, *, output: str, fresh: bool, memory: int | None, seed: int, **given: Any
) -> None:
    problem = load_problem(target, seed=seed, **given)
    finished = Finished()
    session.kept.append(finished)
    found = tour(
        problem.model, problem.loss, problem.data, problem.params, output=output, seed=seed, memory_budget=memory,
        resume=not fresh, finished=finished, say=session.note, **problem.options,
    )  # fmt: skip
    session.say(str(found))
    session.say("\n".join(str(path) for path in found.paths))
    costs = {title: asdict(cost) for title, cost in found.file.costs.items()}
    document = {"output": output, "parameters": found.file.parameters, "groups": found.groups, "costs": costs}
    session.answer(
        {"problem": problem.target, **document, "refused": found.refused, "files": list(map(str, found.paths))}
    )
