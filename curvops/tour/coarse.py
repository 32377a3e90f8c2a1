"""The coarse tour: blocks and spectra of matrices that are too large to be formed, part by part, from products."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from curvops.memory import budget
from curvops.operators.block_diagonal import BlockDiagonalOperator
from curvops.risk.empirical_risk import EmpiricalRisk
from curvops.spectrum import SpectralDensity
from curvops.tour.coarse_files import CoarseFile, load_coarse, save_coarse, with_part
from curvops.tour.facts import facts
from curvops.tour.groups import module_groups
from curvops.tour.matrices import OPERATORS
from curvops.tour.meter import Cost, measured

MOST = 40  # groups by default, for each takes products
WIDEST = 16  # classes up to which Kronecker operators take the exact output factor, which has a column for each
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
    groups: Mapping[str, int] | int | str = "modules",
    effort: Effort = Effort(),
    mc_samples: int = 1,
    seed: int = 0,
    memory_budget: int | None = None,
    settings: Mapping[str, Any] | None = None,
    progressbar: bool = False,
    say: Say | None = None,
    refused: dict[str, Exception] | None = None,
) -> CoarseFile:
    """Compute what can be seen of curvature matrices without forming them: blocks, traces, eigenvectors, densities.

    Of the Kronecker operators all of this is exact and takes no products. The others are asked for products, G ·
    `block_products` of them for G groups and those of the spectrum, within one `linearized()`, so that batches' graphs are
    kept as far as memory allows.

    With a path, each finished part is saved there (`save_coarse`). A file of the same problem and settings is gone on
    with, and what it has is not computed again; the problem is known by its parameters' names and shapes, its risk and
    the norm of its gradient. Any other file is replaced.

    Args:
        risk: The empirical risk. Determinism is not checked.
        path: The file.
        titles: Some of `OPERATORS`, in the order in which they are computed.
        groups: Rows that belong together: ``"modules"`` for modules, of which near ones are put together until there are
            at most 40; a depth of module names, such as 1 for the model's children; ``"tensors"``; or a mapping from
            label to number of consecutive parameters (entries).
        effort: Numbers of products.
        mc_samples: Monte-Carlo samples of the MC-Fisher, and of KFAC and EKFAC where a loss term has more than 16 classes
            (their exact output factor has one column for each).
        seed: Of random vectors and Monte-Carlo samples.
        memory_budget: Bytes, half of them for kept graphs and half for the bases of eigenvectors. Default: a quarter of
            what is free. Beside them stand `block_products` vectors, and the Kronecker operators' factors.
        settings: Further facts for the file, such as ``{"setup": title}``; JSON must hold them.
        progressbar: Show products as they are taken.
        say: Takes a line for each finished part.
        refused: Takes by title what an operator raises, and the next one follows; without it, it is raised.

    Raises:
        ValueError: If a title, the groups or a number is not as described.
        OSError: If the file cannot be written.

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
    begun = CoarseFile(
        parameters=shapes,
        groups=group_sizes(groups, shapes),
        settings={**facts(risk), "seed": seed, "mc_samples": mc_samples, "effort": asdict(effort), **(settings or {})},
    )
    run = _Run(risk, begun, effort, budget(risk.space.device, memory_budget), progressbar, say or (lambda line: None))
    if path is not None:
        run.resume(Path(path))
    for title in titles:
        try:
            run.title(title)
        except Exception as error:  # whatever an operator raises on a model is what the reader of the table is told
            if refused is None:
                raise
            refused[title] = error.with_traceback(None)  # whose frames hold tensors
    return run.coarse


def group_sizes(groups: Mapping[str, int] | int | str, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Return the number of parameters of each group, in the order of the rows; see `coarse_tour`.

    Example:
        >>> group_sizes("tensors", {"0.weight": (2, 3), "0.bias": (2,)})
        {'0.weight': 6, '0.bias': 2}
    """
    sizes = {name: size for name, shape in shapes.items() if (size := math.prod(shape))}
    if groups == "modules":
        return {name: size for name, size in module_groups(shapes, most=MOST).items() if size}
    if groups == "tensors":
        return sizes
    if isinstance(groups, int) and not isinstance(groups, bool):
        return {name: size for name, size in module_groups(shapes, groups).items() if size}
    if not isinstance(groups, Mapping):
        raise ValueError(
            f"groups: expected 'modules', 'tensors', a depth or a mapping from label to size, got {groups!r}."
        )
    if any(size < 1 for size in groups.values()) or sum(groups.values()) != sum(sizes.values()):
        raise ValueError(
            f"groups: expected positive sizes that sum to the {sum(sizes.values())} parameters, got "
            f"{dict(groups)}, which sum to {sum(groups.values())}."
        )
    return dict(groups)


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
        self, risk: EmpiricalRisk, begun: CoarseFile, effort: Effort, memory: int, progressbar: bool, say: Say
    ) -> None:
        self.coarse, self._risk, self._effort, self._memory = begun, risk, effort, memory // 2
        self._progressbar, self._say = progressbar, say
        self._path: Path | None = None
        self._seed = begun.settings["seed"]
        self._parts = {"norms": self._blocks}
        if effort.eigenvalues:
            self._parts["masses"] = self._eigenvectors
        if effort.density_vectors:
            self._parts["densities"] = self._density

    def resume(self, path: Path) -> None:
        """Save to a file from now on, and go on with what is there if it is of the same problem and settings."""
        self._path = path
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            save_coarse(path, self.coarse)  # so that a folder that takes no files is known before anything is computed
            return
        there = load_coarse(path)
        differs = _difference(there, self.coarse)
        if differs:
            self._say(f"'{path}' is of another computation ({differs}) and is replaced")
        else:
            self.coarse = there

    def title(self, title: str) -> None:
        """Compute what is missing of a matrix."""
        missing = [name for name in self._parts if title not in getattr(self.coarse, name)]
        if not missing:
            self._say(f"{title}: in the file already, not computed again")
            return
        known, start = self.coarse.costs.get(title), time.perf_counter()
        with measured(self._risk.space.device) as cost:
            operator = self._operator(title)  # which a Kronecker operator computes at once
            with operator.linearized():
                for name in missing:
                    begin = time.perf_counter()
                    found, products = self._parts[name](operator)
                    found["products"] = self.coarse.products.get(title, 0) + products
                    found["explanations"] = str(operator.explain())
                    # the peak is known at the end
                    found["costs"] = _together(known, Cost(time.perf_counter() - start))
                    self._keep(title, found)
                    self._say(f"{title}: {name} by {products} products, {time.perf_counter() - begin:.1f} s")
        self._keep(title, {"costs": _together(known, cost)})

    def _keep(self, title: str, found: dict[str, Any]) -> None:
        self.coarse = with_part(self.coarse, title, found)
        if self._path is not None:
            save_coarse(self._path, self.coarse)

    def _operator(self, title: str) -> Any:
        options = operator_options(title, self.coarse.settings)
        return OPERATORS[title][0].of(self._risk, **options, memory_budget=self._memory)

    def _blocks(self, operator: Any) -> Part:
        edges = accumulate(self.coarse.groups.values(), initial=0)
        rows = {name: slice(*ends) for name, ends in zip(self.coarse.groups, pairwise(edges), strict=True)}
        found = operator.block_norms(
            rows, num_products=self._effort.block_products, seed=self._seed, progressbar=self._progressbar
        )
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
            seed=self._seed,
            progressbar=self._progressbar,
        )
        order = pairs.values.abs().argsort(descending=True)
        parts = pairs.vectors.split(list(self.coarse.groups.values()))
        masses = torch.stack([part.square().sum(0) for part in parts], 1)
        fields = {"eigenvalues": pairs.values[order], "residuals": pairs.residuals[order], "masses": masses[order]}
        return {name: found.double() for name, found in fields.items()}, pairs.products

    def _density(self, operator: Any) -> Part:
        if isinstance(operator, BlockDiagonalOperator):
            return {"densities": SpectralDensity.of(operator.eigenvalues())}, 0
        found = operator.spectral_density(
            depth=self._effort.density_depth,
            num_vectors=self._effort.density_vectors,
            memory_budget=self._memory,
            seed=self._seed,
            progressbar=self._progressbar,
        )
        return {"densities": found}, found.products


def _together(*costs: Cost | None) -> Cost:
    """The cost of one computation after the other."""
    taken = [cost for cost in costs if cost is not None]
    peaks = [cost.peak_bytes for cost in taken if cost.peak_bytes is not None]
    return Cost(sum(cost.seconds for cost in taken), max(peaks) if len(peaks) == len(taken) else None)


def _difference(there: CoarseFile, here: CoarseFile) -> str:
    """In what the problem or the settings of two computations differ; empty where in nothing."""
    for name in ("parameters", "groups"):
        if list(getattr(there, name).items()) != list(getattr(here, name).items()):
            return f"other {name}"
    for name in there.settings.keys() | here.settings.keys():
        before, now = there.settings.get(name), json.loads(json.dumps(here.settings.get(name)))
        # summed by other numbers of threads, they are not the same to the last digit
        close = name in ("risk", "gradient_norm") and before is not None and math.isclose(before, now, rel_tol=1e-5)
        if before != now and not close:
            return f"{name}: {before!r} there, {now!r} here"
    return ""
