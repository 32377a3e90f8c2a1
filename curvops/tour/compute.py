"""One problem's tour: its matrices, or their blocks where they are too large, kept as they are finished."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from tqdm import tqdm

from curvops.files import versions
from curvops.memory import budget, byte_size
from curvops.risk.determinism import check_deterministic
from curvops.risk.empirical_risk import EmpiricalRisk
from curvops.tour.coarse import coarse_tour
from curvops.tour.coarse_files import CoarseFile, matrices_of
from curvops.tour.facts import facts
from curvops.tour.files import Finished, MatrixFile, load_matrices, save_matrices
from curvops.tour.identity import differences
from curvops.tour.matrices import OPERATORS, Measured, each_matrix, warm_up
from curvops.tour.meter import Cost, measured
from curvops.tour.table import table

MATRICES, BLOCKS = "matrices.safetensors", "blocks.safetensors"
REFUSED = "not computed"  # the setting that says why matrices are missing, by title
COPIES = 3  # of each matrix, that computing, drawing and writing them take beside each other
Say: TypeAlias = Callable[[str], None]


@dataclass(frozen=True)
class Problem:
    """What a tour looks at: a risk with a title, its parameters in groups, the folder for what is found, and memory."""

    title: str
    risk: EmpiricalRisk
    groups: Mapping[str, int]
    folder: Path
    memory_budget: int | None = None

    @cached_property
    def too_large(self) -> str:
        """Why the matrices do not fit, decided once, as free memory changes; empty where they fit."""
        self.risk.ranks.meet(f"{self.title}: memory")
        several = self.risk.ranks.gather(too_large(self.risk, self.memory_budget))
        return next(filter(None, several), "")


@dataclass(repr=False)
class Tour:
    """What a tour has found and written; `print` shows its table, and where the files are.

    Attributes:
        file: Matrices, or where these are too large their blocks, with parameters, groups, settings and costs.
        refused: By title why a matrix is missing, or by title and part ("Hessian: density") why that part of it is.
        check: What the check for determinism took, None without one.
        paths: The files, in the order in which they were written.
        drawing: Seconds that its figures and the page took.
    """

    file: MatrixFile | CoarseFile
    refused: dict[str, str] = field(default_factory=dict)
    check: Cost | None = None
    paths: list[Path] = field(default_factory=list)
    drawing: dict[str, float] = field(default_factory=dict)

    @property
    def matrices(self) -> dict[str, Tensor]:
        """The matrices `[D, D]` by title, or where these are too large their blocks' Frobenius norms `[G, G]`."""
        return matrices_of(self.file)

    @property
    def groups(self) -> dict[str, int]:
        """The groups of parameters and their sizes, in the order of the rows."""
        return self.file.groups

    def table(self) -> str:
        """What each matrix took, and what is seen at once."""
        return table(self.file, self.refused, self.check, self.drawing)

    def __repr__(self) -> str:
        what = "norms of blocks" if isinstance(self.file, CoarseFile) else "matrices"
        where = f", in '{self.paths[0].parent}'" if self.paths else ""
        return f"<Tour of {self.file.settings.get('setup', 'a model')!r}: {what} of {', '.join(self.matrices)}{where}>"

    def __str__(self) -> str:
        return "\n".join([self.table(), *[f"files: {', '.join(map(str, self.paths))}"] * bool(self.paths)])


def too_large(risk: EmpiricalRisk, memory_budget: int | None = None) -> str:
    """Why all matrices of a risk do not fit into a budget of bytes, by default a quarter of what is free; empty where they do."""
    one = COPIES * risk.space.dim**2 * risk.space.dtype.itemsize
    cpu, device = torch.device("cpu"), risk.space.device
    for count, where in ((len(OPERATORS), cpu), *([(1, device)] if device.type != "cpu" else [])):
        if count * one > (room := budget(where, memory_budget)):
            each = f"{count} matrices" if count > 1 else f"on {where} a matrix"
            return (
                f"{each} of {risk.space.dim:,}² entries need {byte_size(count * one)} with the copies for drawing, more than "
                f"the budget of {byte_size(room)}"
            )
    return ""


def shown(progressbar: bool) -> bool:
    """Whether progress is shown: where it is wanted, and there is a terminal or a notebook."""
    return progressbar and (sys.stderr.isatty() or "ipykernel" in sys.modules)


def compute(
    problem: Problem,
    *,
    seed: int = 0,
    check: bool = True,
    progressbar: bool = True,
    resume: bool = False,
    finished: Finished | None = None,
    say: Say | None = None,
) -> Tour:
    """Compute what fits of a problem: its matrices, or else their blocks; keep each as soon as it is finished.

    Raises:
        RuntimeError: If two passes over the data differ.
        ValueError: If the risk is not finite.
        Exception: What the first operator raised, if none could be made.
    """
    finished = finished if finished is not None else Finished()
    progressbar, say = shown(progressbar), say or (lambda line: None)
    problem.folder.mkdir(parents=True, exist_ok=True)
    warm_up(problem.risk.space.device, problem.risk.space.dtype)
    cost = None
    if check:
        with measured(problem.risk.space.device) as cost:
            check_deterministic(problem.risk)
    known = facts(problem.risk)
    if not (math.isfinite(known["risk"]) and math.isfinite(known["gradient_norm"])):
        raise ValueError(
            f"loss: over the data it is {known['risk']:g}, and the norm of its gradient {known['gradient_norm']:g}, so that no curvature "
            "is finite. Look for NaN, infinite or huge entries in the data and the parameters, as after a training that diverged."
        )
    if not problem.too_large:
        run = _Matrices(problem, {**known, "seed": seed}, finished)
        run.begin(resume, say)
        found = run.compute(seed, progressbar)
    else:
        say(f"{problem.too_large}: norms of blocks instead")
        found = _blocks(problem, known, seed, progressbar, resume, finished, say)
    found.check = cost
    return found


class _Matrices:
    """The matrices of a problem, and the file that holds those that are finished."""

    def __init__(self, problem: Problem, known: Mapping[str, Any], finished: Finished) -> None:
        self._problem, self._finished = problem, finished
        self._path = problem.folder / MATRICES
        shapes = {name: tuple(shape) for name, shape in problem.risk.space.shapes.items()}
        settings = {"setup": problem.title, **known}
        self.file = MatrixFile({}, shapes, dict(problem.groups), settings, dict(versions()))

    def begin(self, resume: bool, say: Say) -> None:
        """Take over what a file of the same problem has, if that is wanted; say what becomes of it."""
        if not self._path.exists():
            return
        differ = self._resumed() if resume else ""
        for title in self.file.matrices:
            say(f"{title}: in '{self._path}' already, not computed again")
        if not self.file.matrices:
            say(f"'{self._path}'{f' is of another computation ({differ}), and' if differ else ''} is computed anew")

    def _resumed(self) -> str:
        """Take over the matrices of the file, or say why not."""
        try:
            there = load_matrices(self._path)
        except (FileNotFoundError, ValueError) as error:
            return f"it cannot be read: {str(error).partition('. ')[0].rstrip('.')}"
        own = self.file
        before, now = ({**file.settings, "groups": list(file.groups.items())} for file in (there, own))
        before.pop(REFUSED, None)
        if not (differ := differences(before, now)):
            own.matrices.update(there.matrices)
            own.costs.update(there.costs)
            own.explanations.update(there.explanations)
            self._finished.matrices[self._path] = list(own.matrices)
        return ", ".join(differ)

    def compute(self, seed: int, progressbar: bool) -> Tour:
        """Compute what is missing; the result has what could be had."""
        memory_budget = self._problem.memory_budget
        missing = [title for title in OPERATORS if title not in self.file.matrices]
        refused: dict[str, Exception] = {}
        results = each_matrix(
            self._problem.risk, titles=missing, seed=seed, memory_budget=memory_budget, refused=refused
        )
        with tqdm(
            total=len(OPERATORS), initial=len(self.file.matrices), desc="Matrices", file=sys.stderr, disable=not progressbar, leave=False
        ) as bar:  # fmt: skip
            bar.set_postfix_str("".join(missing[:1]))
            for result in results:
                self._keep(result)
                bar.update()
                bar.set_postfix_str("".join(missing[missing.index(result.title) + 1 :][:1]))
        if not self.file.matrices:
            raise next(iter(refused.values()))
        if reasons := _reasons(refused):
            self.file.settings[REFUSED] = reasons
        self._save()
        return Tour(self.file, reasons, paths=[self._path])

    def _keep(self, result: Measured) -> None:
        self.file.matrices[result.title] = result.matrix.cpu()
        self.file.costs[result.title] = result.cost
        self.file.explanations[result.title] = result.explanation
        self._save()

    def _save(self) -> None:
        file = self.file
        # in the order of the panels, also after a tour that was gone on with
        by_title: tuple[dict[str, Any], ...] = (file.matrices, file.costs, file.explanations)
        for parts in by_title:
            for title in [title for title in OPERATORS if title in parts]:
                parts[title] = parts.pop(title)
        if self._problem.risk.ranks.rank:  # the first process writes
            return
        save_matrices(self._path, **{name: value for name, value in vars(file).items() if name != "versions"})
        self._finished.matrices[self._path] = list(file.matrices)


def _blocks(
    problem: Problem,
    known: Mapping[str, Any],
    seed: int,
    progressbar: bool,
    resume: bool,
    finished: Finished,
    say: Say,
) -> Tour:
    """The coarse tour of a problem whose matrices do not fit."""
    path = problem.folder / BLOCKS
    refused: dict[str, Exception] = {}
    found = coarse_tour(
        problem.risk,
        path,
        groups=problem.groups,
        seed=seed,
        memory_budget=problem.memory_budget,
        settings={"setup": problem.title},
        progressbar=progressbar,
        resume=resume,
        finished=finished,
        say=say,
        refused=refused,
        known=known,
    )
    if not found.norms:
        raise next(iter(refused.values()))
    return Tour(found, _reasons(refused), paths=[path])


def _reasons(refused: Mapping[str, Exception]) -> dict[str, str]:
    return {title: f"{type(error).__name__}: {' '.join(str(error).split())}" for title, error in refused.items()}
