"""What a check looks at: a few data, the caller's model on them, its twin in double precision, and random vectors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from curvops.clients.checks.twin import UNFIT, Loss, NotJudged, Twin, twin_of
from curvops.context import preserved_random_state
from curvops.losses import OutputCurvature
from curvops.matrix import seeded
from curvops.products.account import relative_difference, tolerance
from curvops.risk.data import Batch, cut_batch
from curvops.risk.empirical_risk import EmpiricalRisk
from curvops.risk.model import floating_to
from curvops.tree import map_tensors, tensors_of

FEW = 4  # data that are looked at, half as many where there are more than ``MANY`` parameters
MANY = 1_000_000
OUTPUTS = 256  # outputs of these data, each of which takes a backward pass or two, up to which traces are compared
SIDES = 10_000_000_000  # cubes of the sides of Kronecker factors, up to which eigendecompositions take seconds


@dataclass
class Problem:
    """A few data of a risk; ``X`` and ``y`` are those of ``batches`` in one."""

    risk: EmpiricalRisk
    loss_func: Loss
    batches: list[tuple[Any, Any]]
    X: Any
    y: Any
    z: Tensor
    value: float
    mixes: bool
    seed: int

    @property
    def size(self) -> int:
        """Number of data."""
        return sum(batch.size for batch in self.risk.data.walk())

    @cached_property
    def vectors(self) -> tuple[Tensor, Tensor]:
        """Two random vectors, ``[D]``, about as large as the parameters."""
        space = self.risk.space
        size = max(float(space.join(p.detach() for p in self.risk.params.values()).norm()) / space.dim**0.5, 0.01)
        first, second = (size * space.random(seeded(self.seed), columns=2)).T.contiguous()
        return first, second

    @cached_property
    def allowed(self) -> float:
        """Relative error that rounding explains in the least precise dtype at work; NotJudged where it leaves no digits.

        More than usual where PyTorch's own product with the loss's Hessian has fewer digits, as of a model that is very
        sure of its labels.
        """
        dtypes = {self.z.dtype, *self.risk.space.dtypes.values()}
        usual = 3 * max(map(tolerance, dtypes))
        u, products = torch.randn(self.z.shape, generator=seeded(self.seed), device="cpu").to(self.z), []
        for dtype in (torch.promote_types(self.z.dtype, torch.float32), torch.float64):
            z, y, loss = self.z.to(dtype).requires_grad_(), self.y, self.loss_func
            if dtype == torch.float64:
                y = map_tensors(lambda t: floating_to(t, torch.float64), y)
                loss = copy.deepcopy(loss).double() if isinstance(loss, nn.Module) else loss
            try:
                (slope,) = torch.autograd.grad(loss(z, y), z, create_graph=True)
                (found,) = torch.autograd.grad((slope * u).sum(), z, materialize_grads=True)
            except UNFIT:
                return usual
            products.append(found.double())
        allowed = max(usual, 10 * relative_difference(*products))
        if allowed > 0.5 > usual:
            raise NotJudged(
                f"the loss's curvature has no digits in {self.z.dtype}: the model is too sure of its labels"
            )
        return allowed

    @property
    def twin(self) -> Twin:
        """The model in double precision; NotJudged if there is none."""
        if isinstance(self._twin, NotJudged):
            raise self._twin
        return self._twin

    @cached_property
    def _twin(self) -> Twin | NotJudged:
        try:
            return twin_of(self.risk, self.loss_func, self.X, self.y, self.allowed)
        except NotJudged as reason:
            return reason

    @property
    def curvature(self) -> OutputCurvature:
        """The loss at these data's outputs."""
        return self.risk.loss.curvature(self.z, self.y, self.size)

    @cached_property
    def diagonal(self) -> Tensor:
        """The GGN's exact diagonal from the rows Sᵀ J of the twin; NotJudged where these are many or S does not exist."""
        if self.mixes:
            raise NotJudged("the model mixes the data of a batch, so there are no terms of a datum")
        if self.z.numel() > OUTPUTS:
            raise NotJudged(f"{self.z.numel():,} outputs of these data would take as many backward passes")
        twin = self.twin
        shape = twin.output().shape
        values, vectors = torch.linalg.eigh(twin.output_hessian())
        largest = float(values.abs().max())
        if float(values.min()) < -1e-9 * largest:
            raise NotJudged("the loss is not convex in the output, so there is no factor")
        seen = values > 1e-15 * largest
        return twin.squared_rows((vectors[:, seen] * values[seen].sqrt()).T.reshape(-1, *shape))

    def small(self) -> list[str]:
        """Names of the parameters, smallest first, whose Kronecker factors can be decomposed in seconds."""

        def work(name: str) -> int:
            shape = self.risk.space.shapes[name]
            sides = (shape[0], shape[1:].numel()) if len(shape) > 1 else (1, 1)
            return sum(int(side) ** 3 for side in sides if side <= 10_000)  # larger factors are diagonals

        names, total = list[str](), 0
        for name in sorted(self.risk.space.names, key=work):
            total += work(name)
            if total <= SIDES:
                names.append(name)
        return names

    def terms(self, z: Tensor) -> tuple[Tensor, float]:
        """The loss terms ``[T]`` at outputs of the twin, without c, and c; NotJudged where they cannot be told apart."""
        loss, y = self.loss_func, map_tensors(lambda t: floating_to(t, torch.float64), self.y)
        weighted = getattr(loss, "weight", None) is not None or "weight" in getattr(loss, "keywords", {})
        if weighted:
            raise NotJudged("a weighted loss does not tell the weights of its terms")
        entries: Tensor | None = None
        if isinstance(loss, nn.Module) and isinstance(getattr(loss, "reduction", None), str):
            single = copy.copy(loss)
            vars(single)["reduction"] = "none"
            entries = single(z, y)
        elif not isinstance(loss, nn.Module) and "reduction" in signature(loss).parameters:
            unreduced: Callable[..., Tensor] = loss
            entries = unreduced(z, y, reduction="none")
        if entries is not None and entries.ndim:
            total = float(entries.detach().sum())
            if total == 0:
                raise NotJudged("the loss is zero")
            rows = entries.sum(-1) if entries.shape == z.shape and z.ndim > 1 else entries
            return rows.flatten(), float(self.twin.loss(z)) / total
        if z.ndim > 2 or len(z) != self.size or not isinstance(y, Tensor) or len(y) != len(z):
            raise NotJudged("the loss does not give its terms one by one")
        rows = torch.stack([loss(z[n : n + 1], y[n : n + 1]) for n in range(len(z))])
        return rows, 1.0 if self.risk.loss.reduction == "sum" else 1.0 / len(z)


def problem_of(risk: EmpiricalRisk, loss_func: Loss, seed: int) -> Problem:
    """A few data of the first batches, in two batches where the model does not mix data; else the first batch."""
    with preserved_random_state(risk.data.batches), torch.enable_grad():  # of which a model may take some of its own
        first, pieces = _few(risk)
        for batches in (pieces, [_joined(pieces)], [first]):
            try:
                whole = _joined(batches)
                z, parts = risk.model(whole.X).detach(), torch.cat([risk.model(batch.X).detach() for batch in batches])
                value = float(loss_func(z, whole.y))
            except UNFIT:
                if batches[0] is first and len(batches) == 1:
                    raise
                continue
            if len(batches) == 1 or relative_difference(parts, z) <= 3 * tolerance(z.dtype):
                break
    data = [(batch.X, batch.y) for batch in batches]
    few = risk.of_data(data)
    few.progressbar = False
    return Problem(few, loss_func, data, whole.X, whole.y, z, value, len(batches) < len(pieces), seed)


def _few(risk: EmpiricalRisk) -> tuple[Batch, list[Batch]]:
    """The first batch, and a few data of the first ones in pieces, or the first batch as it is where it cannot be cut."""
    wanted = FEW if risk.space.dim <= MANY else FEW // 2
    with closing(risk.data.walk()) as walk:
        first = next(walk)
        if not _plain(first):
            return first, [first]
        if first.size >= wanted:
            return first, [cut_batch(first, slice(0, wanted - 1)), cut_batch(first, slice(wanted - 1, wanted))]
        pieces = [first]
        for more in walk:
            missing = wanted - sum(piece.size for piece in pieces)
            if not missing or not _plain(more) or _shapes(more) != _shapes(first):
                break
            pieces.append(cut_batch(more, slice(0, missing)))
        return first, pieces


def _plain(batch: Batch) -> bool:
    """Whether the data lie along the first axis of all tensors."""
    tensors = tensors_of((batch.X, batch.y))
    return bool(tensors_of(batch.y)) and all(t.ndim and t.shape[0] == batch.size for t in tensors)


def _shapes(batch: Batch) -> list[Any]:
    return [(t.shape[1:], t.dtype) for t in tensors_of((batch.X, batch.y))]


def _joined(batches: Sequence[Batch]) -> Batch:
    if len(batches) == 1:
        return batches[0]

    def join(parts: list[Any]) -> Any:
        rest = [iter(tensors_of(part)) for part in parts[1:]]
        return map_tensors(lambda t: torch.cat([t, *map(next, rest)]), parts[0])

    X, y = join([b.X for b in batches]), join([b.y for b in batches])
    return Batch(X, y, sum(b.size for b in batches), batches[0].start)
