"""Hashes of texts and tensors that are the same in each process, and two numbers that stand for a vector."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from curvops.sharding import local

STEP = 2**20  # words that are hashed together
GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def word(text: str) -> int:
    """A hash of a text as a signed word of 64 bits, the same in each process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def digest(tensors: Mapping[str, Tensor]) -> int:
    """A hash of tensors' bits: sums of integers, which do not depend on the number of threads."""
    total = 0
    for name, tensor in tensors.items():
        here = local(tensor)
        real = torch.view_as_real(here) if here.is_complex() else here
        flat = real.contiguous().flatten()
        words = flat if flat.dtype == torch.bool else flat.view(INTEGERS[flat.element_size()])
        own = word(f"{name} {tensor.dtype} {tuple(tensor.shape)}")
        for start in range(0, len(words), STEP):
            part = words[start : start + STEP].long()
            ramp = torch.arange(start, start + len(part), device=part.device).mul_(GOLDEN).mul_(2).add_(1)
            own += int((part * ramp).sum())
        total = total * 31 + own
    return (total + (1 << 63)) % (1 << 64) - (1 << 63)


def probe(vectors: Tensor | None) -> tuple[float, float]:
    """The norm, and a linear function that depends on each entry's place."""
    if vectors is None or not vectors.numel():
        return 0.0, 0.0
    flat = vectors.detach().flatten().double()
    ramp = torch.arange(1, len(flat) + 1, device=flat.device, dtype=torch.float64).cos_()
    return float(flat.norm()), float(flat @ ramp)


def close(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether two probes are those of the same vectors; those that are not finite show in the product."""
    least = 1e-5 * max(abs(one[0]), abs(other[0]))
    return all(not abs(a - b) > least for a, b in zip(one, other, strict=True))
