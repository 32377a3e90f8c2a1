"""Batches of data: their device, size and place in the data set."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from curvops.tree import map_tensors, select, tensors_of

EMPTY = "data: the loader is empty. Pass at least one batch (X, y) with one datum."
_SEVERAL = "curvature needs several passes. Pass a list of its batches or a DataLoader."


@dataclass(frozen=True)
class Batch:
    """One batch: inputs, targets, number of data, and the place of its first datum in the data set.

    One that is ``silent`` adds nothing: a process that has no more data takes part with it in what all of them do.
    """

    X: Any
    y: Any
    size: int
    start: int
    silent: bool = False


class Data:
    """Batches ``(X, y)`` on a device, which can be walked any number of times.

    ``X`` is a tensor, a tuple or a mapping of tensors; ``batch_size_fn`` gives its number of data where that cannot be
    seen. A TypeError if ``batches`` cannot be iterated, or only once. A ``share`` of a data set may be empty.
    """

    def __init__(
        self,
        batches: Iterable[tuple[Any, Any]],
        device: torch.device,
        batch_size_fn: Callable[[Any], int] | None,
        share: bool = False,
    ) -> None:
        if not isinstance(batches, Iterable) or isinstance(batches, (Mapping, Tensor, str)) or _is_pair(batches):
            raise TypeError(
                f"data: expected an iterable of batches (X, y), got {_kind(batches)}. {_as_batches(batches)}"
            )
        if isinstance(batches, Iterator):
            raise TypeError(f"data: got a {type(batches).__name__}, which can be walked only once; {_SEVERAL}")
        self.batches, self.device, self.batch_size_fn, self.share = batches, device, batch_size_fn, share
        self._seen = False

    def __len__(self) -> int:
        """Number of batches, or 0 if unknown."""
        try:
            return len(self.batches)  # type: ignore[arg-type]  # not every iterable has one
        except TypeError:
            return 0

    def walk(self, start: int = 0) -> Generator[Batch, None, None]:
        """The batches, moved to the device; the first datum has the place ``start`` in the whole data set."""
        place = start
        for item in self.batches:
            if not isinstance(item, (tuple, list)) or len(item) != 2:
                raise TypeError(f"data: expected batches (X, y), got {_kind(item)}. {_as_pairs(item)}")
            X, y = (map_tensors(self._move, part) for part in item)
            size = self._size(X, y)
            if size > 0:
                yield Batch(X, y, size, place)
            place += size
        if place == start and self._seen:
            raise TypeError(f"data: a second pass yields nothing, so the loader can be walked only once; {_SEVERAL}")
        if place == start and not self.share:
            raise ValueError(EMPTY)
        self._seen = place > start

    def _size(self, X: Any, y: Any) -> int:
        """Number of data of a batch."""
        if self.batch_size_fn is not None:
            return int(self.batch_size_fn(X))
        if isinstance(X, PackedSequence):
            return int(X.batch_sizes[0])
        sizes = {t.shape[0] if t.ndim else -1 for t in tensors_of(X)}
        if len(sizes) != 1 or -1 in sizes:
            seen = f"first axes {sorted(sizes)}" if sizes else "it has no tensors"
            raise ValueError(
                f"data: cannot see the number of data of X ({_kind(X)}; {seen}). Pass {'' if sizes else 'tensors, or '}"
                "batch_size_fn=lambda X: …, for instance lambda X: X['input_ids'].shape[0]."
            )
        (size,) = sizes
        if isinstance(y, Tensor) and y.ndim > 0 and size > 0 and y.shape[0] % size:
            raise ValueError(
                f"data: the first axis of X says {size} data, but the targets have shape {tuple(y.shape)}. If X has its data "
                "along another axis (a sequence first), pass batch_size_fn=lambda X: …, for instance lambda X: X.shape[1]."
            )
        return size

    def _move(self, tensor: Tensor) -> Tensor:
        # a copy: a loader may write the next batch over this one, and autograd keeps no inference tensors
        return tensor.to(self.device, copy=True)


def moved(batch: Batch, device: torch.device) -> Batch:
    """A batch on another device."""
    X, y = (map_tensors(lambda tensor: tensor.to(device), part) for part in (batch.X, batch.y))
    return replace(batch, X=X, y=y)


def cut_batch(batch: Batch, data: slice) -> Batch:
    """Consecutive data of a batch that has them along the first axis of its tensors."""
    X, y = (select(part, batch.size, data) for part in (batch.X, batch.y))
    places = range(batch.size)[data]
    return Batch(X, y, len(places), batch.start + (places[0] if places else 0))


def joins(waiting: Sequence[Batch], batch: Batch, most: int) -> bool:
    """Whether a batch can be joined to others: tensors of one kind, and at most ``most`` data together."""
    first = waiting[0]
    return sum(b.size for b in waiting) + batch.size <= most and all(
        isinstance(a, Tensor)
        and isinstance(b, Tensor)
        and min(a.ndim, b.ndim) > 0
        and (a.dtype, a.shape[1:]) == (b.dtype, b.shape[1:])
        and (len(a), len(b)) == (first.size, batch.size)
        for a, b in ((first.X, batch.X), (first.y, batch.y))
    )


def joined_batch(several: Sequence[Batch]) -> Batch:
    """Consecutive batches as one; one alone as it is."""
    if len(several) == 1:
        return several[0]
    X, y = torch.cat([b.X for b in several]), torch.cat([b.y for b in several])
    return Batch(X, y, sum(b.size for b in several), several[0].start)


def _is_pair(batches: Any) -> bool:
    """Whether this is one batch (X, y), and not an iterable of such."""
    if not isinstance(batches, (tuple, list)) or len(batches) != 2:
        return False
    return isinstance(batches[0], (Tensor, Mapping)) and isinstance(batches[1], Tensor)


def _as_batches(batches: Any) -> str:
    """How to make an iterable of batches of what came in its place."""
    if _is_pair(batches):
        return "This is one batch: pass it in a list, [(X, y)]."
    if isinstance(batches, Mapping):
        return f"If this is one batch, pass {_pair(batches)} in a list."
    if hasattr(batches, "__getitem__") and hasattr(batches, "__len__") and not isinstance(batches, (Tensor, str)):
        return "If this is a data set, pass torch.utils.data.DataLoader(dataset, batch_size=64)."
    return "Pass [(X, y)]."


def _as_pairs(item: Any) -> str:
    """How to make pairs of the batches that came in their place."""
    if isinstance(item, Mapping):
        return f"Pass pairs: [{_pair(item)} for batch in loader]; the model is called as model(X) with the mapping X."
    if isinstance(item, (tuple, list)) and len(item) > 2:
        names = ", ".join("abcdefgh"[: len(item) - 1])
        few = len(item) <= 9
        pairs = f"[(({names}), y) for {names}, y in loader]" if few else "[(tuple(inputs), y) for *inputs, y in loader]"
        return f"If the last one is the targets, pass {pairs}; the model is called as model(X) with the tuple X."
    if isinstance(item, (tuple, list)) and len(item) == 1:
        return "There are no targets: pass [(X, y)], or [(X, None)] to an operator without a loss, such as a Jacobian."
    return "Wrap the loader so that it yields pairs, with all inputs in X (a tuple or a mapping)."


def _pair(batch: Mapping[Any, Any]) -> str:
    """Code that takes a mapping of inputs and targets apart."""
    key = next((key for key in ("labels", "label", "targets", "target", "y") if key in batch), "labels")
    return f"({{k: v for k, v in batch.items() if k != {key!r}}}, batch[{key!r}])"


def _kind(item: Any) -> str:
    if isinstance(item, Tensor):
        return f"a tensor of shape {tuple(item.shape)}"
    if isinstance(item, Mapping):
        return f"a {type(item).__name__} with keys {list(item)}"
    if isinstance(item, (tuple, list)):
        return f"a {type(item).__name__} of {len(item)}" + (
            " tensors" if all(isinstance(t, Tensor) for t in item) else ""
        )
    return type(item).__name__
