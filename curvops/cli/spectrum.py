"""`curvops spectrum`: eigenvalues with residuals, and the spectral density."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import click
import torch

from curvops.cli.matrices import OPERATORS, options
from curvops.cli.problem import Problem, load_problem
from curvops.cli.results import Found, kept_or_computed
from curvops.cli.session import Session, json_text
from curvops.files import replace_atomically
from curvops.plots import plot_spectral_density
from curvops.spectrum import EigenPairs, SpectralDensity, Which
from curvops.tour.figure import save_figure
from curvops.tour.files import prepare_output

FORMATS = {"eigenvalues": "eigenpairs", "density": "spectral density"}


def run(
    session: Session, *, target: str, matrices: list[str], k: int | None, which: Which, density: bool, depth: int,
    vectors: int, fisher_type: str, output: str, fresh: bool, seed: int, memory: int | None, **given: Any,
) -> None:  # fmt: skip
    """Compute, print, draw and keep; what is there with the same settings is not computed again."""
    problem = load_problem(target, seed=seed, **given)
    D = sum(p.numel() for p in problem.params.values())
    if k is not None and k > D:
        raise click.UsageError(f"-k: the matrix has {D:,} eigenvalues, one for each parameter; got {k:,}")
    folder = prepare_output(output, 0)
    settings = {"k": min(5, D) if k is None else k, "which": which, "fisher_type": fisher_type, "seed": seed}
    settings |= problem.fingerprint()
    document: dict[str, Any] = {"problem": problem.target, "output": str(folder), "settings": settings, "matrices": {}}
    for name in matrices:
        own = options(name, problem, seed=seed, fisher_type=fisher_type, memory=memory)
        one = _Matrix(session, folder, name, problem, own, settings, fresh)
        pairs = one.eigenpairs()
        session.say(_table(name, D, pairs))
        document["matrices"][name] = {
            "eigenvalues": pairs.values.tolist(), "residuals": pairs.residuals.tolist(), "products": pairs.products,
            "converged": pairs.converged, "reason": pairs.reason,
        }  # fmt: skip
        if density:
            found = one.density(pairs, depth, vectors)
            document["matrices"][name]["density"] = _drawn(found, folder / f"{name}.density", session)
    text = json_text(document)
    replace_atomically(folder / "spectrum.json", lambda partial: partial.write_text(text))
    session.answer(document)


@dataclass
class _Matrix:
    """One matrix's results, in files of its own."""

    session: Session
    folder: Path
    name: str
    problem: Problem
    options: dict[str, Any]
    settings: dict[str, Any]
    fresh: bool

    @cached_property
    def operator(self) -> Any:
        """Made only where something is computed: it walks the data to be checked."""
        return OPERATORS[self.name](*self.problem.arguments, **self.options)

    def eigenpairs(self) -> EigenPairs:
        def compute() -> Found:
            found = self.operator.eigenpairs(self.settings["k"], self.settings["which"], **self._common())
            about = {name: getattr(found, name) for name in ("products", "converged", "reason")}
            return {name: getattr(found, name) for name in ("values", "vectors", "residuals")}, about

        tensors, about = self._kept("eigenvalues", {}, compute)
        numbers: dict[str, Any] = {name: about[name] for name in ("products", "converged", "reason")}
        return EigenPairs(tensors["values"], tensors["vectors"], tensors["residuals"], **numbers)

    def density(self, pairs: EigenPairs, depth: int, vectors: int) -> SpectralDensity:
        def compute() -> Found:
            # the places of what is deflated are taken for exact
            deflate = pairs if pairs.converged and len(pairs) < len(pairs.vectors) else None
            asked: dict[str, Any] = {"depth": depth, "num_vectors": vectors, "deflate": deflate}
            found = self.operator.spectral_density(**asked, **self._common())
            tensors = {name: getattr(found, name) for name in ("nodes", "weights", "outliers")}
            return tensors, {"dim": found.dim, "products": found.products}

        tensors, about = self._kept("density", {"depth": depth, "vectors": vectors}, compute)
        return SpectralDensity(**tensors, dim=about["dim"], products=about["products"])

    def _common(self) -> dict[str, Any]:
        memory = self.options["memory_budget"]
        return {"memory_budget": memory, "seed": self.settings["seed"], "progressbar": sys.stderr.isatty()}

    def _kept(self, what: str, more: dict[str, Any], compute: Callable[[], Found]) -> Found:
        path, settings = self.folder / f"{self.name}.{what}.safetensors", {"matrix": self.name, **self.settings, **more}
        return kept_or_computed(path, settings, compute, self.session, self.fresh, FORMATS[what])


def _table(name: str, dim: int, pairs: EigenPairs) -> str:
    end = "" if pairs.converged else f"; NOT converged: {pairs.reason}"
    lines = [
        f"{name}, {dim:,} parameters: eigenvalues, {pairs.products} products{end}",
        f"  {'value':>12}  {'residual':>9}",
    ]
    rows = zip(pairs.values.tolist(), pairs.residuals.tolist(), strict=True)
    return "\n".join([*lines, *(f"  {value:>12.5g}  {residual:>9.1e}" for value, residual in rows)])


def _drawn(found: SpectralDensity, stem: Path, session: Session) -> dict[str, Any]:
    """The figure's files, and the curve's numbers."""
    axes = plot_spectral_density(found)
    figure: Any = axes.figure
    files = [str(save_figure(figure, stem.with_name(f"{stem.name}.{suffix}"))) for suffix in ("pdf", "png")]
    below = found.cumulative(torch.zeros(1, dtype=torch.float64))
    share, error = float(below.values), float(below.errors)
    known = f" ± {error:.1%}" if error == error else ""  # there is none from one start vector
    session.say(
        f"  density: {share:.1%}{known} of the eigenvalues are at most 0; {found.products} products; {files[0]}"
    )
    curve = found.density(scale="symlog")
    return {
        "products": found.products, "at_most_zero": share, "at_most_zero_error": error, "outliers": found.outliers.tolist(),
        "scale": "symlog", "points": curve.points.tolist(), "values": curve.values.tolist(), "errors": curve.errors.tolist(),
        "figures": files,
    }  # fmt: skip
