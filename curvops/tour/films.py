"""Films: the figure at several checkpoints of a training run, on one colour domain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from torch import Tensor

from curvops.files import replace_atomically
from curvops.tour.compute import Tour
from curvops.tour.figure import make_room, pixels_of, plot_matrices
from curvops.tour.files import MatrixFile
from curvops.tour.groups import Groups
from curvops.tour.outputs import common_titles
from curvops.tour.panels import ZERO, Look, Transform, dense_matrix, log_abs, shared_look
from curvops.tour.style import Width, glyphs_warned_of_once

FORMATS = ("gif", "webp", "png")


@glyphs_warned_of_once()
def film(
    stops: Mapping[str, Tour | MatrixFile] | Sequence[Tour | MatrixFile],
    path: str | Path = "film.gif",
    *,
    seconds: float = 0.8,
    dpi: int = 150,
    transform: Transform = log_abs,
    clip: float = 1.0,
    groups: Groups | None = None,
    width: Width | None = None,
) -> Path:
    """Write an animated figure that shows the stops one after the other, whole or not at all, and return its path.

    All frames have the same colours. A matrix that some stop lacks is left out.

    Args:
        stops: By label what a tour found, as of `tour_checkpoints`, or the files of `load_matrices`; a sequence is
            labelled 1, 2, ….
        path: A file that ends in `.gif`, `.webp` or `.png`.
        seconds: How long each stop is seen; the last one twice as long.
        dpi: Pixels to an inch.
        transform, clip, groups, width: As of `plot_matrices`; by default the groups are those of the first stop.

    Raises:
        TypeError: If a stop has no matrices, as those of the coarse tour.
        ValueError: If there are no stops, if they have no matrix in common, or of another size, or if the suffix is another.

    Example:
        >>> import tempfile
        >>> import torch
        >>> stops = {f"epoch {k}": MatrixFile({"Hessian": k * torch.eye(2)}) for k in (1, 10)}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with Image.open(film(stops, Path(folder) / "film.gif", dpi=50)) as picture:
        ...         picture.n_frames
        2
    """
    path = Path(path)
    kind = path.suffix.lstrip(".").lower()
    if kind not in FORMATS:
        raise ValueError(f"film: the file must end in one of {', '.join(f'.{f}' for f in FORMATS)}, got '{path.name}'.")
    files = {label: _file(label, stop) for label, stop in _labelled(stops).items()}
    frames = _frames(files)
    look = shared_look(list(frames.values()), transform=transform, clip=clip)
    groups = next(iter(files.values())).groups or None if groups is None else groups
    fig, axes = plot_matrices(next(iter(frames.values())), groups=groups, look=look, width=width)
    style: dict[str, Any] = {"va": "bottom", "fontsize": axes[0, 0].title.get_fontsize()}
    # a label is no formula, whatever it has of dollars
    caption = fig.text(axes[0, 0].get_position().x0, 0, "", parse_math=False, **style)
    axis: Text = fig._supxlabel  # type: ignore[attr-defined]  # no public way to it
    caption.set(y=axis.get_position()[1], fontfamily=axis.get_fontfamily())
    for label in frames:
        caption.set_text(label)
        make_room(fig, caption)
    pictures = []
    for label, matrices in frames.items():
        caption.set_text(label)
        for ax, (title, matrix) in zip(axes.flat, matrices.items(), strict=False):
            ax.images[0].set_data(look.shown(matrix, pixels_of(fig, axes.shape[1], len(matrix)), title))
            ax.images[0].set_interpolation("antialiased")
        pictures.append(_picture(fig, dpi))
    plt.close(fig)
    if kind == "gif":
        pictures = [_in_colors(picture, look) for picture in pictures]
    milliseconds = [round(1000 * seconds)] * (len(pictures) - 1) + [round(2000 * seconds)]
    options: dict[str, Any] = {"save_all": True, "append_images": pictures[1:], "duration": milliseconds, "loop": 0}
    if kind == "webp":
        options["lossless"] = True
    # Pillow's own writer and not matplotlib's, which goes by the suffix and gives each frame other colours
    replace_atomically(path, lambda partial: pictures[0].save(partial, format=kind, **options))
    return path


def _labelled(stops: Mapping[str, Any] | Sequence[Any]) -> dict[str, Any]:
    """The stops by label."""
    if not stops:
        raise ValueError("film: expected at least one stop, got none.")
    named = stops.items() if isinstance(stops, Mapping) else enumerate(stops, 1)
    return {str(label): stop for label, stop in named}


def _file(label: str, stop: Any) -> MatrixFile:
    file = stop.file if isinstance(stop, Tour) else stop
    if not isinstance(file, MatrixFile):
        raise TypeError(f"film: {label!r} must be a Tour or a MatrixFile with matrices, got {type(file).__name__}.")
    return file


def _frames(files: Mapping[str, MatrixFile]) -> dict[str, dict[str, Tensor]]:
    """The matrices of each stop that all stops have."""
    titles = common_titles(files)
    if not titles:
        raise ValueError(f"film: the stops {list(files)} have no matrix in common.")
    frames = {
        label: {title: dense_matrix(title, file.matrices[title]) for title in titles} for label, file in files.items()
    }
    shapes = {label: tuple(matrices[titles[0]].shape) for label, matrices in frames.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"film: the matrices of all stops must have one shape, got {shapes}.")
    return frames


def _picture(fig: Figure, dpi: int) -> Image.Image:
    buffer = BytesIO()
    fig.savefig(buffer, format="png", dpi=dpi, bbox_inches=None)
    return Image.open(buffer).convert("RGB")


def _in_colors(picture: Image.Image, look: Look) -> Image.Image:
    """The picture in the nearest of 256 colours, those of the look and grays, the same in each frame."""
    colors = look.cmap(np.arange(look.cmap.N))[:, :3]
    grays = np.linspace(0, 1, 255 - len(colors))[:, None].repeat(3, axis=1)
    palette = (255 * np.concatenate([colors, [to_rgb(ZERO)], grays])).round().astype(np.uint8)
    # not Pillow's own choice, which takes white for the gray beside it
    seen, places = np.unique(np.asarray(picture).reshape(-1, 3), axis=0, return_inverse=True)
    own, known = (torch.tensor(colors, dtype=torch.float64, device="cpu") for colors in (seen, palette))
    nearest = torch.cdist(own, known).argmin(1).numpy()
    found = Image.fromarray(nearest[places].reshape(picture.height, picture.width).astype(np.uint8))
    found.putpalette(palette.tobytes())
    return found
