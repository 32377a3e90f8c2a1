"""One problem's tour: its matrices, or their blocks where they are too large, kept as they are finished."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import chain
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
from curvops.tour.coarse_files import CoarseFile, load_coarse
from curvops.tour.facts import facts
from curvops.tour.files import MatrixFile, load_matrices, save_matrices
from curvops.tour.matrices import OPERATORS, Measured, each_matrix
from curvops.tour.meter import Cost, measured
from curvops.tour.table import table
from curvops.tree import tensors_of

MATRICES, BLOCKS = "matrices.safetensors", "blocks.safetensors"
REFUSED = "not computed"  # the setting that says why matrices are missing, by title
COPIES = 3  # of each matrix, that computing, drawing and writing them take beside each other
Say: TypeAlias = Callable[[str], None]


@dataclass
class Finished:
    """What a tour has written so far: by file the titles of the matrices in it, and the files of figures and pages."""

    matrices: dict[Path, list[str]] = field(default_factory=dict)
    figures: list[Path] = field(default_factory=list)

    def __str__(self) -> str:
        kept = [f"{', '.join(titles)} in {path}" for path, titles in self.matrices.items()]
        kept += [f"{len(self.figures)} figures"] * bool(self.figures)
        return "; ".join(kept) or "nothing"


@dataclass(frozen=True)
class Problem:
    """What a tour looks at: a risk with a title, its parameters in groups, and the folder for what is found."""

    title: str
    risk: EmpiricalRisk
    groups: Mapping[str, int]
    folder: Path


@dataclass(repr=False)
class Tour:
    """What a tour has found and written; `print` shows its table, and where the files are.

    Attributes:
        file: Matrices, or where these are too large their blocks, with parameters, groups, settings and costs.
        refused: By title why a matrix is missing.
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
        return self.file.norms if isinstance(self.file, CoarseFile) else self.file.matrices

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


def fits(risk: EmpiricalRisk, memory_budget: int | None = None) -> bool:
    """Whether all matrices of a risk fit into a budget of bytes, by default a quarter of what is free."""
    return not too_large(risk, memory_budget)


def too_large(risk: EmpiricalRisk, memory_budget: int | None = None) -> str:
    """Why the matrices of a risk do not fit, with both sizes; empty where they fit. See `fits`."""
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
    memory_budget: int | None = None,
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
    cost = None
    if check:
        with measured(problem.risk.space.device) as cost:
            check_deterministic(problem.risk)
    known = facts(problem.risk)
    if not torch.tensor([known["risk"], known["gradient_norm"]]).isfinite().all():
        raise ValueError(
            f"loss: over the data it is {known['risk']:g}, and the norm of its gradient {known['gradient_norm']:g}, so that no curvature "
            "is finite. Look for NaN, infinite or huge entries in the data and the parameters, as after a training that diverged."
        )
    reason = too_large(problem.risk, memory_budget)
    if not reason:
        run = _Matrices(problem, {**known, "seed": seed}, finished)
        run.begin(resume, say)
        found = run.compute(seed, memory_budget, progressbar)
    else:
        say(f"{reason}: norms of blocks instead")
        found = _blocks(problem, seed, memory_budget, progressbar, resume, finished, say)
    found.check = cost
    return found


class _Matrices:
    """The matrices of a problem, and the file that holds those that are finished."""

    def __init__(self, problem: Problem, known: Mapping[str, Any], finished: Finished) -> None:
        self._problem, self._finished = problem, finished
        self._path = problem.folder / MATRICES
        shapes = {name: tuple(shape) for name, shape in problem.risk.space.shapes.items()}
        settings = {"setup": problem.title, **known, "content": _content(problem.risk)}
        self.file = MatrixFile({}, shapes, dict(problem.groups), settings, versions())

    def begin(self, resume: bool, say: Say) -> None:
        """Take over what a file has, if that is wanted; say what becomes of it."""
        if not self._path.exists():
            return
        if resume and self._resumed():
            for title in self.file.matrices:
                say(f"{title}: in '{self._path}' already, not computed again")
        else:
            why = " is of another computation, and" if resume else ""
            say(f"'{self._path}'{why} is computed anew")

    def _resumed(self) -> bool:
        """Whether matrices were taken over: from a file of the same problem, by the same versions."""
        try:
            there = load_matrices(self._path)
        except (FileNotFoundError, ValueError):
            return False
        own = self.file
        # a sum by other numbers of threads is not the same to the last digit; the content says more than it
        settings = [
            {key: value for key, value in file.settings.items() if key not in (REFUSED, "risk", "gradient_norm")}
            for file in (there, own)
        ]
        if (settings[0], there.parameters, there.groups) == (settings[1], own.parameters, own.groups) and (
            own.versions.items() <= there.versions.items()
        ):
            own.matrices.update(there.matrices)
            own.costs.update(there.costs)
            own.explanations.update(there.explanations)
            self._finished.matrices[self._path] = list(own.matrices)
        return bool(own.matrices)

    def compute(self, seed: int, memory_budget: int | None, progressbar: bool) -> Tour:
        """Compute what is missing; the result has what could be had."""
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
        save_matrices(
            self._path,
            file.matrices,
            parameters=file.parameters,
            groups=file.groups,
            settings=file.settings,
            costs=file.costs,
            explanations=file.explanations,
        )
        self._finished.matrices[self._path] = list(file.matrices)


def _blocks(
    problem: Problem,
    seed: int,
    memory_budget: int | None,
    progressbar: bool,
    resume: bool,
    finished: Finished,
    say: Say,
) -> Tour:
    """The coarse tour of a problem whose matrices do not fit."""
    path = problem.folder / BLOCKS
    if not resume and path.exists():
        say(f"'{path}' is computed anew")
        path.unlink()
    refused: dict[str, Exception] = {}
    try:
        found = coarse_tour(
            problem.risk,
            path,
            groups=problem.groups,
            seed=seed,
            memory_budget=memory_budget,
            settings={"setup": problem.title},
            progressbar=progressbar,
            say=say,
            refused=refused,
        )
    finally:
        if path.exists():
            finished.matrices[path] = list(load_coarse(path).norms)
    if not found.norms:
        raise next(iter(refused.values()))
    return Tour(found, _reasons(refused), paths=[path])


def _reasons(refused: Mapping[str, Exception]) -> dict[str, str]:
    return {title: f"{type(error).__name__}: {' '.join(str(error).split())}" for title, error in refused.items()}


def _content(risk: EmpiricalRisk) -> str:
    """A number that any change of the model's tensors or of the data changes."""
    digest = hashlib.blake2b(digest_size=16)
    for tree in chain([risk.model.tensors], ((batch.X, batch.y) for batch in risk.data.walk())):
        for tensor in tensors_of(tree):
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(str((tensor.dtype, tuple(tensor.shape))).encode())
            digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return digest.hexdigest()
