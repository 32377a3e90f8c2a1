"""Any loss as a scalar function of (output, target), in the reduction that is asked for."""

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from curvops.losses.plain import PlainLosses


class ScalarLoss:
    """A loss module, or a function with keywords, that is never changed.

    Attributes:
        name: What to call it in messages.
        function: The module or function.
        keywords: Options of the function.
        switchable: Whether it can be asked for another reduction: a module with the
            attribute `reduction`, or a function with this keyword.
    """

    def __init__(self, function: Callable[..., Any], keywords: Mapping[str, Any]) -> None:
        self.name = str(getattr(function, "__name__", type(function).__name__))
        self.function = function
        # superseded by `reduction`, which `evaluate` passes
        self.keywords = {k: v for k, v in keywords.items() if k not in ("size_average", "reduce", "reduction")}
        self.switchable = _is_switchable(function)
        self._prepared: dict[tuple[str, torch.device, torch.dtype], Callable[..., Any]] = {}
        self._expect_two_arguments()

    def evaluate(self, z: Tensor, y: Any, reduction: str) -> Tensor:
        """Compute the loss, its options brought to z's device and precision.

        Args:
            z: The model's output.
            y: Targets; floating-point ones are brought to z's precision.
            reduction: Which one, if the loss is switchable.

        Returns:
            A scalar.

        Raises:
            ValueError: If the loss is not a scalar.
        """
        if isinstance(y, Tensor) and y.is_floating_point():
            y = y.to(z.dtype)
        function = self._callable(reduction, z.device, z.dtype)
        with PlainLosses():
            value = function(z, y)
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{type(value).__name__}"
            raise ValueError(f"{self.name!r}: expected a scalar loss, got {got}. Reduce it by a sum or a mean.")
        return value.reshape(())

    def _callable(self, reduction: str, device: torch.device, dtype: torch.dtype) -> Callable[..., Any]:
        key = (reduction, device, dtype)
        if key not in self._prepared:
            self._prepared[key] = self._prepare(*key)
        return self._prepared[key]

    def _prepare(self, reduction: str, device: torch.device, dtype: torch.dtype) -> Callable[..., Any]:
        function, keywords = self.function, self.keywords
        if self.switchable and not isinstance(function, nn.Module):
            keywords = {**keywords, "reduction": reduction}
        if isinstance(function, nn.Module):
            function = copy.deepcopy(function).to(device=device, dtype=dtype)
            if self.switchable:
                # nn.Module declares no such attribute, but this one has it
                setattr(function, "reduction", reduction)  # noqa: B010
        return functools.partial(function, **{k: _moved(v, device, dtype) for k, v in keywords.items()})

    def _expect_two_arguments(self) -> None:
        function = self.function.forward if isinstance(self.function, nn.Module) else self.function
        signature = _signature(function)
        try:
            if signature is not None:
                signature.bind(None, None, **self.keywords)
        except TypeError as error:
            raise TypeError(
                f"'output_loss': {self.name!r} cannot be called as loss(output, target): {error}. Wrap it in a "
                "function of these two, with whatever else it needs as part of the target."
            ) from error


def _is_switchable(function: Callable[..., Any]) -> bool:
    if isinstance(function, nn.Module):
        return isinstance(getattr(function, "reduction", None), str)
    signature = _signature(function)
    return signature is not None and "reduction" in signature.parameters


def _signature(function: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):  # built-in functions may not tell
        return None


def default_reduction(function: Callable[..., Any]) -> str | None:
    """Read the reduction that a function's signature has as a default, if any."""
    signature = None if isinstance(function, nn.Module) else _signature(function)
    parameter = signature.parameters.get("reduction") if signature is not None else None
    return parameter.default if parameter is not None and isinstance(parameter.default, str) else None


def _moved(option: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if not isinstance(option, Tensor):
        return option
    return option.to(device=device, dtype=dtype if option.is_floating_point() else None)
