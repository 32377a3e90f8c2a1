"""The coarse tour: blocks and spectra of matrices that are too large to be formed, part by part, from products."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from curvops.checkpoint import Checkpoint, OtherComputation
from curvops.files import Unreadable
from curvops.memory import budget
from curvops.risk.empirical_risk import EmpiricalRisk
from curvops.tour.coarse_files import CoarseFile, load_coarse, save_coarse, with_part
from curvops.tour.facts import facts
from curvops.tour.files import Finished, prepare_output
from curvops.tour.groups import Groups, sizes_of
from curvops.tour.identity import differences
from curvops.tour.matrices import OPERATORS, refusals
from curvops.tour.meter import Cost, measured

MOST = 40  # groups by default, for each takes products
WIDEST = 16  # classes up to which Kronecker operators take the exact output factor, which has a column for each
PARTS = {"norms": "norms of blocks", "masses": "eigenvectors", "densities": "density"}  # what they are called
Say: TypeAlias = Callable[[str], None]
Part: TypeAlias = tuple[dict[str, Any], int]  # fields of a title, and the products that they took


@dataclass(frozen=True)
class Effort:
    """How many products the coarse tour spends on a matrix that has no structure of its own.

    Attributes:
        block_products: Products for each group: norms of blocks and traces, with an error of a norm of at most about
            0.18 (off the diagonal) and 0.25 for 8, falling with the root.
        eigenvalues: How many are looked for; 0 leaves them out.
        eigen_products: Products after which the search for them ends, converged or not.
        density_depth, density_vectors: Lanczos steps, and start vectors, of the spectral density; 0 vectors leave it out.
    """

    block_products: int = 8
    eigenvalues: int = 5
    eigen_products: int = 60
    density_depth: int = 24
    density_vectors: int = 2

    def __post_init__(self) -> None:
        """Raise a ValueError if these are no such numbers."""
        least = {"block_products": 2, "eigen_products": 1, "density_depth": 1}
        for name, number in asdict(self).items():
            if not isinstance(number, int) or isinstance(number, bool) or number < least.get(name, 0):
                raise ValueError(f"Effort: {name} must be an integer ≥ {least.get(name, 0)}, got {number!r}.")


def coarse_tour(
    risk: EmpiricalRisk,
    path: str | Path | None = None,
    *,
    titles: Sequence[str] = tuple(OPERATORS),
    groups: Groups = "modules",
    effort: Effort = Effort(),
    mc_samples: int = 1,
    seed: int = 0,
    memory_budget: int | None = None,
    settings: Mapping[str, Any] | None = None,
    progressbar: bool = False,
    resume: bool = True,
    finished: Finished | None = None,
    say: Say | None = None,
    refused: dict[str, Exception] | None = None,
    known: Mapping[str, Any] | None = None,
) -> CoarseFile:
    """Compute what can be seen of curvature matrices without forming them: blocks, traces, eigenvectors, densities.

    Of the Kronecker operators all of this is exact and takes no products. The others are asked for products, G ·
    `block_products` of them for G groups and those of the spectrum, within one `linearized()`, so that batches' graphs are
    kept as far as memory allows.

    With a path, each finished part is saved there (`save_coarse`), and beside it, unless there are several processes, what
    is known of the matrix whose blocks are under way, until these are finished. A file of the same problem and settings,
    by the same versions, is gone on with, and what it has is not computed again; what the same is, `curvops.tour.identity`
    says. Any other file is replaced once the first part is finished.

    Args:
        risk: The empirical risk. Determinism is not checked.
        path: The file.
        titles: Some of `OPERATORS`, in the order in which they are computed.
        groups: Rows that belong together: ``"modules"`` for modules, of which near ones are put together until there are
            at most 40; a depth of module names, such as 1 for the model's children; ``"tensors"``; or numbers of
            consecutive parameters (entries), by label or in order.
        effort: Numbers of products.
        mc_samples: Monte-Carlo samples of the MC-Fisher, and of KFAC and EKFAC where a loss term has more than 16 classes
            (their exact output factor has one column for each).
        seed: Of random vectors and Monte-Carlo samples.
        memory_budget: Bytes, half of them for kept graphs and half for the bases of eigenvectors. Default: a quarter of
            what is free. Beside them stand `block_products` vectors, and the Kronecker operators' factors.
        settings: Further facts for the file, such as ``{"setup": title}``; JSON must hold them.
        progressbar: Show products as they are taken.
        resume: Whether a file is gone on with; else any is replaced.
        finished: Is filled in with what the file has, for a caller that may be interrupted.
        say: Takes a line for each finished part.
        refused: Takes what an operator raises, and the next one follows; without it, it is raised. The key is the title
            where nothing is known of the matrix, else the title with the part, "Hessian: eigenvectors" or "Hessian: density".
        known: The `facts` of the risk, if they are known.

    Raises:
        ValueError: If a title, the groups or a number is not as described.
        OSError: If the file cannot be written; where its folder takes no files, before anything is computed.

    Example:
        >>> from curvops.tour.setups import tiny
        >>> found = coarse_tour(tiny().risk(), titles=["Hessian", "KFAC"])
        >>> found.groups, found.norms["Hessian"].shape, bool(found.norms["KFAC"][0, 1] == 0)
        ({'0': 2, '3': 10}, torch.Size([2, 2]), True)
    """
    unknown = [title for title in titles if title not in OPERATORS]
    if unknown or not titles:
        raise ValueError(f"coarse_tour: titles must be some of {list(OPERATORS)}, got {list(titles)}.")
    shapes = {name: tuple(shape) for name, shape in risk.space.shapes.items()}
    sizes = sizes_of(groups, risk.space.dim, shapes, most=MOST)
    if path is not None:
        prepare_output(Path(path).parent, 0)
    begun = CoarseFile(
        parameters=shapes,
        groups=sizes,
        settings={
            **(facts(risk) if known is None else known),
            "seed": seed,
            "mc_samples": mc_samples,
            "effort": asdict(effort),
            **(settings or {}),
        },
    )
    finished, say = finished if finished is not None else Finished(), say or (lambda line: None)
    run = _Run(risk, begun, effort, budget(risk.space.device, memory_budget), progressbar, finished)
    if path is not None:
        run.begin(Path(path), resume, say)
    for title in titles:
        missing = run.missing(title)
        if not missing:
            say(f"{title}: in the file already, not computed again")
        # what cannot be saved or said is no refusal
        for fields, line in run.computed(title, missing, refused):
            run.keep(title, fields)
            if line:
                say(line)
    return run.coarse


def operator_options(title: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the operator of a title in a coarse tour of such settings."""
    options = OPERATORS[title][1]
    sampled = {"mc_samples": settings["mc_samples"], "seed": settings["seed"]}
    if "mc_samples" in options:
        return {**options, **sampled}
    if "fisher_type" in options and settings["width"] > WIDEST:
        return {**options, "fisher_type": "mc", **sampled}
    return options


class _Run:
    """A coarse tour under way: `coarse` is what is finished."""

    def __init__(
        self, risk: EmpiricalRisk, begun: CoarseFile, effort: Effort, memory: int, progressbar: bool, finished: Finished
    ) -> None:
        self.coarse, self._risk, self._effort, self._memory = begun, risk, effort, memory // 2
        self._finished = finished
        self._common: dict[str, Any] = {"seed": begun.settings["seed"], "progressbar": progressbar}
        self._path: Path | None = None
        self._checkpoint: Checkpoint | None = None  # of norms that are under way
        self._parts = {"norms": self._blocks}
        if effort.eigenvalues:
            self._parts["masses"] = self._eigenvectors
        if effort.density_vectors:
            self._parts["densities"] = self._density

    def begin(self, path: Path, resume: bool, say: Say) -> None:
        """Save to a file from now on, and go on with what is there if it is of the same problem and settings."""
        self._path = path
        if self._risk.ranks.alone:
            self._checkpoint = Checkpoint(path, every=self._effort.block_products).beside("under-way")
            if not resume:
                Path(self._checkpoint.path).unlink(missing_ok=True)
        if not path.is_file():
            return
        if not resume:
            say(f"'{path}' is computed anew")
            return
        there = load_coarse(path)
        before, now = ({**file.settings, "groups": list(file.groups.items())} for file in (there, self.coarse))
        if differ := ", ".join(differences(before, now)):
            say(f"'{path}' is of another computation ({differ}) and is replaced")
        else:
            self.coarse = there
            self._finished.matrices[path] = list(there.norms)

    def missing(self, title: str) -> list[str]:
        """The fields that stand for parts of a matrix that are not there yet."""
        return [name for name in self._parts if title not in getattr(self.coarse, name)]

    def computed(
        self, title: str, missing: Sequence[str], refused: dict[str, Exception] | None
    ) -> Iterator[tuple[dict[str, Any], str]]:
        """Compute what is missing of a matrix: from each part its fields, and a line about it."""
        if not missing:
            return
        earlier, start = self.coarse.costs.get(title), time.perf_counter()
        with measured(self._risk.space.device) as cost, refusals(refused, self._missed(title, missing[0])):
            operator = self._operator(title)  # which a Kronecker operator computes at once
            with operator.linearized():
                for name in missing:
                    with refusals(refused, self._missed(title, name)):
                        begin = time.perf_counter()
                        fields, products = self._parts[name](operator)
                        fields["products"] = self.coarse.products.get(title, 0) + products
                        fields["explanations"] = str(operator.explain())
                        # the peak is known at the end
                        fields["costs"] = _together(earlier, Cost(time.perf_counter() - start))
                        seconds = time.perf_counter() - begin
                        yield fields, f"{title}: {name} by {products} products, {seconds:.1f} s"
                    if title not in self.coarse.norms:
                        break  # of which all else is shown beside
        if title in self.coarse.norms:
            yield {"costs": _together(earlier, cost)}, ""

    def keep(self, title: str, fields: Mapping[str, Any]) -> None:
        """Take in, and save, fields of a matrix."""
        self.coarse = with_part(self.coarse, title, fields)
        if self._path is not None and not self._risk.ranks.rank:  # the first process writes
            save_coarse(self._path, self.coarse)
            if self._checkpoint is not None and "norms" in fields:
                Path(self._checkpoint.path).unlink(missing_ok=True)
            self._finished.matrices[self._path] = list(self.coarse.norms)

    def _missed(self, title: str, name: str) -> str:
        """What is missing where a part fails: the matrix, or that part of it."""
        return f"{title}: {PARTS[name]}" if title in self.coarse.norms else title

    def _operator(self, title: str) -> Any:
        options = operator_options(title, self.coarse.settings)
        return OPERATORS[title][0].of(self._risk, **options, memory_budget=self._memory)

    def _blocks(self, operator: Any) -> Part:
        edges = accumulate(self.coarse.groups.values(), initial=0)
        rows = {name: slice(*ends) for name, ends in zip(self.coarse.groups, pairwise(edges), strict=True)}
        options = {"num_products": self._effort.block_products, **self._common}
        try:
            found = operator.block_norms(rows, checkpoint=self._checkpoint, **options)
        except (OtherComputation, Unreadable):  # of another matrix, whose tour was ended, or damaged since
            assert self._checkpoint is not None
            Path(self._checkpoint.path).unlink()
            found = operator.block_norms(rows, checkpoint=self._checkpoint, **options)
        estimates = {"norms": found.norms, "traces": found.traces}
        fields = {name: estimate.as_subclass(Tensor) for name, estimate in estimates.items()}
        errors = {"errors": found.norms.standard_error, "trace_errors": found.traces.standard_error}
        return fields | errors, found.norms.products

    def _eigenvectors(self, operator: Any) -> Part:
        size = operator.shape[0]
        pairs = operator.eigenpairs(
            min(self._effort.eigenvalues, size),
            "largest" if operator.psd else "magnitude",
            max_products=max(self._effort.eigen_products, self._effort.eigenvalues),
            memory_budget=self._memory,
            **self._common,
        )
        order = pairs.values.abs().argsort(descending=True)
        parts = pairs.vectors.split(list(self.coarse.groups.values()))
        masses = torch.stack([part.square().sum(0) for part in parts], 1)
        fields = {"eigenvalues": pairs.values[order], "residuals": pairs.residuals[order], "masses": masses[order]}
        return {name: found.double() for name, found in fields.items()}, pairs.products

    def _density(self, operator: Any) -> Part:
        found = operator.spectral_density(
            depth=self._effort.density_depth,
            num_vectors=self._effort.density_vectors,
            memory_budget=self._memory,
            **self._common,
        )
        return {"densities": found}, found.products


def _together(*costs: Cost | None) -> Cost:
    """The cost of one computation after the other."""
    taken = [cost for cost in costs if cost is not None]
    peaks = [cost.peak_bytes for cost in taken if cost.peak_bytes is not None]
    return Cost(sum(cost.seconds for cost in taken), max(peaks) if len(peaks) == len(taken) else None)
