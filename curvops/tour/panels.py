"""What was asked to be drawn, checked and brought into one form: matrices, groups of parameters, panels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any, TypeAlias

import torch
from torch import Tensor

Transform: TypeAlias = Callable[[Tensor], Tensor]
Groups: TypeAlias = Mapping[str, int] | Sequence[int]


def named_matrices(matrices: Mapping[str, Any] | Sequence[Any], titles: Sequence[str] | None) -> dict[str, Tensor]:
    """Return the matrices as tensors on the CPU, by title."""
    values = list(matrices.values()) if isinstance(matrices, Mapping) else list(matrices)
    if not values:
        raise ValueError("plot_matrices: expected at least one matrix, got none.")
    if titles is None and not isinstance(matrices, Mapping):
        raise ValueError(
            "plot_matrices: a sequence of matrices needs titles=[…], or pass a mapping from title to matrix."
        )
    titles = list(matrices if titles is None else titles)
    if len(titles) != len(values):
        raise ValueError(
            f"plot_matrices: expected one title for each of the {len(values)} matrices, got {len(titles)}: {titles}."
        )
    if len(set(titles)) != len(titles):
        raise ValueError(f"plot_matrices: the titles must differ, got {titles}.")
    return {title: _dense(value, title) for title, value in zip(titles, values, strict=True)}


def _dense(value: Any, title: str) -> Tensor:
    dense = value.to_dense() if hasattr(value, "to_dense") else None  # tensors have it, too
    if not isinstance(dense, Tensor):
        raise TypeError(
            f"plot_matrices: {title!r} must be a tensor or an operator with to_dense(), got {type(value).__name__}."
        )
    dense = dense.detach().cpu()
    return dense if dense.dtype in (torch.float32, torch.float64) else dense.double()


def side_of(named: Mapping[str, Tensor]) -> int:
    """Return the number of rows of all matrices, which must be square and free of NaN."""
    shapes = {title: tuple(matrix.shape) for title, matrix in named.items()}
    first = next(iter(shapes.values()))
    if len(first) != 2 or first[0] != first[1] or first[0] == 0 or len(set(shapes.values())) > 1:
        raise ValueError(f"plot_matrices: expected square matrices of one shape, got {shapes}.")
    for title, matrix in named.items():
        if matrix.isnan().any():
            raise ValueError(f"plot_matrices: {title!r} has {int(matrix.isnan().sum())} entries that are NaN.")
    return first[0]


def edges_of(groups: Groups | None, side: int) -> tuple[list[str], list[int]]:
    """Return the labels of the non-empty groups, and where each begins and the last one ends."""
    if groups is None:
        return [], [0, side]
    sizes = list(groups.values()) if isinstance(groups, Mapping) else list(groups)
    if any(size < 0 for size in sizes) or sum(sizes) != side:
        raise ValueError(f"plot_matrices: the group sizes {sizes} sum to {sum(sizes)}, the matrices have {side} rows.")
    kept = [size for size in sizes if size]
    numbers = [str(k + 1) for k in range(len(kept))]
    labels = [label for label, size in groups.items() if size] if isinstance(groups, Mapping) else numbers
    return labels, list(accumulate(kept, initial=0))


def grid_of(number: int, rows: int | None, columns: int | None) -> tuple[int, int]:
    """Return rows and columns of panels that hold this many matrices."""
    columns = columns or (math.ceil(number / rows) if rows else min(number, 3))
    rows = rows or math.ceil(number / columns)
    if rows < 1 or columns < 1 or rows * columns < number:
        raise ValueError(f"plot_matrices: {number} matrices do not fit into {rows} x {columns} panels.")
    return rows, columns


def transformed(transform: Transform, matrix: Tensor, title: str) -> Tensor:
    """Return what is drawn of a matrix."""
    image = transform(matrix)
    if not isinstance(image, Tensor) or image.shape != matrix.shape:
        came = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(
            f"plot_matrices: transform must keep the shape {tuple(matrix.shape)}, got {came} for {title!r}."
        )
    if image.isnan().any():
        raise ValueError(f"plot_matrices: transform makes {int(image.isnan().sum())} entries of {title!r} NaN.")
    return image
