"""From a loss function to the object that knows its curvature."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import nn

from curvops.losses.base import OutputLoss
from curvops.losses.bce import BinaryCrossEntropyLoss
from curvops.losses.cross_entropy import CrossEntropyLoss
from curvops.losses.mse import SquaredErrorLoss

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
    loss_func = _uncompiled(loss_func)
    function, keywords = _split_partial(loss_func)
    stated: str | None
    functional = [kind for form, kind in _FUNCTIONAL if form is function]
    if functional:
        stated = _stated_reduction(keywords)
        stated = stated or ("mean" if reduction is None else None)
        module = _as_module(functional[0], keywords)
    else:
        stated = getattr(function, "reduction", None)
        module = function
    if _computes_like(module, nn.CrossEntropyLoss):
        return CrossEntropyLoss(
            _agreed_reduction(_name(function), stated, reduction),
            module.weight,
            module.ignore_index,
            module.label_smoothing,
        )
    if _computes_like(module, nn.BCEWithLogitsLoss):
        return BinaryCrossEntropyLoss(
            _agreed_reduction(_name(function), stated, reduction),
            module.weight,
            module.pos_weight,
        )
    if _computes_like(module, nn.MSELoss):
        return SquaredErrorLoss(_agreed_reduction(_name(function), stated, reduction))
    raise NotImplementedError("the autodiff fallback follows in the next commit")


def _uncompiled(loss_func: Any) -> Callable[..., Any]:
    """Take the eager module or function out of a compiled one."""
    for attribute in ("_orig_mod", "_torchdynamo_orig_callable"):
        loss_func = getattr(loss_func, attribute, loss_func)
    if not callable(loss_func):
        raise TypeError(f"'output_loss': expected a loss module or function of (output, target), got {loss_func!r}.")
    eager: Callable[..., Any] = loss_func
    return eager


def _split_partial(loss_func: Any) -> tuple[Any, Mapping[str, Any]]:
    """Split a partial with keywords only into its function and the keywords."""
    if isinstance(loss_func, functools.partial) and not loss_func.args:
        return _uncompiled(loss_func.func), loss_func.keywords
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


def _stated_reduction(keywords: Mapping[str, Any]) -> str | None:
    """Read the reduction that the keywords of a functional form ask for, if any."""
    average, reduce = keywords.get("size_average"), keywords.get("reduce")
    if average is not None or reduce is not None:
        # PyTorch resolves and announces its deprecated options
        return nn.L1Loss(size_average=average, reduce=reduce).reduction
    return keywords.get("reduction")


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


def _name(loss_func: Any) -> str:
    return str(getattr(loss_func, "__name__", type(loss_func).__name__))


def _computes_like(loss_func: Any, kind: type[nn.Module]) -> bool:
    """Whether it is a module of this kind that keeps its computation."""
    return isinstance(loss_func, kind) and type(loss_func).forward is kind.forward and "forward" not in vars(loss_func)
