"""Whether a loss is a sum over data, and over the terms of a datum."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from curvops.losses.layout import TermLayout
from curvops.losses.noise import Noise


def is_additive(total: Callable[[Tensor, Any, float], Tensor], z: Tensor, y: Any, batch_size: int) -> bool:
    """Whether the loss of a batch is the sum of the losses of its two halves.

    Args:
        total: Maps (output, target, number of data) to the sum of the loss over data.
        z: The model's output, without a graph.
        y: Targets.
        batch_size: Number of data.

    Returns:
        False if they differ. True also where it cannot be seen: with fewer than two
        data, or with outputs or targets that cannot be cut along their first axis.
    """
    size = z.shape[0] if z.ndim else 0
    cuttable = isinstance(y, Tensor) and y.ndim > 0 and y.shape[0] == size
    if batch_size < 2 or size % batch_size or not cuttable or size == 0:
        return True
    data = batch_size // 2
    cut = size // batch_size * data
    with torch.no_grad():
        whole = total(z, y, batch_size)
        halves = torch.stack([total(z[:cut], y[:cut], data), total(z[cut:], y[cut:], batch_size - data)])
        tolerance = torch.finfo(z.dtype).eps ** 0.5 * (whole.abs() + halves.abs().sum())
        # a comparison with nan counts as equal: nothing can be said
        return not bool((whole - halves.sum()).abs() > tolerance)


def couples_terms(
    product: Callable[[Tensor], Tensor], layout: TermLayout, dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether an output Hessian has entries between different terms.

    A random vector on one half of the terms must give zero on the other. Up to 16
    terms the halves tell every pair apart, beyond that they are random.

    Args:
        product: Multiplies an output-shaped tensor by the Hessian.
        layout: The terms.
        dtype: Precision.
        device: Where to compute.
    """
    count = layout.num_terms
    vector = Noise(0, 0).normal(count, 1, 1, layout.width, device=device)[:, 0].to(dtype)
    index = torch.arange(count, device=device)
    signs = Noise(0, 0).signs(count, 1, 4, device=device) > 0
    for probe in range(min(4, math.ceil(math.log2(count))) if count > 1 else 0):
        half = (index >> probe & 1).bool() if count <= 16 else signs[:, probe]
        result = layout.rows(product(layout.outputs(vector * half.unsqueeze(1)))).abs()
        tolerance = 100 * torch.finfo(dtype).eps * result.max()
        if bool((result * ~half.unsqueeze(1) > tolerance).any()):
            return True
    return False
