"""`curvops spectrum`: eigenvalues with residuals, and the spectral density; of a small matrix exactly."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import click
import matplotlib.pyplot as plt
import torch

from curvops.cli import processes
from curvops.cli.matrices import KRONECKER, operator_of, options
from curvops.cli.problem import Problem, load_problem
from curvops.cli.results import Found, kept_or_computed, problem_settings
from curvops.cli.session import Session, json_text
from curvops.files import replace_atomically
from curvops.plots import plot_spectral_density
from curvops.spectrum import EigenPairs, SpectralDensity, Which, eigenpairs
from curvops.spectrum.choice import Choice
from curvops.spectrum.dense import DENSE
from curvops.tour.coarse_files import kept_parts
from curvops.tour.figure import save_figure
from curvops.tour.files import output_folder

ROUNDING = 10  # roundoffs of the largest |eigenvalue|: what is below is zero as far as one can tell
FROM_MATRIX, FROM_STRUCTURE = "exact, from the matrix", "exact, from the structure"
MORE_MAY_LIE = "more eigenvalues may lie here: single vectors see one of several equal ones"
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
    settings = {"k": min(5, D) if k is None else k, "which": which, "fisher_type": fisher_type, "seed": seed}
    with output_folder(session.path(output), 0, ["spectrum.json"]) as folder:
        settings |= problem_settings(problem)
        document: dict[str, Any] = {
            "problem": problem.target,
            "output": str(folder),
            "settings": settings,
            "matrices": {},
        }
        for name in matrices:
            own = options(name, seed=seed, fisher_type=fisher_type, memory=memory)
            one = _Matrix(session, folder, name, problem, own, settings, fresh)
            pairs = one.eigenpairs()
            note = _note(pairs, which, one.exact)
            session.say(_table(name, D, pairs, one.exact, note))
            document["matrices"][name] = {
                "eigenvalues": pairs.values.tolist(), "residuals": pairs.residuals.tolist(), "products": pairs.products,
                "converged": pairs.converged, "reason": pairs.reason, "method": one.exact or "Lanczos", "note": note,
            }  # fmt: skip
            found = one.density(pairs, depth, vectors) if density else None
            if found is not None and processes.is_first():
                document["matrices"][name]["density"] = _drawn(found, folder / f"{name}.density", session, one.exact)
        if not processes.is_first():
            return
        text = json_text(document)
        replace_atomically(folder / "spectrum.json", lambda partial: partial.write_text(text, encoding="utf-8"))
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
        """Made only where something is computed: the first one walks the data to be checked."""
        return operator_of(self.name, self.problem, **self.options)

    @property
    def exact(self) -> str:
        """From what all eigenvalues are known; empty where they are estimated."""
        if self.name in KRONECKER:
            return FROM_STRUCTURE
        return FROM_MATRIX if sum(p.numel() for p in self.problem.params.values()) <= DENSE else ""

    @cached_property
    def dense(self) -> EigenPairs:
        """All eigenpairs of the matrix, in double precision."""
        matrix = self.operator.to_dense().double()
        symmetric = (matrix + matrix.T) / 2  # which rounding in the operator's precision spoils
        found = eigenpairs(symmetric, len(matrix))
        residuals = (matrix @ found.vectors - found.vectors * found.values).norm(dim=0)
        return replace(found, residuals=residuals, reason=FROM_MATRIX)

    def eigenpairs(self) -> EigenPairs:
        def compute() -> Found:
            k, which = self.settings["k"], self.settings["which"]
            if self.exact == FROM_MATRIX:
                chosen = Choice(which, k, len(self.dense)).of(self.dense.values)
                found = replace(
                    self.dense,
                    values=self.dense.values[chosen],
                    vectors=self.dense.vectors[:, chosen],
                    residuals=self.dense.residuals[chosen],
                )
            else:
                found = self.operator.eigenpairs(k, which, **self._common())
            about = {name: getattr(found, name) for name in ("products", "converged", "reason")}
            return {name: getattr(found, name) for name in ("values", "vectors", "residuals")}, about

        tensors, about = self._kept("eigenvalues", {"method": self.exact or "Lanczos"}, compute)
        numbers: dict[str, Any] = {name: about[name] for name in ("products", "converged", "reason")}
        return EigenPairs(tensors["values"], tensors["vectors"], tensors["residuals"], **numbers)

    def density(self, pairs: EigenPairs, depth: int, vectors: int) -> SpectralDensity:
        def compute() -> Found:
            if self.exact:
                values = self.dense.values if self.exact == FROM_MATRIX else self.operator.eigenvalues()
                rounding = ROUNDING * torch.finfo(self.operator.dtype).eps * float(values.abs().max())
                return kept_parts(replace(SpectralDensity.of(values), rounding=rounding))
            # the places of what is deflated are taken for exact
            deflate = pairs if pairs.converged and len(pairs) < len(pairs.vectors) else None
            asked: dict[str, Any] = {"depth": depth, "num_vectors": vectors, "deflate": deflate}
            return kept_parts(self.operator.spectral_density(**asked, **self._common()))

        more: dict[str, Any] = {} if self.exact else {"depth": depth, "vectors": vectors}
        more |= {"method": self.exact or "Lanczos quadrature"}
        tensors, about = self._kept("density", more, compute)
        known: dict[str, Any] = {**about, **tensors}
        return SpectralDensity(**{f.name: known[f.name] for f in fields(SpectralDensity) if f.name in known})

    def _common(self) -> dict[str, Any]:
        memory = self.options["memory_budget"]
        return {"memory_budget": memory, "seed": self.settings["seed"], "progressbar": sys.stderr.isatty()}

    def _kept(self, what: str, more: dict[str, Any], compute: Callable[[], Found]) -> Found:
        path, settings = self.folder / f"{self.name}.{what}.safetensors", {"matrix": self.name, **self.settings, **more}
        return kept_or_computed(path, settings, compute, self.session, self.fresh, FORMATS[what])


def _note(pairs: EigenPairs, which: Which, exact: str) -> str:
    """Lanczos with one vector sees one of several equal eigenvalues, as those that rounding takes for zero are."""
    if exact or which not in ("smallest", "both") or not len(pairs):
        return ""
    rounding = ROUNDING * torch.finfo(pairs.values.dtype).eps * float(pairs.values.abs().max())
    resolved = max(rounding, float(pairs.residuals[0]))
    return MORE_MAY_LIE if abs(float(pairs.values[0])) <= resolved else ""


def _table(name: str, dim: int, pairs: EigenPairs, exact: str, note: str) -> str:
    end = "" if pairs.converged else f"; NOT converged: {pairs.reason}"
    how = exact or f"{pairs.products} products"
    lines = [
        f"{name}, {dim:,} parameter{'s' * (dim != 1)}: eigenvalues, {how}{end}",
        *([f"  below what rounding resolves: {note}"] if note else []),
        f"  {'value':>12}  {'residual':>9}",
    ]
    rows = zip(pairs.values.tolist(), pairs.residuals.tolist(), strict=True)
    return "\n".join([*lines, *(f"  {value:>12.5g}  {residual:>9.1e}" for value, residual in rows)])


def _drawn(found: SpectralDensity, stem: Path, session: Session, exact: str) -> dict[str, Any]:
    """The figure's files, and the curve's numbers."""
    axes = plot_spectral_density(found)
    figure: Any = axes.figure
    files = [str(save_figure(figure, stem.with_name(f"{stem.name}.{suffix}"))) for suffix in ("pdf", "png")]
    plt.close(figure)
    # where all eigenvalues are known, those that rounding leaves of zeros count as zeros
    edge = 2 * found.rounding if exact else 0.0
    shares = found.cumulative(torch.tensor([edge, -edge], dtype=torch.float64, device="cpu"))
    share, error = float(shares.values[0]), float(shares.errors[0])
    zeros = share - float(shares.values[1]) if exact else None
    if exact:
        said, how = f" ({zeros:.1%} are 0 up to rounding)", f"{exact}, --depth and --vectors are not used"
    else:  # there is no error from one start vector
        said = f" ± {error:.1%} (start vectors and quadrature)" if error == error else ""
        how = f"{found.products} products"
    session.say(f"  density: {share:.1%} of the eigenvalues are at most 0{said}; {how}; {files[0]}")
    curve = found.density(scale="symlog")
    return {
        "method": exact or "Lanczos quadrature", "products": found.products, "at_most_zero": share, "at_most_zero_error": error, "zero_up_to_rounding": zeros,
        "outliers": found.outliers.tolist(),
        "scale": "symlog", "points": curve.points.tolist(), "values": curve.values.tolist(), "errors": curve.errors.tolist(),
        "figures": files,
    }  # fmt: skip
