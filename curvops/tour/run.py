"""The tour from beginning to end: setups, matrices, table, figures and files."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from tqdm import tqdm

from curvops.risk.determinism import check_deterministic
from curvops.tour.figure import plot_matrices, save_figure
from curvops.tour.files import prepare_output, save_matrices
from curvops.tour.matrices import OPERATORS, Measured, each_matrix, warm_up
from curvops.tour.meter import Cost, measured
from curvops.tour.panels import color_domain, log_abs, unchanged
from curvops.tour.setups import SIZES, Setup, digits, tutorial

MATRICES = "matrices.safetensors"
# of the unaltered entries within the colour domain; a handful of large ones would leave the rest blank
UNALTERED_SHARE = 0.99
Say: TypeAlias = Callable[[str], None]
_FIGURE_BYTES = 12_000_000  # both figures of a setup, generously


@dataclass
class Finished:
    """What a tour has written so far: by file the titles of the matrices in it, and the figures' files."""

    matrices: dict[Path, list[str]] = field(default_factory=dict)
    figures: list[Path] = field(default_factory=list)

    def __str__(self) -> str:
        kept = [f"{', '.join(titles)} in {path}" for path, titles in self.matrices.items()]
        kept += [f"{len(self.figures)} figures"] * bool(self.figures)
        return "; ".join(kept) or "nothing"


def run_tour(
    output: str | Path = "tour",
    *,
    setups: Sequence[str] = tuple(SIZES),
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    finished: Finished | None = None,
    say: Say = print,
) -> Finished:
    """Compute, tabulate, draw and keep the six matrices of each setup; return what was written.

    For each setup these files are written, each whole or not at all: `matrices.safetensors` after every matrix, and
    `curvature_matrices_log_abs` and `curvature_matrices` (unaltered) as PDF and PNG at the end. The tutorial's are in
    `output` itself, those of the digits in `digits/before` and `digits/after`, on one colour domain.

    The output folder is made if it is missing. The setups are some of `setups.SIZES`. Without a device, a GPU computes if
    there is one. The seed is that of data, weights and Monte-Carlo samples. `finished` is filled in while the tour runs,
    for a caller that may be interrupted, and `say` takes the lines that are printed.

    Raises:
        OutputError: If the output folder cannot take the files; then nothing was computed.
        ValueError: If a setup is unknown.
    """
    if not setups or any(name not in SIZES for name in setups):
        raise ValueError(f"run_tour: setups must be some of {list(SIZES)}, got {list(setups)}.")
    finished = finished if finished is not None else Finished()
    sizes = [len(OPERATORS) * side**2 * dtype.itemsize for name in setups for side in SIZES[name]]
    # the largest one twice: it is written beside the one it replaces
    output = prepare_output(output, sum(sizes) + max(sizes) + _FIGURE_BYTES * len(sizes))
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    warm_up(device, dtype)
    for name in setups:
        make = (lambda **options: (tutorial(**options),)) if name == "tutorial" else digits
        made = make(device=device, dtype=dtype, seed=seed)
        results = [_compute(setup, output / setup.name, seed, finished, say) for setup in made]
        _draw(made, results, output, finished)
        say(f"Figures and matrices: {', '.join(str(output / setup.name) for setup in made)}\n")
    return finished


def _compute(setup: Setup, folder: Path, seed: int, finished: Finished, say: Say) -> dict[str, Tensor]:
    say(str(setup))
    folder.mkdir(parents=True, exist_ok=True)
    path, done, matrices = folder / MATRICES, [], {}
    shapes = {name: tuple(p.shape) for name, p in setup.params.items()}
    settings = {"setup": setup.title, "seed": seed, "device": str(setup.device), "layers": list(setup.layers)}
    risk = setup.risk()
    with measured(setup.device) as check:
        check_deterministic(risk)
    titles = list(OPERATORS)
    with tqdm(total=len(titles), desc="Matrices", postfix=titles[0], file=sys.stderr, disable=None, leave=False) as bar:
        for result in each_matrix(risk, seed=seed):
            done.append(result)
            matrices[result.title] = result.matrix.cpu()
            save_matrices(
                path,
                matrices,
                parameters=shapes,
                groups=setup.groups,
                settings=settings,
                costs={one.title: one.cost for one in done},
                explanations={one.title: one.explanation for one in done},
            )
            finished.matrices[path] = list(matrices)
            bar.update()
            bar.set_postfix_str("".join(titles[len(done) : len(done) + 1]))
    say(_table(check, done, "GPU tensors" if setup.device.type == "cuda" else "process"))
    return matrices


def _table(check: Cost, results: Sequence[Measured], memory: str) -> str:
    hessian = next((r.matrix for r in results if r.title == "Hessian"), None)
    header = f"{'matrix':<26}{'seconds':>9}{f'peak MB ({memory})':>24}{'trace':>11}{'off Hessian':>13}"
    lines = [header, f"{'(determinism check)':<26}{_cells(check)}"]
    for result in results:
        off = "" if hessian is None else f"{float((result.matrix - hessian).norm() / hessian.norm()):.1%}"
        lines.append(f"{result.title:<26}{_cells(result.cost)}{float(result.matrix.trace()):>11.4g}{off:>13}")
    return "\n".join([*lines, f"{'all':<26}{check.seconds + sum(result.cost.seconds for result in results):>9.3f}"])


def _cells(cost: Cost) -> str:
    peak = "unknown" if cost.peak_bytes is None else f"{cost.peak_bytes / 1e6:.1f}"
    return f"{cost.seconds:>9.3f}{peak:>24}"


def _draw(setups: Sequence[Setup], results: Sequence[dict[str, Tensor]], output: Path, finished: Finished) -> None:
    everything = [matrix for matrices in results for matrix in matrices.values()]
    logarithms = color_domain([log_abs(matrix) for matrix in everything], signed=False)
    unaltered = color_domain(everything, signed=True, clip=UNALTERED_SHARE)
    label = f"Unaltered matrix entries ({UNALTERED_SHARE:.0%} within the colours)"
    looks: dict[str, dict[str, Any]] = {
        "curvature_matrices_log_abs": {"transform": log_abs, "limits": logarithms},
        "curvature_matrices": {"transform": unchanged, "limits": unaltered, "transform_title": label},
    }
    for setup, matrices in zip(setups, results, strict=True):
        for stem, look in looks.items():
            fig, _ = plot_matrices(matrices, groups=setup.groups, **look)
            for suffix in ("pdf", "png"):
                finished.figures.append(save_figure(fig, output / setup.name / f"{stem}.{suffix}"))
            plt.close(fig)
