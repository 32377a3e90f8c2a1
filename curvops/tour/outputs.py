"""What a tour leaves to look at: figures and the page, of one problem or of several on one colour domain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from torch import Tensor

from curvops.tour.coarse_files import CoarseFile
from curvops.tour.compute import Finished, Tour
from curvops.tour.figure import plot_matrices, save_figure
from curvops.tour.files import MatrixFile
from curvops.tour.matrices import OPERATORS
from curvops.tour.page import write_page
from curvops.tour.panels import Look, log_abs, shared_look, unchanged

# of the unaltered entries within the colour domain; a handful of large ones would leave the rest blank
UNALTERED_SHARE = 0.99
FIGURES_BYTES = 12_000_000  # both figures of a problem, generously
PAGE = "tour.html"
PAGE_BYTES = 8_000_000  # of a page, without its matrices


def draw(tours: Mapping[str, Tour], page: Path, finished: Finished, *, title: str | None = None) -> None:
    """Write the figures of each tour beside its file, and one page of all, between which a slider moves; it has this title.

    Each tour's `paths` take its own figures and the page.
    """
    written = _figures(tours, finished)
    titles = common_titles(tours)
    write_page(page, {label: with_titles(tour.file, titles) for label, tour in tours.items()}, title=title)
    finished.figures.append(page)
    for label, tour in tours.items():
        tour.paths += [*written[label], page]


def expected_bytes(matrices: Sequence[int]) -> int:
    """Bytes of the files of tours whose matrices have so many each, while they are written."""
    files = len(OPERATORS) * sum(matrices)
    # the largest file is written beside the one it replaces, and the page has matrices as text
    return files + len(OPERATORS) * max(matrices) + files * 4 // 3 + (FIGURES_BYTES + PAGE_BYTES) * len(matrices)


def looks(frames: list[Mapping[str, Tensor]]) -> dict[str, Look]:
    """How the two figures show several sets of matrices by title, by the figure's name."""
    label = f"Unaltered matrix entries ({UNALTERED_SHARE:.0%} within the colours)"
    clipped: dict[str, Any] = {"transform": unchanged, "clip": UNALTERED_SHARE, "transform_title": label}
    return {
        "curvature_matrices_log_abs": shared_look(frames, transform=log_abs),
        "curvature_matrices": shared_look(frames, **clipped),
    }


def common_titles(tours: Mapping[str, Tour]) -> list[str]:
    """The titles that all tours have, in the order of the first one."""
    first, *others = tours.values()
    return [title for title in first.matrices if all(title in tour.matrices for tour in others)]


def _figures(tours: Mapping[str, Tour], finished: Finished) -> dict[str, list[Path]]:
    written: dict[str, list[Path]] = {label: [] for label in tours}
    dense = {label: tour for label, tour in tours.items() if isinstance(tour.file, MatrixFile)}
    if not dense:
        return written
    for stem, look in looks([tour.matrices for tour in dense.values()]).items():
        for label, tour in dense.items():
            fig, _ = plot_matrices(tour.matrices, groups=tour.groups, look=look)
            for suffix in ("pdf", "png"):
                path = save_figure(fig, tour.paths[0].parent / f"{stem}.{suffix}")
                written[label].append(path)
                finished.figures.append(path)
            plt.close(fig)
    return written


def with_titles(file: MatrixFile | CoarseFile, titles: list[str]) -> MatrixFile | CoarseFile:
    """A file with some of its matrices only; all stops of a page must have the same."""
    if isinstance(file, CoarseFile) or list(file.matrices) == titles:
        return file
    some = {title: file.matrices[title] for title in titles}
    return MatrixFile(some, file.parameters, file.groups, file.settings, file.versions, file.costs, file.explanations)
