"""Whether a loss is a sum over data, in a batch and between batches, and what its mean divides by."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from curvops.context import UNFIT
from curvops.losses.autodiff import AutodiffCurvature
from curvops.losses.base import ClosedForm, OutputCurvature
from curvops.losses.noise import Noise
from curvops.losses.scalar import ScalarLoss
from curvops.tree import map_tensors, nodes_of, tensors_of

FEW = 4  # data of a batch that stand for it


@dataclass(frozen=True)
class _Piece:
    """Some data; `runs` says which tensors of the targets run over them, `None` that they are a list of an item each."""

    z: Tensor
    y: Any
    size: int
    runs: tuple[bool, ...] | None


class LossWalk:
    """One pass over the data, on which the count of a mean is summed; made by `OutputLoss.walk`.

    Where it is not known that the loss is a sum over data, a few data of each batch are compared with the whole batch,
    and joined to a few of the first batch. The loss's gradient at these few must not depend on what else is in the
    batch: a mean that divides by tokens instead of data shows there, and so does any mixing of data. Where it is equal
    for a few and the rest of each batch, and for the few of any two batches, the mean weighs all data alike.
    """

    def __init__(self, loss: ScalarLoss, curvature: Callable[[Tensor, Any, int], OutputCurvature]) -> None:
        self._loss, self._curvature = loss, curvature
        self._reduction, self._averaging = loss.reduction()
        self._counts = loss.switchable and self._reduction == "mean"
        self.count, self._batches = 0.0, 0  # what a mean over the data so far divides by; batches that were compared
        self._first: _Piece | None = None
        # whether a loss of one's own couples the positions of a datum, once that was asked
        self._coupled: bool | None = None

    def curvature(self, z: Tensor, y: Any, batch_size: int, whole: bool = False) -> OutputCurvature:
        """See `OutputLoss.curvature`; a ValueError too if the data's loss is seen not to be the sum of their losses.

        A batch is one datum as a ``whole`` where the caller says so of one with several rows.
        """
        found = self._curvature(z, y, batch_size)
        if isinstance(found, AutodiffCurvature):
            found.noted = self._note
        if not isinstance(found, ClosedForm):
            self.count += self._share(_piece(z.detach().to(found.dtype), y, batch_size), whole)
        elif self._reduction == "mean":
            self.count += found.count
        return found

    def _note(self, coupled: bool) -> None:
        """A ValueError where the terms of one batch are whole data, and those of another are not."""
        if self._coupled is not None and self._coupled != coupled:
            raise ValueError(
                f"{self._loss.name!r}: it couples what the output of a datum consists of in some batches only, as where a mask is zero, "
                "so that its terms would be of two kinds. Put such data in each batch: larger or shuffled ones."
            )
        self._coupled = coupled

    @property
    def progress(self) -> tuple[float, int, bool | None]:
        """The count so far, how many batches were compared, and of which kind terms are, to go on from with `resume`."""
        return self.count, self._batches, self._coupled

    def resume(self, count: float, batches: int, coupled: bool | None) -> None:
        """Go on from an earlier pass's progress; batches on which the latter had changed first have been asked again."""
        self.count, self._batches, self._coupled = count, batches, coupled

    @property
    def first(self) -> tuple[int, Any, bool | None]:
        """How many batches of this pass had to be compared with each other, a few data of the first, and the terms' kind."""
        return self._batches, self._first, self._coupled

    def compare(self, others: Sequence[tuple[int, Any, bool | None]]) -> None:
        """Compare passes over several shares of the data, this one among them, as batches are compared."""
        pieces = [piece for batches, piece, _ in others if batches]
        for coupled in (coupled for *_, coupled in others if coupled is not None):
            self._note(coupled)
        if self._batches and pieces[0] is not self._first:
            self._check_pair(pieces[0], self._first)

    def constant(self, count: float | None = None) -> float:
        """The factor c in front of the sum over all data; a ValueError where PyTorch's mean is 0/0.

        The ``count`` of all shares, where this pass saw one of several.
        """
        if self._reduction == "sum":
            return 1.0
        count = self.count if count is None else count
        if count <= 0:
            raise ValueError(
                f"loss: the mean runs over {count:g} entries (all targets ignored, or all weights zero), so it "
                'is undefined. Use targets that count, or reduction="sum".'
            )
        return 1.0 / count

    def _share(self, whole: _Piece, alone: bool) -> float:
        """Check a batch, and compute its share of what "mean" divides by."""
        few = whole if whole.size == 1 else None
        if not self._loss.known:
            if parts := _split(whole, min(FEW, whole.size // 2)):
                few = parts[0]
                self._expect_sum(whole, *parts)
            # a sum over batches that are data as a whole: with rows of another one it would be another datum
            if not (alone and self._reduction == "sum"):
                self._check_between(whole, few)
        if not self._counts:
            return float(whole.size)
        if not self._loss.known:
            self._ratio(few or whole, independent=True)
        if (count := self._ratio(whole)) is None:
            raise ValueError(
                f"{self._loss.name!r}: its sum and its mean over a batch do not tell what it divides by. "
                "Pass a function with reduction='sum'."
            )
        return count

    def _check_between(self, whole: _Piece, few: _Piece | None) -> None:
        self._batches += 1
        if self._batches == 1:
            # copied: it holds no batch, and a loader may overwrite its own
            self._first = few and replace(few, z=few.z.clone(), y=map_tensors(Tensor.clone, few.y))
        else:
            self._check_pair(self._first, few, whole)

    def _check_pair(self, first: _Piece | None, few: _Piece | None, whole: _Piece | None = None) -> None:
        seen = bool(first and few and self._expect_sum(None, first, few))
        if not seen and self._reduction == "mean" and not self._loss.switchable:
            of = whole or few
            shape = f" (this one has an output of shape {tuple(of.z.shape)} for {of.size} data)" if of else ""
            raise ValueError(
                f"{self._loss.name!r} with reduction='mean': the batches cannot be compared{shape}, so it cannot be seen whether "
                "the loss weighs batches by their numbers of data, as reduction='mean' says, or by something else, such as tokens. "
                "Pass a function that sums over the data, with reduction='sum', and scale it yourself."
            )

    def _expect_sum(self, whole: _Piece | None, few: _Piece, rest: _Piece) -> bool:
        """Raise where the loss of a batch, or of two pieces joined, is not the sum of its parts'; whether it was seen."""
        together = None if whole is None else self._measure(whole)  # what fails on a whole batch is the caller's to see
        try:
            joined = whole or _join(few, rest)
            differ = joined and self._differ(joined, few, rest, together)
        except torch.OutOfMemoryError:
            raise
        except UNFIT:
            return False
        if differ:
            raise ValueError(
                f"{self._loss.name!r} with reduction={self._reduction!r}: the loss of "
                f"{'a batch' if whole else 'two batches joined'} is not the "
                f"{'sum' if self._loss.switchable else self._reduction} of the losses of its data. It mixes data, or "
                "divides by something else than their number (class weights, ignored targets, tokens), or adds "
                "something that belongs to no datum. PyTorch's own losses tell what they divide by: nn.CrossEntropyLoss(weight=w) or "
                "functools.partial(F.cross_entropy, weight=w). Else pass a function that sums over the data, with reduction='sum', "
                "and scale it yourself; or one that averages over the data, to which a regulariser may be added, with "
                "reduction='mean' (of a module that does so whatever its attribute says: lambda z, y: loss(z, y)). A loss of a "
                "whole batch (contrastive, ranking) has a Hessian if each batch is one datum: batch_size_fn=lambda X: 1, with reduction='sum'."
            )
        return differ is False

    def _differ(
        self, whole: _Piece, few: _Piece, rest: _Piece, together: "_Measured | None", moved: bool = False
    ) -> bool | None:
        """Whether a total is not the sum of its parts', or `None` if that cannot be seen."""
        value, slope, read = together or self._measure(whole)
        part, own, part_read = self._measure(few)
        if read or part_read:
            other, _, other_read = self._measure(rest)
        else:
            with torch.no_grad():
                other, other_read = self._loss.total(rest.z, rest.y, rest.size), {}
        if not (part + other).isfinite() and whole.z.isfinite().all():
            return None  # such as the mean of data that are masked as a whole
        # a comparison with nan counts as equal: nothing can be said
        size = value.abs() + part.abs() + other.abs()
        if bool((value - part - other).abs() > torch.finfo(value.dtype).eps ** 0.5 * size):
            return True
        if any(_unequal(read.get(t), part_read.get(t), other_read.get(t)) for t in {**read, **part_read, **other_read}):
            return True
        slope = slope[: len(own)] if own.ndim else slope
        if not moved and not slope.any() and not own.any():
            # a perfect fit, or beyond a margin: other outputs tell
            few, rest = _elsewhere(few), _elsewhere(rest)
            return self._differ(replace(whole, z=torch.cat([few.z, rest.z])), few, rest, None, True)
        counts = [self._ratio(piece) for piece in (whole, few, rest)] if self._counts else []
        known = [count for count in counts if count is not None]
        return _unequal(slope, own) or (len(known) == 3 and abs(known[0] - known[1] - known[2]) > 1e-8 * known[0])

    def _measure(self, piece: _Piece) -> "_Measured":
        with torch.enable_grad():
            z = piece.z.detach().requires_grad_()
            value = self._loss.total(z, piece.y, piece.size)
            if not value.requires_grad:
                return value, torch.zeros_like(z), {}
            read = _read(value, z)
            slope, *slopes = torch.autograd.grad(value, [z, *read], retain_graph=bool(read), materialize_grads=True)
        return value.detach(), slope, dict(zip(read, slopes, strict=True))

    def _ratio(self, piece: _Piece, independent: bool = False) -> float | None:
        """The denominator, or `None` if it cannot be told; where asked, expect that nothing moves it."""
        double = replace(piece, z=piece.z.detach().double())
        # where the loss vanishes (a perfect fit) the ratio is sought at other outputs
        for z in (double.z, _elsewhere(double).z):
            with torch.set_grad_enabled(independent):
                z.requires_grad_(independent)
                total, mean = (self._loss.evaluate(z, piece.y, each) for each in ("sum", self._averaging))
            count = (total / mean).detach()
            if count != 0 and count.isfinite():
                if independent and total.requires_grad and mean.requires_grad:
                    tensors = [z, *_read(total, z)]
                    slopes = torch.autograd.grad(total, tensors, retain_graph=True, materialize_grads=True)
                    scaled = torch.autograd.grad(mean, tensors, count, retain_graph=True, materialize_grads=True)
                    if any(_unequal(a, b) for a, b in zip(slopes, scaled, strict=True)):
                        raise ValueError(
                            f"{self._loss.name!r}: what its mean divides by depends on the model's output or on tensors "
                            "that require gradients, such as trained weights. Pass a function with reduction='sum'."
                        )
                return float(count)
            if total == 0 and mean.isnan():
                return 0.0  # every target is ignored
        return None


# value, its slope in the output, and its slopes in other tensors that the loss reads, such as parameters
_Measured = tuple[Tensor, Tensor, dict[Tensor, Tensor]]


def _unequal(a: Tensor | None, *parts: Tensor | None) -> bool:
    """Whether a tensor is not the sum of others; `None` is zero."""
    known = [t for t in parts if t is not None]
    a = torch.zeros_like(known[0]) if a is None else a
    scale = max(float(torch.linalg.vector_norm(t, torch.inf)) for t in (a, *known))
    return bool(((a - sum(known)).abs() > 500 * torch.finfo(a.dtype).eps * scale).any())


def _read(value: Tensor, z: Tensor) -> list[Tensor]:
    """The tensors besides z that a value depends on and that require gradients: the leaves of its graph."""
    leaves = (getattr(node, "variable", None) for node in nodes_of(value))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf is not z]


def _elsewhere(piece: _Piece) -> _Piece:
    """The piece at outputs from (0, 1)."""
    z = Noise(0, 0).uniform(piece.z.numel(), 1, 1, device=piece.z.device).reshape(piece.z.shape)
    return replace(piece, z=z.to(piece.z.dtype))


def _runs(y: Any, z: Tensor, size: int) -> tuple[bool, ...]:
    return tuple(t.ndim > 0 and len(t) in (size, *z.shape[:1]) for t in tensors_of(y))


def _piece(z: Tensor, y: Any, size: int) -> _Piece:
    runs = _runs(y, z, size)
    return _Piece(z, y, size, None if isinstance(y, (list, tuple)) and len(y) == size and not any(runs) else runs)


def _split(piece: _Piece, few: int) -> tuple[_Piece, _Piece] | None:
    """A few data and the rest, if it can be seen how outputs and targets are cut."""
    y, size, runs = piece.y, piece.size, piece.runs
    seen = runs is None or (_is_plain(piece, y) and (any(runs) or not any(t.ndim for t in tensors_of(y))))
    if not seen or size < 2 or not piece.z.numel() or len(piece.z) % size:
        return None

    def part(start: int, stop: int) -> _Piece:
        def cut(t: Tensor) -> Tensor:
            return t[start * len(t) // size : stop * len(t) // size]

        each = iter(runs or ())
        targets = y[start:stop] if runs is None else map_tensors(lambda t: cut(t) if next(each) else t, y)
        return _Piece(cut(piece.z), targets, stop - start, runs)

    return part(0, few), part(few, size)


def _is_plain(whole: _Piece, y: Any) -> bool:
    """Whether nothing but tensors can run over the data."""
    if isinstance(y, Mapping):
        return all(_is_plain(whole, part) for part in y.values())
    if isinstance(y, (list, tuple)):
        if len(y) == whole.size and not any(_runs(y, whole.z, whole.size)):
            return False  # one item for each datum, beside others
        return all(_is_plain(whole, part) for part in y)
    return y is None or isinstance(y, (Tensor, bool, int, float, str))


def _join(a: _Piece, b: _Piece) -> _Piece | None:
    """The data of two pieces as one, if their outputs and targets fit each other."""
    if a.runs != b.runs or not (a.z.ndim and b.z.ndim) or a.z.shape[1:] != b.z.shape[1:]:
        return None
    size, z = a.size + b.size, torch.cat([a.z, b.z])
    if a.runs is None:
        return _Piece(z, a.y + b.y, size, None)
    joined = []
    for one, other, run in zip(tensors_of(a.y), tensors_of(b.y), a.runs, strict=True):
        if run and one.shape[1:] == other.shape[1:] and one.dtype == other.dtype:
            joined.append(torch.cat([one, other]))
        elif not run and torch.equal(one, other):
            joined.append(one)
        else:
            return None
    others = [map_tensors(lambda _: None, y) for y in (a.y, b.y)]  # compared, arrays may raise a ValueError
    tensors = iter(joined)
    return _Piece(z, map_tensors(lambda _: next(tensors), a.y), size, a.runs) if others[0] == others[1] else None
