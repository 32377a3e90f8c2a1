"""`curvops tour`: curvature matrices as figures, a page and files."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch

from curvops.cli.commands import SETUPS
from curvops.cli.problem import find_device, load_problem
from curvops.cli.session import Session
from curvops.tour.compute import Tour
from curvops.tour.files import Finished, load_matrices
from curvops.tour.own import TourOptions, tour, tour_checkpoints
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
    checkpoints: tuple[str, ...],
) -> None:  # fmt: skip
    for name, value in (
        ("--params", params),
        ("--batches", batches),
        ("--memory", memory),
        ("--fresh", fresh),
        ("--checkpoint", checkpoints),
    ):
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
    session: Session,
    target: str,
    *,
    checkpoints: tuple[str, ...],
    output: str,
    fresh: bool,
    memory: int | None,
    seed: int,
    **given: Any,
) -> None:
    problem = load_problem(target, seed=seed, **given)
    output = str(session.path(output))
    finished = Finished()
    session.kept.append(finished)
    options: TourOptions = {"seed": seed, "memory_budget": memory, "resume": not fresh, "finished": finished}
    options["say"] = session.note
    options.update(problem.options)  # type: ignore[typeddict-item]  # its names are known
    own = problem.model, problem.loss, problem.data
    if checkpoints:
        tours = tour_checkpoints(*own, _labelled(session, checkpoints), problem.params, output=output, **options)
    else:
        tours = {"": tour(*own, problem.params, output=output, **options)}
    document: dict[str, Any] = {"problem": problem.target, "output": output, "tours": {}}
    for label, found in tours.items():
        session.say("\n".join([*[label] * bool(label), found.table()]))
        document["tours"][label] = _facts(found)
    files = [*finished.matrices, *finished.figures]
    session.say("\n".join(map(str, files)))
    session.answer({**document, "files": [str(path) for path in files]})


def _facts(found: Tour) -> dict[str, Any]:
    costs = {title: asdict(cost) for title, cost in found.file.costs.items()}
    return {"parameters": found.file.parameters, "groups": found.groups, "costs": costs, "refused": found.refused}


def _labelled(session: Session, checkpoints: tuple[str, ...]) -> dict[str, Path]:
    """Files by their names, or by their whole paths where names are the same."""
    paths = [session.path(one) for one in checkpoints]
    for path in paths:
        if not path.is_file():
            raise click.UsageError(f"--checkpoint: there is no file '{path}'")
    named = {path.stem: path for path in paths}
    return named if len(named) == len(paths) else {str(path): path for path in paths}
