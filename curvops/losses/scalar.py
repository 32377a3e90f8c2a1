"""Any loss as a scalar function of (output, target), asked as it is now, in the reduction that is wanted."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvops.description import described
from curvops.losses.entries import expect_no_batch_axis
from curvops.substitutions import Substitutions
from curvops.tree import map_tensors, tensors_of

# modules whose function is known; each is convex in the output as long as its weights are not negative
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
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks")
_REDUCING = ("size_average", "reduce", "reduction")  # the first two are superseded by the last


class ScalarLoss:
    """A loss module, function or partial, never changed or copied, but read anew whenever it is asked.

    `asked` is the reduction that the caller states, if any.
    """

    def __init__(self, loss_func: Any, asked: str | None) -> None:
        self._options: Mapping[str, Any] = {}
        self.function = _uncompiled(loss_func)
        if isinstance(self.function, functools.partial) and not self.function.args:
            inner = _uncompiled(self.function.func)
            if not isinstance(inner, nn.Module):
                self.function, self._options = inner, self.function.keywords
        self.name = str(getattr(self.function, "__name__", type(self.function).__name__))
        self._asked = asked
        is_module = isinstance(self.function, nn.Module)
        try:
            signature = inspect.signature(self.function.forward if is_module else self.function)
        except (TypeError, ValueError):  # built-in functions may not tell
            signature = None
        self._keyword = None if is_module or signature is None else signature.parameters.get("reduction")
        try:
            if signature is not None:
                signature.bind(None, None, **self.keywords)
        except TypeError as error:
            raise TypeError(
                f"loss_func: {self.name!r} cannot be called as loss(output, target): {error}. Wrap it in a "
                "function of these two, with whatever else it needs as part of the target."
            ) from error

    @property
    def keywords(self) -> dict[str, Any]:
        return {name: option for name, option in self._options.items() if name not in _REDUCING}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that it holds, by name."""
        module = self.function if isinstance(self.function, nn.Module) else None
        held = (
            {**dict(module.named_parameters()), **dict(module.named_buffers()), **vars(module)}
            if module
            else self.keywords
        )
        return {f"loss.{name}": value for name, value in held.items() if isinstance(value, Tensor)}

    @property
    def description(self) -> str:
        """What it is, in words that are the same in another process."""
        own = {name: option for name, option in self.keywords.items() if not isinstance(option, Tensor)}
        return f"{described(self.function)}, {own}, reduction {self.reduction()[0]}"

    @property
    def switchable(self) -> bool:
        """Whether it can be asked for another reduction: by a module's attribute, or a function's keyword."""
        if not isinstance(self.function, nn.Module):
            return self._keyword is not None
        # a `forward` of its own is bound to this very object, so that a copy's attribute would not reach it
        bound = "forward" in vars(self.function) or isinstance(self.function, torch.jit.ScriptModule)
        return not bound and isinstance(getattr(self.function, "reduction", None), str)

    def reduction(self) -> tuple[str, str]:
        """The reduction, "mean" or "sum", and what a switchable loss calls it.

        A ValueError says if it is unknown, another one, or not what the caller stated.
        """
        stated, asked = self._stated_reduction(), self._asked
        meaning = "mean" if stated == "batchmean" else stated
        for reduction in (meaning, asked):
            if reduction not in (None, "mean", "sum"):
                raise ValueError(
                    f"loss_func: expected a reduction 'mean' or 'sum' of {self.name!r}, got {reduction!r}. "
                    "A risk is one number."
                )
        if meaning and asked and meaning != asked:
            raise ValueError(
                f"loss_func: {self.name!r} has the reduction {stated!r}, but reduction={asked!r} was passed. "
                "Leave it out, or change the loss."
            )
        agreed = meaning or asked
        if agreed is None:
            raise ValueError(
                f"loss_func: the reduction of {self.name!r} is not known. Pass reduction='sum' if it sums over "
                "the data, or reduction='mean' if it averages."
            )
        return agreed, stated or agreed

    def option(self, name: str) -> Any:
        """An option of the module or function, `None` if it has none of this name."""
        return getattr(self.function, name, None) if isinstance(self.function, nn.Module) else self._options.get(name)

    @property
    def form(self) -> Any:
        """The function that this loss is, if it can be told."""
        if not isinstance(self.function, nn.Module):
            return self.function
        return _MODULES.get(type(self.function)) if is_untouched(self.function) else None

    @property
    def known(self) -> bool:
        """Whether it is one of PyTorch's own sums over data, untouched by hooks, also by those of all modules."""
        hooked = any(getattr(torch.nn.modules.module, name, None) for name in _GLOBAL_HOOKS)
        return any(self.form is function for function in _MODULES.values()) and not hooked

    @property
    def convex(self) -> bool:
        """Whether the loss is known to be convex in the output."""
        weight = self.option("weight")
        return self.known and (not isinstance(weight, Tensor) or bool((weight >= 0).all()))

    def output_weights(self, z: Tensor, y: Any) -> Tensor | None:
        """The weights that a loss is linear in, broadcasting to the output; a ValueError if they have a batch axis."""
        form, weight = self.form, self.option("weight")
        if not isinstance(weight, Tensor) or form not in (F.binary_cross_entropy, F.nll_loss):
            return None
        weight = weight.detach().to(z)
        if form is F.nll_loss:
            return weight[y.long().clamp(0, weight.numel() - 1)].unsqueeze(1 if z.ndim > 1 else 0)
        expect_no_batch_axis(self.name, "weight", weight, y)
        return weight

    def evaluate(self, z: Tensor, y: Any, reduction: str) -> Tensor:
        """The loss, its options and targets brought to z's precision, with a reduction if it is switchable."""
        function = self.function
        keywords = {name: _moved(option, z) for name, option in self.keywords.items()}
        if isinstance(function, nn.Module):
            function = _brought(function, z)
            if self.switchable and function.reduction != reduction:
                function = _shallow_copy(function, reduction=reduction)
        elif self._keyword is not None:
            keywords["reduction"] = reduction
        if any(t.is_floating_point() and t.dtype != z.dtype for t in tensors_of(y)):
            y = map_tensors(lambda t: t.to(z.dtype) if t.is_floating_point() else t, y)
        with Substitutions():
            value = function(z, y, **keywords)
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{type(value).__name__}"
            raise ValueError(f"{self.name!r}: expected a scalar loss, got {got}. Reduce it by a sum or a mean.")
        return value.reshape(())

    def total(self, z: Tensor, y: Any, batch_size: int) -> Tensor:
        """The sum of the loss over data."""
        value = self.evaluate(z, y, "sum")
        return value * batch_size if not self.switchable and self.reduction()[0] == "mean" else value

    def _stated_reduction(self) -> str | None:
        """The reduction of a module, or of a function's keywords or signature, if any."""
        average, reduce = (self._options.get(name) for name in _REDUCING[:2])
        if average is not None or reduce is not None:
            # PyTorch resolves and announces its deprecated options
            return nn.L1Loss(size_average=average, reduce=reduce).reduction
        stated = self._options.get("reduction", getattr(self.function, "reduction", None))
        if stated is None and self._asked is None and self._keyword is not None:
            stated = self._keyword.default
        return stated if isinstance(stated, str) else None


def is_untouched(module: nn.Module) -> bool:
    """Whether a module does what its class does: no hooks, and no method of its own."""
    hooked = any(getattr(module, name, None) for name in _HOOKS)
    return not hooked and not any(callable(getattr(type(module), name, None)) for name in vars(module))


def _uncompiled(loss_func: Any) -> Any:
    """The eager module or function in a compiled one, unless the compiled one has hooks or methods of its own."""
    if hasattr(loss_func, "_orig_mod"):
        own = vars(loss_func)
        plain = type(loss_func).__module__ == "torch._dynamo.eval_frame" and not any(own.get(name) for name in _HOOKS)
        if not plain or not hasattr(own.get("forward"), "_torchdynamo_orig_callable"):
            return loss_func
        loss_func = loss_func._orig_mod
    loss_func = getattr(loss_func, "_torchdynamo_orig_callable", loss_func)
    # PyTorch's own functions are compiled inside one more wrapper
    if getattr(loss_func, "__globals__", {}).get("__name__") == "torch._dynamo.external_utils":
        loss_func = getattr(loss_func, "__wrapped__", loss_func)
    if not callable(loss_func):
        raise TypeError(f"loss_func: expected a loss module or function of (output, target), got {loss_func!r}.")
    return loss_func


def _moved(option: Any, z: Tensor) -> Any:
    if not isinstance(option, Tensor):
        return option
    return option.to(device=z.device, dtype=z.dtype if option.is_floating_point() else None)


def _brought(module: nn.Module, z: Tensor) -> nn.Module:
    """The module with its tensors on z's device and in its precision: itself, or a copy that shares all else.

    Gradients flow through the copy to the module's own tensors. Buffers are always copied: a loss may update them.
    """
    parts: dict[str, dict[str, Any]] = {
        "_parameters": {name: _moved(t, z) for name, t in module._parameters.items()},
        "_buffers": {name: t if t is None else _moved(t, z).clone() for name, t in module._buffers.items()},
        "_modules": {name: m if m is None else _brought(m, z) for name, m in module._modules.items()},
    }
    same = all(new is getattr(module, kind)[name] for kind, items in parts.items() for name, new in items.items())
    return module if same else _shallow_copy(module, **parts)


def _shallow_copy(module: nn.Module, **changes: Any) -> nn.Module:
    copy = type(module).__new__(type(module))
    copy.__dict__.update(vars(module), **changes)
    return copy
