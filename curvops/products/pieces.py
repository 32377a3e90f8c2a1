"""Batches whose graphs exceed the memory budget, in pieces."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from curvops.products.account import Account, attempted, relative_difference, tolerance
from curvops.products.proofs import push_forward
from curvops.products.reference import GradientLinearization, OutputLinearization
from curvops.risk.data import Batch
from curvops.risk.empirical_risk import EmpiricalRisk
from curvops.sharding import local
from curvops.tree import select, tensors_of

FEW = 4  # data by which it is seen what one datum takes
COPIES = 9  # of what a forward pass saves, with what a product needs besides: `python benchmarks/pieces.py`


def pieces_of(risk: EmpiricalRisk, batch: Batch, budget: int, account: Account) -> list[Batch]:
    """A batch as it is, or in pieces that each take a product of at most so many bytes.

    As it is, too, where its tensors cannot be cut along their first axis, or where it is not proved that the model keeps the
    data apart: where outputs and J v of the pieces are not those of the whole, or the second derivatives of a few data cut
    in two not those of these data together. Call within the risk's `evaluation`.

    Raises:
        ValueError: If the loss of the whole is seen not to be the sum of its data's losses.
    """
    if risk.space.shards:
        account.note("batches", "whole", "parameters are cut over processes, which would cut batches differently")
        return [batch]
    if batch.size <= FEW or any(t.ndim == 0 or t.shape[0] != batch.size for t in tensors_of((batch.X, batch.y))):
        return [batch]
    saved, _ = attempted(lambda: _saved(risk, _cut(batch, 0, FEW)))
    needed = COPIES * (saved or 0) // FEW
    most = max(1, budget // max(1, needed))
    if most >= batch.size:
        return [batch]
    pieces = [_cut(batch, first, min(first + most, batch.size)) for first in range(0, batch.size, most)]
    size = f"{needed / 1e6:,.2f} MB a datum, memory_budget={budget / 1e6:,.2f} MB"
    if why := _mixing(risk, batch, pieces):
        account.note("batches", "whole", f"{size}; {why}")
        return [batch]
    account.note("batches", f"in pieces of {most} data", f"{size}; outputs and J v are those of the whole")
    return pieces


def _mixing(risk: EmpiricalRisk, batch: Batch, pieces: list[Batch]) -> str:
    """Why it is not proved that pieces give what the whole gives; nothing if it is."""
    v = risk.space.random(torch.Generator().manual_seed(0))
    pushed, why = attempted(lambda: [_pushed(risk, some, v) for some in ([batch], pieces)])
    mixed = "the model mixes the gradients of a batch"
    if pushed is None or not _same(pushed[1][0], pushed[0][0]):
        return f"outputs of pieces are not those of the whole: {why or 'the model mixes the data of a batch'}"
    (whole, image), (_, images) = pushed
    risk.loss.expect_sum(whole, batch.y, batch.size)
    # a model may mix gradients alone, or detach a datum by its place, or by what others are
    if not _same(images, image):
        return f"J v of pieces is not that of the whole: {mixed}"
    few, halves = _cut(batch, 0, FEW), [_cut(batch, 0, FEW // 2), _cut(batch, FEW // 2, FEW)]
    derived, why = attempted(lambda: [_derivatives(risk, some) for some in ([few], halves)])
    if derived is None or not _same(*derived):
        return f"derivatives of {FEW} data are not those of two pieces: {why or mixed}"
    return ""


def _pushed(risk: EmpiricalRisk, pieces: list[Batch], v: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs and J v of some pieces, one below the other."""
    outputs, images = zip(*(push_forward(risk, piece, v) for piece in pieces), strict=True)
    return torch.cat(outputs), torch.cat(images)


def _same(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and relative_difference(found, expected) <= tolerance(expected.dtype)


def _derivatives(risk: EmpiricalRisk, pieces: list[Batch]) -> Tensor:
    """First and second derivatives in the parameters, along random directions, of the outputs of some pieces together."""
    z = torch.cat([risk.forward(piece.X) for piece in pieces])
    generator = torch.Generator().manual_seed(0)
    u, v = torch.randn(z.shape, generator=generator, device="cpu").to(z), risk.space.random(generator)
    first = OutputLinearization(z, risk.params, risk.space).pull(u)
    second = GradientLinearization(z, risk.params, risk.space, u).parts(v)
    return torch.cat([part.flatten().to(risk.space.sum_dtype) for part in (*first, *second) if part is not None])


def _cut(batch: Batch, first: int, end: int) -> Batch:
    X, y = (select(part, batch.size, slice(first, end)) for part in (batch.X, batch.y))
    return Batch(X, y, end - first, batch.start + first)


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
