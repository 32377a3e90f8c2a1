"""Rows Sᵀ J datum by datum: one `vmap` over the data, for dense matrices of small models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp, vmap

from curvops.space import TensorSpace
from curvops.tree import map_tensors, tensors_of


def pulled_rows(
    forward: Callable[[Mapping[str, Tensor], Any], Tensor],
    params: Mapping[str, Tensor],
    X: Any,
    cotangents: Tensor,
    space: TensorSpace,
    entries: int,
    granted: Callable[[int], int],
) -> Iterator[Tensor]:
    """Rows Jᵀu, datum by datum, for a model that does not mix the data of a batch.

    Args:
        forward: The model, from parameters and an input.
        params: The parameters.
        X: Input of N data, each tensor with the data along its first axis.
        cotangents: ``[N, P, *output]``, P of them for each datum, in the output's shape of one datum.
        space: The space of the parameters.
        entries: Entries of the results of the model's operations for one datum.
        granted: How many of the bytes that are wanted there is room for; it decides how many data go together.

    Yields:
        Rows ``[n P, D]`` of some consecutive data.

    Raises:
        ValueError: If a tensor of ``X`` has no axis of data.
    """
    tensors = tensors_of(X)
    size = len(cotangents)
    if any(t.ndim == 0 or t.shape[0] != size for t in tensors):
        raise ValueError("a tensor of X does not have the data along its first axis")

    def single(inputs: list[Tensor], us: Tensor) -> list[Tensor]:
        remaining = iter(inputs)
        x = map_tensors(lambda _: next(remaining).unsqueeze(0), X)
        pull = vjp(lambda p: forward(p, x), dict(params))[1]
        (slopes,) = vmap(pull)(us.unsqueeze(1))
        return list(slopes.values())

    # the rows of a datum, their parts before joining and what autograd holds of as many, and the gradients on the way
    one = max(1, cotangents.shape[1] * space.dtype.itemsize * (4 * space.dim + entries))
    together = max(1, granted(size * one) // one)
    for start in range(0, size, together):
        part = slice(start, start + together)
        slopes = vmap(single)([t[part] for t in tensors], cotangents[part])
        yield torch.cat([s.unsqueeze(-1).flatten(2).to(space.dtype) for s in slopes], 2).flatten(0, 1).detach()


def term_cotangents(outputs: Callable[[Tensor], Tensor], factor: Tensor, size: int) -> Tensor:
    """One cotangent for each datum, term and column: ``[T, C, K]`` to ``[N, (T/N) K, *output]``.

    Terms are squared separately, so a cotangent is zero at all but one term of its datum.
    """
    terms, width, columns = factor.shape
    rows = factor.reshape(size, terms // size, width, columns)
    spread = rows.permute(3, 0, 2, 1).diag_embed(dim1=0, dim2=3)  # term, column, datum, its terms, width
    shaped = [outputs(u.reshape(terms, width)) for u in spread.flatten(0, 1)]
    return torch.stack(shaped, 1)
