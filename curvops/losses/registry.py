"""From a loss function to the object that knows its curvature."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import nn

from curvops.losses.autodiff import AutodiffLoss
from curvops.losses.base import OutputLoss
from curvops.losses.bce import BinaryCrossEntropyLoss
from curvops.losses.cross_entropy import CrossEntropyLoss
from curvops.losses.mse import SquaredErrorLoss
from curvops.losses.scalar import ScalarLoss, default_reduction

# functional forms take the options of their modules
_FUNCTIONAL: tuple[tuple[Any, type[nn.Module]], ...] = (
    (F.cross_entropy, nn.CrossEntropyLoss),
    (F.binary_cross_entropy_with_logits, nn.BCEWithLogitsLoss),
    (F.mse_loss, nn.MSELoss),
)


def output_loss(loss_func: Callable[..., Any], reduction: str | None = None) -> OutputLoss:
    """Find the curvature of a loss function in the model's output.

    Cross-entropy, binary cross-entropy of logits and squared error have closed forms,
    as modules, as functions of `torch.nn.functional`, and as `functools.partial` of
    these with keywords. Any other loss that is twice differentiable in the output is
    differentiated; see `curvops.losses.autodiff`.

    Args:
        loss_func: Maps (output, target) to a scalar.
        reduction: "mean" or "sum". Needed for a function that does not tell; must
            agree with a module's own.

    Returns:
        The loss, to be asked batch by batch.

    Raises:
        ValueError: If the reduction is missing, not "mean" or "sum", or contradicts
            the loss function's, or an option is not supported.
        TypeError: If the loss function cannot be called with two arguments.

    Example:
        >>> import functools
        >>> import torch.nn.functional as F
        >>> loss = functools.partial(F.cross_entropy, label_smoothing=0.1)
        >>> type(output_loss(loss)).__name__, output_loss(loss).reduction
        ('CrossEntropyLoss', 'mean')
        >>> output_loss(lambda z, y: (z - y).cosh().sum())
        Traceback (most recent call last):
        ...
        ValueError: 'output_loss': the reduction of '<lambda>' is not known. Pass \
reduction='sum' if it sums over the data, or reduction='mean' if it averages.
    """
    function, keywords = _split_partial(_uncompiled(loss_func))
    name = str(getattr(function, "__name__", type(function).__name__))
    functional = [kind for form, kind in _FUNCTIONAL if form is function]
    stated, averaging = _stated_reduction(function, keywords), "mean"
    if stated is None and reduction is None:
        stated = default_reduction(function)
    if stated == "batchmean":
        stated, averaging = "mean", "batchmean"
    agreed = _agreed_reduction(name, stated, reduction)
    module = _as_module(functional[0], keywords) if functional else function
    if _computes_like(module, nn.CrossEntropyLoss):
        return CrossEntropyLoss(agreed, module.weight, module.ignore_index, module.label_smoothing)
    if _computes_like(module, nn.BCEWithLogitsLoss):
        return BinaryCrossEntropyLoss(agreed, module.weight, module.pos_weight)
    if _computes_like(module, nn.MSELoss):
        return SquaredErrorLoss(agreed)
    return AutodiffLoss(ScalarLoss(function, keywords), agreed, averaging)


def _uncompiled(loss_func: Any) -> Callable[..., Any]:
    """Take the eager module or function out of a compiled one."""
    for attribute in ("_orig_mod", "_torchdynamo_orig_callable"):
        loss_func = getattr(loss_func, attribute, loss_func)
    # PyTorch's own functions are compiled inside one more wrapper
    if getattr(loss_func, "__globals__", {}).get("__name__") == "torch._dynamo.external_utils":
        loss_func = getattr(loss_func, "__wrapped__", loss_func)
    if not callable(loss_func):
        raise TypeError(f"'output_loss': expected a loss module or function of (output, target), got {loss_func!r}.")
    eager: Callable[..., Any] = loss_func
    return eager


def _split_partial(loss_func: Any) -> tuple[Any, Mapping[str, Any]]:
    """Split a partial of a function, with keywords only, into the two."""
    if isinstance(loss_func, functools.partial) and not loss_func.args:
        function = _uncompiled(loss_func.func)
        if not isinstance(function, nn.Module):
            return function, loss_func.keywords
    return loss_func, {}


def _as_module(kind: type[nn.Module], keywords: Mapping[str, Any]) -> Any:
    """Build the module that does the same as a functional form."""
    reducing = ("size_average", "reduce", "reduction")
    options = {name: v for name, v in keywords.items() if name not in reducing}
    if kind is nn.MSELoss and options.pop("weight", None) is not None:
        raise ValueError(
            "'output_loss': the weight of 'mse_loss' has a batch axis, so it cannot "
            "follow a data set that is cut into batches. Pass a loss that reads each "
            "datum's weight from its target."
        )
    return kind(**options)


def _stated_reduction(function: Any, keywords: Mapping[str, Any]) -> str | None:
    """Read the reduction of a module or of a function's keywords, if any."""
    average, reduce = keywords.get("size_average"), keywords.get("reduce")
    if average is not None or reduce is not None:
        # PyTorch resolves and announces its deprecated options
        return nn.L1Loss(size_average=average, reduce=reduce).reduction
    stated = keywords.get("reduction", getattr(function, "reduction", None))
    return stated if isinstance(stated, str) else None


def _agreed_reduction(name: str, stated: str | None, asked: str | None) -> str:
    """Settle on "mean" or "sum" from what the loss states and the caller asks."""
    for reduction in (stated, asked):
        if reduction not in (None, "mean", "sum"):
            raise ValueError(
                f"'output_loss': expected a reduction 'mean' or 'sum' of {name!r}, got "
                f"{reduction!r}. A risk is one number."
            )
    if stated and asked and stated != asked:
        raise ValueError(
            f"'output_loss': {name!r} has the reduction {stated!r}, but "
            f"reduction={asked!r} was passed. Leave it out, or change the loss."
        )
    agreed = stated or asked
    if agreed is None:
        raise ValueError(
            f"'output_loss': the reduction of {name!r} is not known. Pass "
            "reduction='sum' if it sums over the data, or reduction='mean' if it "
            "averages."
        )
    return agreed


def _computes_like(loss_func: Any, kind: type[nn.Module]) -> bool:
    """Whether it is a module of this kind that keeps its computation."""
    return isinstance(loss_func, kind) and type(loss_func).forward is kind.forward and "forward" not in vars(loss_func)
