"""Norms: what is normalised, times a scale, plus a shift."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from curvops.kronecker.taps import Rule, Taps


def _norm(kind: str, weight: int, channels: bool = False, bias: bool = True) -> Rule:
    """The rule of a norm: the ``weight``-th argument is the scale, the next one the shift (``bias``), if there is one.

    They run along axis 1 (``channels``) or along the last axes.
    """

    def run(taps: Taps, func: Any, *args: Any, **kwargs: Any) -> Tensor:
        given, own = list(args), []
        for name, place in (("weight", weight), ("bias", weight + 1))[: 1 + bias]:
            own.append(kwargs.pop(name, None) if place >= len(given) else given[place])
            given[place : place + 1] = [None] * (place < len(given))
        normal = func(*given, **kwargs)
        normal = normal.movedim(1, -1) if channels else normal
        out = normal if own[0] is None else normal * own[0]
        out = out + own[1] if bias and own[1] is not None else out
        out = out.to(normal.dtype)
        rows = out.ndim - max((v.ndim for v in own if v is not None), default=0)
        taps.vector(out, own[0], lambda g: (g * normal).flatten(rows), out.shape[:rows], kind)
        if bias:
            taps.vector(out, own[1], lambda g: g.flatten(rows), out.shape[:rows], kind)
        return out.movedim(-1, 1) if channels else out

    return run


RULES: dict[Any, Rule] = {
    **dict.fromkeys((F.layer_norm, torch.layer_norm), _norm("layer_norm", 2)),
    **dict.fromkeys((F.rms_norm, torch.rms_norm), _norm("rms_norm", 2, bias=False)),
    **dict.fromkeys((F.group_norm, torch.group_norm), _norm("group_norm", 2, channels=True)),
    F.batch_norm: _norm("batch_norm", 3, channels=True),
    F.instance_norm: _norm("instance_norm", 3, channels=True),
}
