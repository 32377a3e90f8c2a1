"""Hashes of texts and tensors that are the same in each process, and two numbers that stand for a vector."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from curvops.sharding import local
from curvops.tree import strided

STEP = 2**20  # words that are hashed together, a multiple of a piece
PIECE = 4096  # entries of a vector that are summed together
GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def word(text: str) -> int:
    """A hash of a text as a signed word of 64 bits, the same in each process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def digest(tensors: Mapping[str, Tensor]) -> int:
    """A hash of tensors' bits: sums of integers, which do not depend on the number of threads."""
    total = 0
    for name, tensor in ((name, part) for name, whole in tensors.items() for part in strided(local(whole))):
        real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        flat = real.contiguous().flatten()
        words = flat if flat.dtype == torch.bool else flat.view(INTEGERS[flat.element_size()])
        own = word(f"{name} {tensor.dtype} {tuple(tensor.shape)}")
        whole = len(words) // PIECE * PIECE
        within, pieces = _odd(min(PIECE, len(words)), words.device), _odd(len(words) // PIECE + 1, words.device)
        for start in range(0, whole, STEP):
            part = words[start : min(start + STEP, whole)].view(-1, PIECE)
            part = (part * within).sum(1)
            own += int((part * pieces[start // PIECE : start // PIECE + len(part)]).sum())
        own += int((words[whole:].long() * within[: len(words) - whole]).sum() * pieces[-1])
        total = total * 31 + own
    return (total + (1 << 63)) % (1 << 64) - (1 << 63)


def _odd(count: int, device: torch.device) -> Tensor:
    """Odd words that look random, for the places of things."""
    return torch.arange(count, device=device).mul_(GOLDEN).mul_(2).add_(1)


def probe(vectors: Tensor | None) -> tuple[float, float]:
    """The norm, and a linear function that depends on each entry's place."""
    if vectors is None or not vectors.numel():
        return 0.0, 0.0
    flat = vectors.detach().flatten()
    flat = flat if flat.dtype == torch.float64 else flat.float()
    # a random walk along the places, by pieces, so that as few numbers are made as may be
    first, second = (
        torch.arange(1, count + 1, device=flat.device, dtype=flat.dtype).cos_()
        for count in (min(PIECE, len(flat)), -(-len(flat) // PIECE))
    )
    whole = len(flat) // PIECE * PIECE
    sums = flat[:whole].view(-1, PIECE) @ first if whole else flat.new_zeros(0)
    rest = flat[whole:] @ first[: len(flat) - whole]
    along = sums.double() @ second[: len(sums)].double() + rest.double() * second[-1].double()
    return float(torch.linalg.vector_norm(flat, dtype=torch.float64)), float(along)


def close(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether two probes are those of the same vectors; those that are not finite show in the product."""
    least = 1e-5 * max(abs(one[0]), abs(other[0]))
    return all(not abs(a - b) > least for a, b in zip(one, other, strict=True))
