"""Plain formulas for what a loss may use and PyTorch cannot differentiate twice."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from curvops.substitutions import TABLE


class PlainLosses(TorchFunctionMode):
    """A context in which losses run with operations that have right second derivatives."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation, or what stands in for it."""
        return _TABLE.get(func, func)(*args, **(kwargs or {}))


def multilabel_margin_loss(
    z: Tensor, y: Tensor, size_average: bool | None = None, reduce: bool | None = None, reduction: str = "mean"
) -> Tensor:
    """Compute `F.multilabel_margin_loss`.

    A row of targets is a list of labels that ends at its first -1.
    """
    rows, labels = torch.atleast_2d(z), torch.atleast_2d(y)
    listed = (labels >= 0).cumprod(1).to(rows.dtype)
    labels = labels.clamp(min=0)
    others = 1 - torch.zeros_like(rows).scatter_reduce(1, labels, listed, "amax")
    slack = (1 - rows.gather(1, labels).unsqueeze(2) + rows.unsqueeze(1)).clamp(min=0)
    terms = (listed.unsqueeze(2) * others.unsqueeze(1) * slack).sum((1, 2)) / rows.shape[1]
    loss: Tensor = terms.mean() if reduction == "mean" else terms.sum()
    return loss


_TABLE: dict[Any, Callable[..., Any]] = {**TABLE, F.multilabel_margin_loss: multilabel_margin_loss}
