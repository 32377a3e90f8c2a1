"""Batches whose graphs exceed the memory budget, in pieces."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from curvops.lengths import size_of
from curvops.memory import byte_size
from curvops.products.account import Account, attempted, relative_difference, tolerance
from curvops.products.proofs import push_forward
from curvops.products.reference import GradientLinearization, OutputLinearization, scattered
from curvops.risk.data import Batch, cut_batch
from curvops.risk.empirical_risk import EmpiricalRisk
from curvops.sharding import local
from curvops.tree import tensors_of

FEW = 4  # data by which it is seen what one datum takes
COPIES = 13  # of what a forward pass saves, with what a product needs besides: `python benchmarks/pieces.py`


def piece_size(
    risk: EmpiricalRisk, batch: Batch, budget: int, account: Account, copies: int = COPIES, second: bool = True
) -> int:
    """How many data of a batch go in a piece, so that a pass over it takes at most so many bytes; 0 for all of them.

    All of them, too, where its tensors cannot be cut along their first axis, or where it is not proved that the model keeps the
    data apart: where outputs and J v of the pieces are not those of the whole, or the derivatives of a few data cut in two
    not those of these data together: the ``second`` ones, too, where they matter. Call within the risk's `evaluation`.

    Args:
        copies: Of what a forward pass saves of a datum, those that a pass takes.

    Raises:
        ValueError: If the loss of the whole is seen not to be the sum of its data's losses.
    """
    if risk.space.shards:
        account.note("batches", "whole", "parameters are cut over processes, which would cut batches differently")
        return 0
    if batch.size <= FEW or any(t.ndim == 0 or t.shape[0] != batch.size for t in tensors_of((batch.X, batch.y))):
        return 0
    saved, _ = attempted(lambda: _saved(risk, cut_batch(batch, slice(FEW))))
    needed = copies * (saved or 0) // FEW
    most = max(1, budget // max(1, needed))
    if most >= batch.size:
        return 0
    most = -(-batch.size // -(-batch.size // most))  # as many pieces, of about one size
    size = f"{byte_size(needed)} a datum, memory_budget={byte_size(budget)}"
    if why := _mixing(risk, batch, in_pieces(batch, most), second):
        account.note("batches", "whole", f"{size}; {why}")
        return 0
    account.note("batches", f"in pieces of {most} data", f"{size}; outputs and J v are those of the whole")
    return most


def in_pieces(batch: Batch, most: int) -> list[Batch]:
    """A batch in pieces of at most so many data, or, for 0, as it is."""
    return [cut_batch(batch, slice(first, first + most)) for first in range(0, batch.size, most)] if most else [batch]


def _mixing(risk: EmpiricalRisk, batch: Batch, pieces: list[Batch], second: bool) -> str:
    """Why it is not proved that pieces give what the whole gives; nothing if it is."""
    pushed, why = attempted(lambda: [_pushed(risk, some) for some in ([batch], pieces)])
    mixed = "the model mixes the gradients of a batch"
    if pushed is None or not _same(pushed[1][0], pushed[0][0]):
        return f"outputs of pieces are not those of the whole: {why or 'the model mixes the data of a batch'}"
    (whole, image), (_, images) = pushed
    risk.loss.expect_sum(whole, batch.y, batch.size)
    # a model may mix gradients alone, or detach a datum by its place, or by what others are
    if not _same(images, image):
        return f"J v of pieces is not that of the whole: {mixed}"
    few = cut_batch(batch, slice(FEW))
    halves = in_pieces(few, FEW // 2)
    derived, why = attempted(lambda: [_derivatives(risk, some, second) for some in ([few], halves)])
    if derived is None or not _all_same(derived[0], derived[1], risk.space.dtype):
        return f"derivatives of {FEW} data are not those of two pieces: {why or mixed}"
    return ""


def _pushed(risk: EmpiricalRisk, pieces: list[Batch]) -> tuple[Tensor, Tensor]:
    """Outputs and J v of some pieces, one below the other."""
    v = _direction(risk)
    outputs, images = zip(*(push_forward(risk, piece, v) for piece in pieces), strict=True)
    return torch.cat(outputs), torch.cat(images)


def _same(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and relative_difference(found, expected) <= tolerance(expected.dtype)


def _all_same(found: list[Tensor | None], expected: list[Tensor | None], dtype: torch.dtype) -> bool:
    """Whether the parts of two vectors, ``None`` for zeros, are the same but for rounding beside the whole vectors."""
    zero = torch.zeros((), dtype=dtype, device="cpu")
    pairs = [(zero if a is None else a, zero if b is None else b) for a, b in zip(found, expected, strict=True)]
    difference, scale = (
        math.hypot(*(float(size_of(t)) for t in ts)) for ts in ((a - b for a, b in pairs), (b for _, b in pairs))
    )
    return difference <= tolerance(dtype) * (scale or 1.0)


def _derivatives(risk: EmpiricalRisk, pieces: list[Batch], second: bool) -> list[Tensor | None]:
    """First and maybe second derivatives in the parameters, along random directions, of the outputs of some pieces together."""
    z = torch.cat([risk.forward(piece.X) for piece in pieces])
    u = scattered(z)
    found = OutputLinearization(z, risk.params, risk.space).pull(u)
    if not second:
        return found
    return [*found, *GradientLinearization(z, risk.params, risk.space, u).parts(_direction(risk))]


def _direction(risk: EmpiricalRisk) -> Tensor:
    return scattered(torch.empty(risk.space.dim, dtype=risk.space.dtype, device=risk.space.device))


def _saved(risk: EmpiricalRisk, few: Batch) -> int:
    """Bytes that the graph of a forward pass holds beside the parameters and the data, which are there anyway."""
    there = (*risk.model.tensors.values(), *tensors_of((few.X, few.y)))
    own = {local(tensor).untyped_storage().data_ptr() for tensor in there}
    sizes: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = local(tensor).untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    with saved_tensors_hooks(count, lambda tensor: tensor):  # which models that use `torch.func` inside refuse
        z = risk.forward(few.X)  # as long as it lives, no memory is counted twice
    del z
    return sum(sizes.values())
