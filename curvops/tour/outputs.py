"""What a tour leaves to look at: figures and the page, of one problem or of several on one colour domain."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from curvops.tour.block_figure import complete_titles, plot_blocks, plot_spectra
from curvops.tour.coarse_files import CoarseFile
from curvops.tour.compute import BLOCKS, MATRICES, Say, Tour, shown
from curvops.tour.figure import plot_matrices, save_figure
from curvops.tour.files import Finished, MatrixFile
from curvops.tour.matrices import OPERATORS
from curvops.tour.page import write_page
from curvops.tour.panels import Look, log_abs, shared_look, unchanged
from curvops.tour.style import glyphs_warned_of_once

# of the unaltered entries within the colour domain; a handful of large ones would leave the rest blank
UNALTERED_SHARE = 0.99
FIGURES_BYTES = 12_000_000  # both figures of a problem, generously
PAGE, FILM = "tour.html", "film.gif"
FIGURES = ("curvature_matrices_log_abs", "curvature_matrices", "curvature_blocks", "curvature_spectra")
# all that a tour may draw into a folder
DRAWN = (PAGE, FILM, *(f"{stem}.{suffix}" for stem in FIGURES for suffix in ("pdf", "png")))
PAGE_BYTES = 8_000_000  # of a page, without its matrices


def draw(
    tours: Mapping[str, Tour], page: Path, finished: Finished, *, title: str | None = None, progressbar: bool = True
) -> None:
    """Write the figures of each tour beside its file, and one page of all, between which a slider moves; it has this title.

    Each tour's `paths` take its own figures and the page, and its `drawing` the seconds of both.
    """
    steps = 2 * len(tours) + 1  # each tour has two figures
    with tqdm(total=steps, desc="Figures, page", file=sys.stderr, disable=not shown(progressbar), leave=False) as bar:
        start = time.perf_counter()
        written = _figures(tours, finished, bar.update)
        seconds = {"figures": time.perf_counter() - start}
        start = time.perf_counter()
        bar.set_postfix_str(page.name)
        titles = common_titles(tours)
        write_page(page, {label: with_titles(tour.file, titles) for label, tour in tours.items()}, title=title)
        seconds["page"] = time.perf_counter() - start
    finished.figures.append(page)
    for label, tour in tours.items():
        tour.paths += [*written[label], page]
        tour.drawing |= seconds


def remove_stale(folders: Iterable[Path], written: Iterable[Path], say: Say) -> None:
    """Remove what an earlier tour of another kind has drawn into folders, and name its numbers, which may have taken long."""
    kept = {path.resolve() for path in written}

    def stale(names: Sequence[str]) -> list[Path]:
        there = [folder / name for folder in dict.fromkeys(folders) for name in names]
        return [path for path in there if path.is_file() and path.resolve() not in kept]

    drawn, numbers = stale(DRAWN), stale((MATRICES, BLOCKS))
    for path in drawn:
        path.unlink()
    if drawn:
        say(f"removed, as drawn by an earlier tour: {', '.join(map(str, drawn))}")
    if numbers:
        say(f"of an earlier tour, and left there: {', '.join(map(str, numbers))}")


def expected_bytes(matrices: Sequence[int]) -> int:
    """Bytes of the files of tours whose matrices have so many each, while they are written."""
    files = len(OPERATORS) * sum(matrices)
    # the largest file is written beside the one it replaces, and the page has matrices as text
    return files + len(OPERATORS) * max(matrices) + files * 4 // 3 + (FIGURES_BYTES + PAGE_BYTES) * len(matrices)


def looks(frames: Sequence[Mapping[str, Tensor]]) -> dict[str, Look]:
    """How the two figures show several sets of matrices by title, by the figure's name."""
    label = f"Unaltered matrix entries ({UNALTERED_SHARE:.0%} within the colours)"
    clipped: dict[str, Any] = {"transform": unchanged, "clip": UNALTERED_SHARE, "transform_title": label}
    return {
        "curvature_matrices_log_abs": shared_look(frames, transform=log_abs),
        "curvature_matrices": shared_look(frames, **clipped),
    }


def common_titles(tours: Mapping[str, Tour | MatrixFile]) -> list[str]:
    """The titles that all tours or files have, in the order of the first one."""
    first, *others = tours.values()
    return [title for title in first.matrices if all(title in tour.matrices for tour in others)]


@glyphs_warned_of_once()
def _figures(tours: Mapping[str, Tour], finished: Finished, step: Callable[[], Any]) -> dict[str, list[Path]]:
    """Write the figures of all tours; return their files by label."""
    frames = [tour.matrices for tour in tours.values() if isinstance(tour.file, MatrixFile)]
    shared = looks(frames) if frames else {}
    written: dict[str, list[Path]] = {}
    for label, tour in tours.items():
        folder, written[label] = tour.paths[0].parent, []
        for stem, draw in _drawings(tour, shared).items():
            fig, _ = draw()
            for suffix in ("pdf", "png"):
                written[label].append(save_figure(fig, folder / f"{stem}.{suffix}"))
                finished.figures.append(written[label][-1])
            plt.close(fig)
            step()
    return written


def _drawings(tour: Tour, shared: Mapping[str, Look]) -> dict[str, Callable[[], tuple[Figure, Any]]]:
    """What draws each figure of a tour, by the figure's name."""
    file = tour.file
    if isinstance(file, CoarseFile):
        found: dict[str, Callable[[], tuple[Figure, Any]]] = {"curvature_blocks": partial(plot_blocks, file)}
        return found | ({"curvature_spectra": partial(plot_spectra, file)} if complete_titles(file) else {})
    return {stem: partial(plot_matrices, file.matrices, groups=file.groups, look=look) for stem, look in shared.items()}


def with_titles(file: MatrixFile | CoarseFile, titles: list[str]) -> MatrixFile | CoarseFile:
    """A file with some of its matrices only; all stops of a page must have the same."""
    if isinstance(file, CoarseFile) or list(file.matrices) == titles:
        return file
    return replace(file, matrices={title: file.matrices[title] for title in titles})
