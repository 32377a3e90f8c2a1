"""Small functions that the peer's scripts import."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def allclose_report(first: Any, second: Any, rtol: float = 1e-5, atol: float = 1e-8) -> bool:
    """Whether two tensors or arrays are close; prints their largest difference if they are not."""
    close, difference = _compared(first, second, rtol, atol)
    if not close:
        print(difference)
    return close


def report_nonclose(first: Any, second: Any, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False) -> None:
    """A ValueError if two arrays are not close."""
    close, difference = _compared(first, second, rtol, atol, equal_nan)
    if not close:
        raise ValueError(difference)


def _compared(first: Any, second: Any, rtol: float, atol: float, equal_nan: bool = False) -> tuple[bool, str]:
    """Whether two tensors or arrays are close, in double precision, and how far apart they are."""
    a, b = (torch.as_tensor(x, device=getattr(x, "device", "cpu")).double() for x in (first, second))
    difference = f"the largest difference is {(a - b).abs().max():.3e}, of entries up to {b.abs().max():.3e}."
    return torch.allclose(a, b, rtol=rtol, atol=atol, equal_nan=equal_nan), difference


@contextmanager
def fork_rng_with_seed(seed: int | None) -> Iterator[None]:
    """A context with a seed for the global random state, which is afterwards as before; nothing if there is none."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def split_list(values: Sequence[Any], sizes: Sequence[int]) -> list[list[Any]]:
    """Consecutive parts of a list.

    Raises:
        ValueError: If the sizes do not add up to its length.
    """
    if sum(sizes) != len(values):
        raise ValueError(f"expected sizes that add up to {len(values)}, got {list(sizes)}.")
    rest = iter(values)
    return [[next(rest) for _ in range(size)] for size in sizes]


def random_vector(
    dim: int, distribution: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Tensor:
    """A random vector of the global random state: ``"rademacher"`` (signs) or ``"normal"``."""
    if distribution == "normal":
        return torch.randn(dim, device=device, dtype=dtype)
    if distribution != "rademacher":
        raise ValueError(f"distribution: expected 'rademacher' or 'normal', got {distribution!r}.")
    return torch.randint(2, (dim,), device=device).to(dtype or torch.get_default_dtype()) * 2 - 1
