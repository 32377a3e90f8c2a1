"""The dense Hessian layer by layer: forward over reverse, each pair of layers once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import groupby

import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

from curvops.products import rules
from curvops.space import TensorSpace, aligned


def layered_hessian(
    value: Callable[[dict[str, Tensor]], Tensor], params: Mapping[str, Tensor], space: TensorSpace, columns: int
) -> Tensor:
    """Hessian ``[D, D]`` of a scalar function of named parameters, with up to so many ``columns`` together.

    Tangents live in one layer's parameters, so that the forward derivative starts there, and gradients
    are taken in that layer and those after it only, so that the backward pass ends there; symmetry gives
    the rest. The order of the parameters decides the speed, never the result.
    """
    params = dict(params)
    hessian = torch.zeros(space.dim, space.dim, dtype=space.dtype, device=space.device)
    remaining = dict(params)
    for names in layers({name: p.numel() for name, p in params.items() if p.numel()}, min(columns, rules.LAYERED)):
        own = {name: params[name] for name in names}

        def slopes(own: dict[str, Tensor], later: dict[str, Tensor] = remaining) -> dict[str, Tensor]:
            return grad(lambda some: value({**params, **some}))({**later, **own})

        start = space.slice(names[0]).start
        stop = space.slice(names[-1]).stop
        block = torch.cat([_columns(slopes, own, part) for part in _identity(own, space, columns)])
        hessian[start:stop, start:] = block
        hessian[start:, start:stop] = block.T
        remaining = {name: rest for name, rest in remaining.items() if name not in own}
    return hessian


def layers(sizes: Mapping[str, int], columns: int) -> list[list[str]]:
    """Consecutive parameters of one module; small ones together with the next, up to so many columns.

    With more, columns of late layers would pass through early ones in vain.
    """
    groups: list[list[str]] = []
    for _, several in groupby(sizes, lambda name: name.rpartition(".")[0] or name):
        names = list(several)
        if groups and sum(sizes[name] for name in groups[-1] + names) <= columns:
            groups[-1] += names
        else:
            groups.append(names)
    return groups


def _columns(
    slopes: Callable[[dict[str, Tensor]], dict[str, Tensor]], own: dict[str, Tensor], tangents: dict[str, Tensor]
) -> Tensor:
    rows = vmap(lambda t: jvp(slopes, (own,), (t,))[1])(tangents)
    return torch.cat([row.detach().unsqueeze(-1).flatten(1) for row in rows.values()], 1)


def _identity(own: dict[str, Tensor], space: TensorSpace, columns: int) -> list[dict[str, Tensor]]:
    """Unit tangents of some parameters, in chunks of about the same size."""
    inner = TensorSpace(own)
    eye = torch.eye(inner.dim, dtype=space.dtype, device=space.device)
    return [
        {name: aligned(t.movedim(-1, 0)) for name, t in zip(inner.names, inner.split(part.T), strict=True)}
        for part in eye.chunk(-(-inner.dim // columns))
    ]
