"""The tour of the built-in setups from beginning to end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from curvops.tour.compute import Problem, Say, Tour, compute
from curvops.tour.files import Finished, prepare_output
from curvops.tour.outputs import PAGE, draw, expected_bytes, remove_stale
from curvops.tour.setups import SIZES, digits, tutorial


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

    For each setup these files are written, each whole or not at all: `matrices.safetensors` after every matrix,
    `curvature_matrices_log_abs` and `curvature_matrices` (unaltered) as PDF and PNG, and `tour.html` at the end. The
    tutorial's are in `output` itself, those of the digits in `digits/before` and `digits/after`, on one colour domain and
    on one page, in `digits`.

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
    sizes = [side**2 * dtype.itemsize for name in setups for side in SIZES[name]]
    output = prepare_output(output, expected_bytes(sizes))
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    say(
        f"Curvature matrices of {', '.join(setups)} on {device} in {str(dtype).removeprefix('torch.')}, to '{output}'\n"
    )
    for name in setups:
        make = (lambda **options: (tutorial(**options),)) if name == "tutorial" else digits
        made = make(device=device, dtype=dtype, seed=seed)
        tours: dict[str, Tour] = {}
        for setup in made:
            say(str(setup))
            problem = Problem(setup.title, setup.risk(), setup.groups, output / setup.name)
            tour = compute(problem, seed=seed, finished=finished, say=say)
            tours[Path(setup.name).name] = tour
            say(tour.table())
        page = output / Path(made[0].name).parent / PAGE
        draw(tours, page, finished)
        written = [path for tour in tours.values() for path in tour.paths]
        remove_stale([page.parent, *(path.parent for path in written)], written, say)
        seconds = ", ".join(f"{what} {taken:.1f} s" for what, taken in next(iter(tours.values())).drawing.items())
        say(f"Beside the matrices: {seconds}")
        say(f"Figures and matrices: {', '.join(str(output / setup.name) for setup in made)}; page: {page}\n")
    return finished
