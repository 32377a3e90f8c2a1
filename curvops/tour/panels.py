"""What a panel of the figure shows: matrices as images, exact zeros apart, and the colours that all panels share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from matplotlib import colormaps
from matplotlib.colors import Colormap
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

Transform: TypeAlias = Callable[[Tensor], Tensor]
Matrices: TypeAlias = Mapping[str, Any] | Sequence[Any]

SEQUENTIAL, DIVERGING = "magma_r", "RdBu_r"  # in both maps little ink means a small entry, also in grey
ZERO = "#c9d6df"  # cool and light: no colour of these maps, and told from their palest in grey, too
LEVELS = 128  # as many colours as an eye tells apart; more would only make the files larger
EPSILON = 1e-6


def log_abs(matrix: Tensor, epsilon: float = EPSILON) -> Tensor:
    """Return log10 of the absolute entries, clamped from below at `epsilon`.

    Example:
        >>> import torch
        >>> log_abs(torch.tensor([[100.0, -1.0], [0.0, 1e-3]])).tolist()
        [[2.0, 0.0], [-6.0, -3.0]]
    """
    return matrix.abs().clamp(min=epsilon).log10()


def unchanged(matrix: Tensor) -> Tensor:
    """Return the matrix as it is."""
    return matrix


@dataclass(frozen=True)
class Look:
    """How entries become colours, the same in all panels: transformation, colour domain and what lies outside of it.

    Made by `shared_look`. `below` and `above` say whether the colour bar ends in arrows there, `zeros` whether exact zeros
    have a colour of their own, and `some_zeros` whether there are any.
    """

    transform: Transform
    title: str
    lower: float
    upper: float
    cmap: Colormap
    below: bool
    above: bool
    zeros: bool
    some_zeros: bool

    @property
    def extend(self) -> str:
        """The ends of the colour bar that are arrows, in matplotlib's words."""
        return ("neither", "min", "max", "both")[int(self.below) + 2 * int(self.above)]

    def shown(self, matrix: Tensor, pixels: int | None, title: str = "") -> npt.NDArray[Any]:
        """The image `[D, D]` of a matrix, or `[pixels, pixels]` averaged to so many; exact zeros are masked."""
        image, zero = image_of(matrix, self.transform, title), self.zeros & (matrix == 0)
        if pixels is not None and len(image) > pixels:
            image, zero = _averaged(image, zero, pixels)
        return np.ma.array(image.numpy(), mask=zero.numpy())


def shared_look(
    frames: Sequence[Mapping[str, Tensor]],
    *,
    transform: Transform = log_abs,
    transform_title: str | None = None,
    signed: bool | None = None,
    limits: tuple[float, float] | None = None,
    clip: float = 1.0,
    cmap: str | None = None,
    zeros: bool | None = None,
) -> Look:
    """Return the look that several sets of matrices by title share; the arguments are those of `plot_matrices`.

    Example:
        >>> import torch
        >>> before, after = {"A": torch.eye(2)}, {"A": 100 * torch.eye(2)}
        >>> look = shared_look([before, after])
        >>> look.lower, look.upper, look.some_zeros
        (0.0, 2.0, True)
    """
    named = [(title, dense_matrix(title, matrix)) for frame in frames for title, matrix in frame.items()]
    if not named:
        raise ValueError("shared_look: expected at least one matrix, got none.")
    epsilon = _clamp_of(transform)
    zeros = epsilon is not None if zeros is None else zeros
    # infinite entries do not count for the domain
    images = [image_of(m, transform, title).masked_fill(zeros & (m == 0), float("inf")) for title, m in named]
    if signed is None:
        first = named[0][1]
        signed = bool((transform(-first) == -transform(first)).all())
    if transform_title is None:
        known = "Unaltered matrix entries" if transform is unchanged else ""
        transform_title = known if epsilon is None else "Logarithmic absolute entries, $\\log_{10}$"
    lower, upper = limits or color_domain(images, signed=signed, clip=clip)
    clamped = epsilon is not None and any(bool(((m.abs() < epsilon) & (m != 0)).any()) for _, m in named)
    inside = [part for image in images if (part := image[image != float("inf")] if zeros else image).numel()]
    lowest = min((float(part.min()) for part in inside), default=lower)
    highest = max((float(part.max()) for part in inside), default=upper)
    # an odd number of colours has one in the middle, for zero
    colors = colormaps[cmap or (DIVERGING if signed else SEQUENTIAL)].resampled(LEVELS + 1 if signed else LEVELS)
    return Look(
        transform,
        transform_title,
        lower,
        upper,
        colors.with_extremes(bad=ZERO),
        below=clamped or lowest < lower,
        above=highest > upper,
        zeros=zeros,
        some_zeros=zeros and any(bool((m == 0).any()) for _, m in named),
    )


def color_domain(images: Sequence[Tensor], *, signed: bool, clip: float = 1.0) -> tuple[float, float]:
    """Return the ends of a colour domain for all images together.

    Infinite entries do not count. Where `signed`, the domain is centred on zero. `clip` is the share of the entries that
    lie inside: by magnitude where `signed`, else from below.

    Raises:
        ValueError: If `clip` is not in (0, 1].
    """
    if not 0 < clip <= 1:
        raise ValueError(f"color_domain: clip must be in (0, 1], got {clip}.")
    entries = np.concatenate([image[image.isfinite()].numpy().ravel() for image in images])
    if not entries.size:
        return -0.5, 0.5
    if signed:
        upper = float(np.quantile(abs(entries), clip)) or float(abs(entries).max())
        lower = -upper
    else:
        lower, upper = float(entries.min()), float(np.quantile(entries, clip))
    return (lower, upper) if lower < upper else (lower - 0.5, upper + 0.5)


def named_matrices(matrices: Any, titles: Sequence[str] | str | None = None) -> dict[str, Tensor]:
    """Return the matrices as tensors on the CPU, by title; they are square, of one shape and free of NaN.

    A single tensor `[D, D]` or operator has the title of its kind, or none.
    """
    single = hasattr(matrices, "to_dense") and getattr(matrices, "ndim", 2) == 2
    if single and titles is None:
        titles = [str(getattr(matrices, "name", None) or "").replace("LinearOperator", "")]
    titles = [titles] if isinstance(titles, str) else titles
    if not isinstance(matrices, (Mapping, Sequence, Tensor)) and not single:
        raise TypeError(
            "plot_matrices: expected a matrix, a mapping from title to matrix, or a sequence of them with titles=[…], got "
            f"{type(matrices).__name__}."
        )
    given = [matrices] if single else list(matrices.values() if isinstance(matrices, Mapping) else matrices)
    if not given:
        raise ValueError("plot_matrices: expected at least one matrix, got none.")
    if titles is None and not isinstance(matrices, Mapping):
        raise ValueError(
            "plot_matrices: a sequence of matrices needs titles=[…], or pass a mapping from title to them."
        )
    titles = list(matrices if titles is None else titles)
    if len(titles) != len(given):
        raise ValueError(
            f"plot_matrices: expected one title for each of the {len(given)} matrices, got {len(titles)}: {titles}."
        )
    if len(set(titles)) != len(titles):
        raise ValueError(f"plot_matrices: the titles must differ, got {titles}.")
    named = {title: dense_matrix(title, value) for title, value in zip(titles, given, strict=True)}
    shapes = {title: tuple(matrix.shape) for title, matrix in named.items()}
    first = next(iter(shapes.values()))
    if len(first) != 2 or first[0] != first[1] or first[0] == 0 or len(set(shapes.values())) > 1:
        raise ValueError(f"plot_matrices: expected square matrices of one shape, got {shapes}.")
    for title, matrix in named.items():
        if matrix.isnan().any():
            raise ValueError(f"plot_matrices: {title!r} has {int(matrix.isnan().sum())} entries that are NaN.")
    return named


def image_of(matrix: Tensor, transform: Transform, title: str) -> Tensor:
    """Return the transformed matrix; a ValueError if its shape is another one, or if entries have become NaN."""
    image = transform(matrix)
    came = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
    if came != tuple(matrix.shape):
        raise ValueError(
            f"plot_matrices: transform must keep the shape {tuple(matrix.shape)}, got {came} for {title!r}."
        )
    if image.isnan().any():
        raise ValueError(f"plot_matrices: transform makes {int(image.isnan().sum())} entries of {title!r} NaN.")
    return image


def dense_matrix(title: str, value: Any) -> Tensor:
    """Return a tensor or an operator as a tensor on the CPU, in single or double precision."""
    dense = value.to_dense() if hasattr(value, "to_dense") else None  # tensors have it, too
    if not isinstance(dense, Tensor):
        raise TypeError(
            f"plot_matrices: {title!r} must be a tensor or an operator with to_dense(), got {type(value).__name__}."
        )
    dense = dense.detach().cpu()
    return dense if dense.dtype in (torch.float32, torch.float64) else dense.double()


def _averaged(image: Tensor, zero: Tensor, pixels: int) -> tuple[Tensor, Tensor]:
    """The mean of each pixel's entries that are not masked; a pixel is masked if all its entries are."""
    seen = (~zero).to(image.dtype)
    share = adaptive_avg_pool2d(seen[None], pixels)[0]
    mean = adaptive_avg_pool2d(image.masked_fill(zero, 0)[None], pixels)[0]
    return mean / share.clamp(min=torch.finfo(image.dtype).tiny), share == 0


def _clamp_of(transform: Transform) -> float | None:
    """The entry below which a logarithm is cut, None for any other transformation."""
    if transform is log_abs:
        return EPSILON
    if isinstance(transform, partial) and transform.func is log_abs:
        return float(transform.keywords.get("epsilon", EPSILON))
    return None
