"""Batches of data: their device, size and place in the data set."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvops.tree import map_tensors, tensors_of


@dataclass(frozen=True)
class Batch:
    """One batch: inputs, targets, number of data, and the place of its first datum in the data set."""

    X: Any
    y: Any
    size: int
    start: int


class Data:
    """Data that can be walked any number of times.

    Args:
        batches: Iterable of ``(X, y)``; ``X`` is a tensor, a tuple or a mapping of tensors.
        device: Where the tensors are moved to.
        batch_size_fn: Number of data of an ``X`` whose size cannot be seen.

    Raises:
        TypeError: If ``batches`` cannot be iterated, or is an iterator that can be walked only once.
    """

    def __init__(
        self,
        batches: Iterable[tuple[Any, Any]],
        device: torch.device,
        batch_size_fn: Callable[[Any], int] | None,
    ) -> None:
        if not isinstance(batches, Iterable):
            raise TypeError(f"data: expected an iterable of batches (X, y), got {type(batches).__name__}.")
        if isinstance(batches, Iterator):
            raise TypeError(
                f"data: got a {type(batches).__name__}, which can be walked only once; "
                "curvature needs several passes. Pass a list of its batches or a DataLoader."
            )
        if isinstance(batches, (Mapping, Tensor)):
            raise TypeError(
                f"data: expected an iterable of batches (X, y), got a {type(batches).__name__}. Pass [(X, y)]."
            )
        self.batches = batches
        self._seen = False
        self.device = device
        self.batch_size_fn = batch_size_fn

    def __len__(self) -> int:
        """Number of batches, or 0 if unknown."""
        try:
            return len(self.batches)  # type: ignore[arg-type]  # not every iterable has one
        except TypeError:
            return 0

    def walk(self) -> Generator[Batch, None, None]:
        """The batches, moved to the device."""
        start = 0
        for item in self.batches:
            if not isinstance(item, (tuple, list)) or len(item) != 2:
                raise TypeError(
                    f"data: expected batches (X, y), got {_kind(item)}. "
                    "Wrap the loader so that it yields pairs, with all inputs in X (a tuple or a mapping)."
                )
            X, y = (map_tensors(self._move, part) for part in item)
            size = self.batch_size(X)
            self._check_targets(y, size)
            if size > 0:
                yield Batch(X, y, size, start)
            start += size
        if start == 0 and self._seen:
            raise TypeError(
                "data: a second pass yields nothing, so the loader can be walked only once; curvature needs several "
                "passes. Pass a list of its batches or a DataLoader."
            )
        if start == 0:
            raise ValueError("data: the loader is empty. Pass at least one batch (X, y) with one datum.")
        self._seen = True

    def batch_size(self, X: Any) -> int:
        """Number of data of an input.

        Raises:
            ValueError: If it cannot be seen and no ``batch_size_fn`` was given.
        """
        if self.batch_size_fn is not None:
            return int(self.batch_size_fn(X))
        sizes = {t.shape[0] if t.ndim else -1 for t in tensors_of(X)}
        if len(sizes) == 1 and -1 not in sizes:
            return sizes.pop()
        raise ValueError(
            f"data: cannot see the number of data of X ({_kind(X)}; first axes {sorted(sizes)}). "
            "Pass batch_size_fn=lambda X: …, for instance lambda X: X['input_ids'].shape[0]."
        )

    def _check_targets(self, y: Any, size: int) -> None:
        """A target with another number of rows tells that the first axis of X does not hold the data."""
        if self.batch_size_fn is not None or not isinstance(y, Tensor) or y.ndim == 0 or not size:
            return
        if y.shape[0] % size:
            raise ValueError(
                f"data: the first axis of X says {size} data, but the targets have shape {tuple(y.shape)}. If X has its data "
                "along another axis (a sequence first), pass batch_size_fn=lambda X: …, for instance lambda X: X.shape[1]."
            )

    def _move(self, tensor: Tensor) -> Tensor:
        tensor = tensor.to(self.device, non_blocking=True)
        return tensor.clone() if tensor.is_inference() else tensor  # autograd keeps no inference tensors


def joins(waiting: Sequence[Batch], batch: Batch, most: int) -> bool:
    """Whether a batch can be joined to others: tensors of one kind, and at most ``most`` data together."""
    return sum(b.size for b in waiting) + batch.size <= most and _alike(waiting[0], batch)


def joined_batch(several: Sequence[Batch]) -> Batch:
    """Consecutive batches as one; one alone as it is."""
    if len(several) == 1:
        return several[0]
    X, y = (torch.cat(parts) for parts in zip(*((b.X, b.y) for b in several), strict=True))
    return Batch(X, y, sum(b.size for b in several), several[0].start)


def _alike(one: Batch, other: Batch) -> bool:
    pairs = ((one.X, other.X), (one.y, other.y))
    return all(
        isinstance(a, Tensor)
        and isinstance(b, Tensor)
        and a.ndim > 0
        and b.ndim > 0
        and (a.dtype, a.shape[1:]) == (b.dtype, b.shape[1:])
        and (len(a), len(b)) == (one.size, other.size)
        for a, b in pairs
    )


def _kind(item: Any) -> str:
    if isinstance(item, Tensor):
        return f"a tensor of shape {tuple(item.shape)}"
    if isinstance(item, Mapping):
        return f"a {type(item).__name__} with keys {list(item)}"
    if isinstance(item, (tuple, list)):
        return f"a {type(item).__name__} of {len(item)}"
    return type(item).__name__
