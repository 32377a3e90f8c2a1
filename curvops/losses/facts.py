"""What is known of PyTorch's losses and cannot be found by differentiating them."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from curvops.losses.bce import expect_no_batch_axis
from curvops.losses.layout import TermLayout, class_layout, entry_layout
from curvops.losses.scalar import ScalarLoss

_MODULES: dict[type[nn.Module], Callable[..., Any]] = {
    nn.BCELoss: F.binary_cross_entropy,
    nn.HingeEmbeddingLoss: F.hinge_embedding_loss,
    nn.HuberLoss: F.huber_loss,
    nn.KLDivLoss: F.kl_div,
    nn.L1Loss: F.l1_loss,
    nn.MultiLabelMarginLoss: F.multilabel_margin_loss,
    nn.MultiLabelSoftMarginLoss: F.multilabel_soft_margin_loss,
    nn.MultiMarginLoss: F.multi_margin_loss,
    nn.NLLLoss: F.nll_loss,
    nn.SmoothL1Loss: F.smooth_l1_loss,
    nn.SoftMarginLoss: F.soft_margin_loss,
}
# each of them is convex in the output as long as its weights are not negative
_CONVEX = tuple(_MODULES.values())


def is_convex(loss: ScalarLoss) -> bool:
    """Whether the loss is known to be convex in the output."""
    form, weight = _form(loss), _weight(loss)
    return any(form is known for known in _CONVEX) and (weight is None or bool((weight >= 0).all()))


def term_layout(loss: ScalarLoss, z: Tensor) -> TermLayout:
    """The terms that the loss has before reduction, if it is a sum over entries."""
    return class_layout(z.shape) if _form(loss) is F.nll_loss else entry_layout(z.shape)


def output_weights(loss: ScalarLoss, z: Tensor, y: Any) -> Tensor | None:
    """The weight of each entry of the output, for losses that are linear in weights.

    Returns:
        A tensor that broadcasts to the output's shape, or `None` for no weights.

    Raises:
        ValueError: If the weights have a batch axis.
    """
    form, weight = _form(loss), _weight(loss)
    if weight is None:
        return None
    weight = weight.detach().to(z)
    if form is F.binary_cross_entropy:
        expect_no_batch_axis(loss.name, "weight", weight, y)
        return weight
    if form is F.nll_loss:
        labels = y.long().clamp(0, weight.numel() - 1)
        return weight[labels].unsqueeze(1 if z.ndim > 1 else 0)
    return None


def _form(loss: ScalarLoss) -> Any:
    return _MODULES.get(type(loss.function), loss.function) if isinstance(loss.function, nn.Module) else loss.function


def _weight(loss: ScalarLoss) -> Tensor | None:
    option = (
        getattr(loss.function, "weight", None) if isinstance(loss.function, nn.Module) else loss.keywords.get("weight")
    )
    return option if isinstance(option, Tensor) else None
