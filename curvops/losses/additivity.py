"""Whether a loss is a sum over data, in a batch and between batches, and what its mean divides by."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvops.losses.noise import Noise
from curvops.losses.scalar import ScalarLoss
from curvops.tree import map_tensors, tensors_of

FEW = 4  # data of a batch that stand for it
# what a loss may raise on data that are cut or joined otherwise than it expects
_UNFIT = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError)


@dataclass(frozen=True)
class _Piece:
    """Some data: outputs, targets, their number, and which tensors of the targets run over the data.

    Attributes:
        along: One truth value for each tensor; `None` where the targets are a list with an item for each datum.
    """

    z: Tensor
    y: Any
    size: int
    along: tuple[bool, ...] | None


@dataclass(frozen=True)
class _Measured:
    value: Tensor
    slope: Tensor  # of the value in the outputs
    read: dict[Tensor, Tensor]  # the slopes in other tensors that the loss reads, such as parameters


class Additivity:
    """The checks of one pass over the data.

    A few data of each batch are compared with the whole batch, and joined to a few of the
    first batch. The loss's gradient at these few must not depend on what else is in the
    batch: a mean that divides by tokens instead of data shows there, and so does any
    mixing of data. (Equal for a few and the rest in each batch, and for the few of any
    two batches, the divisor per datum is the same everywhere.)

    Args:
        loss: The loss.
        total: Maps (output, target, number of data) to the sum of the loss over data.
    """

    def __init__(self, loss: ScalarLoss, total: Callable[[Tensor, Any, int], Tensor]) -> None:
        self._loss = loss
        self._total = total
        self._reduction, self._averaging = loss.reduction()
        self._counts = self._reduction == "mean" and loss.switchable
        self._assumes_data = self._reduction == "mean" and not loss.switchable
        self._batches = 0
        self._first: _Piece | None = None

    def check(self, z: Tensor, y: Any, batch_size: int) -> float:
        """Look at the next batch.

        Args:
            z: The model's output, without a graph.
            y: Targets.
            batch_size: Number of data.

        Returns:
            This batch's share of what the mean divides by.

        Raises:
            ValueError: If the loss is not additive, or nothing can be seen where it has to be.
        """
        whole = _piece(z, y, batch_size)
        parts = _split(whole, min(FEW, batch_size // 2))
        few = parts[0] if parts else whole if batch_size == 1 else None
        if parts:
            self._expect_sum(whole, *parts, within=True)
        self._batches += 1
        if self._batches == 1:
            self._first = few and _copied(few)
        else:
            seen = False
            if self._first and few:
                joined = _join(self._first, few)
                seen = joined is not None and self._expect_sum(joined, self._first, few, within=False)
            if self._assumes_data and not seen:
                raise ValueError(
                    f"{self._loss.name!r} with reduction='mean': the batches cannot be joined (this one has an output of "
                    f"shape {tuple(z.shape)} for {batch_size} data), so it cannot be seen whether the loss's mean weighs "
                    "batches by their numbers of data, as assumed, or by something else, such as tokens. "
                    "Pass a function that sums over data, with reduction='sum', and scale it yourself; reduction= says "
                    "what the function does."
                )
        if not self._counts:
            return float(batch_size)
        if few:
            self._denominator(few, independent=True)
        count = self._denominator(whole, independent=few is None)
        if count is None:
            raise ValueError(
                f"{self._loss.name!r}: its sum and its mean over a batch do not tell what it divides by. "
                "Pass a function with reduction='sum'."
            )
        return count

    def _expect_sum(self, whole: _Piece, few: _Piece, rest: _Piece, within: bool) -> bool:
        """Raise where the loss of some data is not the sum of the losses of their two parts.

        Returns:
            Whether it could be seen.
        """
        together = self._measure(whole) if within else None
        try:
            together = together or self._measure(whole)
            differ = self._differ(together, whole, few, rest)
        except torch.OutOfMemoryError:
            raise
        except _UNFIT:
            return False
        if differ:
            raise ValueError(
                f"{self._loss.name!r} with reduction={self._reduction!r}: the loss of "
                f"{'a batch' if within else 'two batches joined'} is not the "
                f"{'sum' if self._loss.switchable else self._reduction} of the losses of its data. It mixes data, or "
                "divides by something else than their number (class weights, ignored targets, tokens), or adds "
                "something that does not belong to a datum. Pass a function that sums over data, with reduction='sum', "
                "and scale it yourself; or, if the loss of one datum contains it all, one that averages over data, "
                "with reduction='mean'."
            )
        return True

    def _differ(self, together: _Measured, whole: _Piece, few: _Piece, rest: _Piece) -> bool:
        eps = torch.finfo(whole.z.dtype).eps
        part = self._measure(few)
        if together.read or part.read:
            other = self._measure(rest)
        else:
            with torch.no_grad():
                other = _Measured(self._total(rest.z, rest.y, rest.size), rest.z, {})
        values = part.value, other.value
        size = together.value.abs() + sum(v.abs() for v in values)
        # a comparison with nan counts as equal: nothing can be said
        if bool((together.value - sum(values)).abs() > eps**0.5 * size):
            return True
        for tensor in {**together.read, **part.read, **other.read}:
            slopes = [each.read.get(tensor) for each in (part, other)]
            if _unequal(together.read.get(tensor), *slopes):
                return True
        mine, own = together.slope[: len(few.z)] if few.z.ndim else together.slope, part.slope
        if not mine.any() and not own.any():  # a perfect fit: the curvature tells
            mine, own = self._measure(whole, True).slope[: len(few.z)], self._measure(few, True).slope
        if _unequal(mine, own):
            return True
        if not self._counts:
            return False
        count, *shares = (self._denominator(piece) for piece in (whole, few, rest))
        known = [share for share in shares if share is not None]
        return count is not None and len(known) == 2 and abs(count - sum(known)) > eps**0.5 * sum(known)

    def _measure(self, piece: _Piece, curvature: bool = False) -> _Measured:
        """The total of some data, and its slope in the outputs, or the output Hessian times a fixed vector."""
        with torch.enable_grad():
            z = piece.z.detach().requires_grad_()
            value = self._total(z, piece.y, piece.size)
            if not value.requires_grad:
                return _Measured(value, torch.zeros_like(z), {})
            tensors = [z, *_read(value, z)]
            slope, *slopes = torch.autograd.grad(
                value, tensors, retain_graph=len(tensors) > 1, create_graph=curvature, materialize_grads=True
            )
            if curvature and slope.requires_grad:
                row = Noise(0, 0).normal(z[:1].numel(), 1, 1, device=z.device).to(z).reshape(z[:1].shape)
                (slope,) = torch.autograd.grad(slope, z, row.expand(z.shape), retain_graph=True, materialize_grads=True)
        return _Measured(value.detach(), slope.detach(), dict(zip(tensors[1:], slopes, strict=True)))

    def _denominator(self, piece: _Piece, independent: bool = False) -> float | None:
        """Divide the loss with "sum" by that with "mean"; `None` if they do not tell.

        Args:
            piece: Some data.
            independent: Expect that it does not depend on the output, or on what the loss reads.
        """
        z = piece.z.detach().double()
        # where the loss vanishes (a perfect fit) the ratio is sought at other outputs
        elsewhere = Noise(0, 0).uniform(z.numel(), 1, 1, device=z.device).reshape(z.shape)
        for output in (z, elsewhere):
            with torch.set_grad_enabled(independent):
                output = output.requires_grad_(independent)
                total, mean = (self._loss.evaluate(output, piece.y, each) for each in ("sum", self._averaging))
            if total != 0 and mean != 0 and torch.isfinite(total / mean):
                if independent and total.requires_grad and mean.requires_grad:
                    self._expect_constant(total, mean, [output, *_read(total, output)])
                return float((total / mean).detach())
            if total == 0 and mean.isnan():
                return 0.0  # every target is ignored
        return None

    def _expect_constant(self, total: Tensor, mean: Tensor, tensors: list[Tensor]) -> None:
        """Raise where what the mean divides by depends on some tensors."""
        slopes = [torch.autograd.grad(t, tensors, retain_graph=True, materialize_grads=True) for t in (total, mean)]
        for whole, part in zip(*slopes, strict=True):
            if _unequal(whole, part * (total / mean).detach()):
                raise ValueError(
                    f"{self._loss.name!r}: what its mean divides by depends on the model's output or on tensors that "
                    "require gradients, such as trained weights. Pass a function with reduction='sum'."
                )


def _unequal(a: Tensor | None, *parts: Tensor | None) -> bool:
    """Whether a tensor is not the sum of others; `None` is zero."""
    known = [t for t in parts if t is not None]
    if a is None:
        a = torch.zeros_like(known[0])
    difference, scale = a - sum(known), max(float(torch.linalg.vector_norm(t, torch.inf)) for t in (a, *known))
    tolerance = 500 * torch.finfo(a.dtype).eps
    return bool((difference.abs() > tolerance * scale).any())


def _read(value: Tensor, z: Tensor) -> list[Tensor]:
    """The tensors besides z that a value depends on and that require gradients: the leaves of its graph."""
    found, seen, waiting = [], set(), [value.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor) and leaf is not z:
            found.append(leaf)
        waiting.extend(following for following, _ in node.next_functions)
    return found


def _piece(z: Tensor, y: Any, size: int) -> _Piece:
    axes = (size, len(z)) if z.ndim else ()
    along = tuple(t.ndim > 0 and len(t) in axes for t in tensors_of(y))
    return _Piece(z, y, size, None if isinstance(y, (list, tuple)) and len(y) == size and not any(along) else along)


def _split(piece: _Piece, few: int) -> tuple[_Piece, _Piece] | None:
    """A few data and the rest, if it can be seen how outputs and targets are cut."""
    z, y, size, along = piece.z, piece.y, piece.size, piece.along
    if size < 2 or not z.numel() or len(z) % size:
        return None
    if along is not None and not (_is_understood(y, size) and (any(along) or not any(t.ndim for t in tensors_of(y)))):
        return None

    def part(start: int, stop: int) -> _Piece:
        def cut(t: Tensor, is_along: bool) -> Tensor:
            return t[start * len(t) // size : stop * len(t) // size] if is_along else t

        flags = iter(along or ())
        targets = y[start:stop] if along is None else map_tensors(lambda t: cut(t, next(flags)), y)
        return _Piece(cut(z, True), targets, stop - start, along)

    return part(0, few), part(few, size)


def _is_understood(y: Any, size: int) -> bool:
    """Whether nothing but tensors can run over the data."""
    if isinstance(y, Mapping):
        return all(_is_understood(part, size) for part in y.values())
    if isinstance(y, (list, tuple)):
        per_datum = len(y) == size and not any(t.ndim for t in tensors_of(y))
        return not per_datum and all(_is_understood(part, size) for part in y)
    return y is None or isinstance(y, (Tensor, bool, int, float, str))


def _join(a: _Piece, b: _Piece) -> _Piece | None:
    """The data of two pieces as one, if their outputs and targets fit each other."""
    pairs = list(zip(tensors_of(a.y), tensors_of(b.y), strict=False))
    if a.along != b.along or a.z.shape[1:] != b.z.shape[1:] or not (a.z.ndim and b.z.ndim):
        return None
    size, z = a.size + b.size, torch.cat([a.z, b.z])
    if a.along is None:
        return _Piece(z, a.y + b.y, size, None) if type(a.y) is type(b.y) else None
    joined = []
    for (one, other), along in zip(pairs, a.along, strict=True):
        if one.shape[along:] != other.shape[along:] or one.dtype != other.dtype:
            return None
        if not along and not torch.equal(one, other):
            return None
        joined.append(torch.cat([one, other]) if along else one)
    try:
        same = bool(map_tensors(lambda _: None, a.y) == map_tensors(lambda _: None, b.y))
    except ValueError:  # arrays have no truth value
        return None
    tensors = iter(joined)
    return _Piece(z, map_tensors(lambda _: next(tensors), a.y), size, a.along) if same else None


def _copied(piece: _Piece) -> _Piece:
    """A piece that holds no batch, and that a loader cannot overwrite."""
    return _Piece(piece.z.clone(), map_tensors(Tensor.clone, piece.y), piece.size, piece.along)
