"""Operations that select, such as `where`: what passes back through them where they select nothing."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from curvops.kronecker.operations import named

# give a zero gradient, and not a multiple of it, to entries by their values
SELECTS = {F.relu, F.relu6, F.hardtanh, F.hardswish, F.hardsigmoid, F.threshold, F.hardshrink, F.softshrink} | named(
    "where masked_fill masked_fill_ relu relu_ clamp clamp_ clamp_min clamp_min_ clamp_max clamp_max_ clip clip_ maximum "
    "minimum fmax fmin max min threshold threshold_ hardshrink"
)


def conducted(args: Any, kwargs: dict[str, Any], run: Any) -> Any:
    """The result of an operation that selects, of which the gradient goes back to all that it could have selected.

    So what is no number comes back by every path that other values might open; other gradients mean nothing.
    """
    terms = [t * 1 for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.requires_grad]
    first, *others = args
    alone = first.detach().clone()  # an operation in place keeps its result, which nothing may change any more
    value = run(alone, *others, **kwargs)
    if not terms or not isinstance(value, Tensor) or any(not _spreads(t, value) for t in terms):
        return run(*args, **kwargs)
    found: Tensor = _Conducted.apply(value.detach(), *terms)  # type: ignore[no-untyped-call]
    return first.copy_(found) if value is alone else found


def _spreads(term: Tensor, out: Tensor) -> bool:
    own = (1,) * (out.ndim - term.ndim) + tuple(term.shape)
    return len(own) == out.ndim and all(a in (1, b) for a, b in zip(own, out.shape, strict=True))


class _Conducted(torch.autograd.Function):
    """A value, with the gradient of the sum of the terms."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *terms: Tensor) -> Tensor:
        ctx.shapes = [t.shape for t in terms]
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> Any:
        return None, *(g[0].sum_to_size(shape) for shape in ctx.shapes)
