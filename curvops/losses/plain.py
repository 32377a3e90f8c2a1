"""Plain formulas for PyTorch's losses that have no second derivative."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def plain_form(function: Callable[..., Any], keywords: Mapping[str, Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Replace a loss without a double backward by a formula, and leave others alone.

    Args:
        function: A loss module or function.
        keywords: Options of the function.

    Returns:
        A module or function, and its options.
    """
    if type(function) is nn.MultiMarginLoss:
        options = {"p": function.p, "margin": function.margin, "weight": function.weight}
        return multi_margin_loss, options
    if type(function) is nn.MultiLabelMarginLoss:
        return multilabel_margin_loss, {}
    if function is F.multi_margin_loss:
        return multi_margin_loss, dict(keywords)
    if function is F.multilabel_margin_loss:
        return multilabel_margin_loss, dict(keywords)
    return function, dict(keywords)


def multi_margin_loss(
    z: Tensor, y: Tensor, p: int = 1, margin: float = 1.0, weight: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """Compute `F.multi_margin_loss` from operations that can be differentiated twice."""
    rows, labels = _batched(z), y.reshape(-1, 1)
    slack = (margin - rows.gather(1, labels) + rows).clamp(min=0)
    others = torch.ones_like(rows).scatter(1, labels, 0)
    terms = (others * slack**p).sum(1) / rows.shape[1]
    if weight is not None:
        terms = terms * weight[labels.squeeze(1)]
    return terms.mean() if reduction == "mean" else terms.sum()


def multilabel_margin_loss(z: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
    """Compute `F.multilabel_margin_loss` from operations that can be differentiated twice.

    A row of targets is a list of labels that ends at its first -1.
    """
    rows, labels = _batched(z), _batched(y)
    listed = (labels >= 0).cumprod(1).to(rows.dtype)
    labels = labels.clamp(min=0)
    others = 1 - torch.zeros_like(rows).scatter_reduce(1, labels, listed, "amax")
    slack = (1 - rows.gather(1, labels).unsqueeze(2) + rows.unsqueeze(1)).clamp(min=0)
    terms = (listed.unsqueeze(2) * others.unsqueeze(1) * slack).sum((1, 2)) / rows.shape[1]
    return terms.mean() if reduction == "mean" else terms.sum()


def _batched(z: Tensor) -> Tensor:
    return z if z.ndim > 1 else z.reshape(1, -1)
