"""The peer's arguments, of all its releases, as ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any

from torch import Tensor
from torch.nn import Module

from curvops.risk.model import Model
from curvops.space import describe

ORDER = ("model_func", "loss_func", "params", "data", "progressbar", "check_deterministic")
# what chose between ways of computing the same matrix, which are chosen here by rules
IGNORED = {"shape", "backend"}


def translated(given: Sequence[Any], named: Mapping[str, Any], order: Sequence[str] = ORDER) -> dict[str, Any]:
    """Keyword arguments of ours.

    Args:
        given: Positional arguments, as many as all releases have in common.
        named: Keyword arguments.
        order: Names of the positional ones.

    Raises:
        TypeError: If there are more positional arguments.
        NotImplementedError: If there is one without a counterpart; the message names what there is in its place.
    """
    if len(given) > len(order):
        raise TypeError(f"expected at most {len(order)} positional arguments ({', '.join(order)}); name the others.")
    arguments = dict(zip(order, given, strict=False)) | dict(named)
    if arguments.pop("block_sizes", None) is not None:
        raise NotImplementedError(
            "block_sizes: there is no such option. Make one operator for each block, of the parameters in it."
        )
    arguments["model_func"], arguments["params"] = problem(arguments["model_func"], arguments["params"])
    plain = {name: value.value if isinstance(value, Enum) else value for name, value in arguments.items()}
    return {name: value for name, value in plain.items() if name not in IGNORED}


def problem(model_func: Any, params: Any) -> tuple[Any, dict[str, Tensor]]:
    """Model and parameters by name, of a module or function and a list or dict.

    Tensors that are not the module's own stand in for those of their names.

    Raises:
        ValueError: If it is not seen which of the module's parameters a tensor stands for.
    """
    own = dict(model_func.named_parameters()) if isinstance(model_func, Module) else {}
    if isinstance(params, Mapping):
        named = dict(params)
    else:
        names = {id(tensor): name for name, tensor in own.items()}
        named = {names.get(id(tensor), f"params.{k}"): tensor for k, tensor in enumerate(params)}
        if not isinstance(model_func, Module):
            return ignoring_params(model_func), named
    if isinstance(params, Mapping) and all(own.get(name, tensor) is tensor for name, tensor in named.items()):
        return model_func, named
    if unknown := [name for name in named if name not in own]:
        raise ValueError(
            f"params: {describe(unknown)} are not tensors of the module {type(model_func).__name__}, nor named as one. Pass "
            "the module's own, or a dict with its names."
        )
    if all(own[name] is tensor for name, tensor in named.items()):
        return model_func, named
    return functional(model_func), named


def functional(module: Module) -> Callable[[dict[str, Tensor], Any], Any]:
    """A function ``(params, X)`` of a module, in which nothing is swapped."""
    own = dict(module.named_parameters())
    model = Model(module, own)
    return lambda params, X: model.functional({**own, **params}, X)


def ignoring_params(model_func: Callable[[Any], Any]) -> Callable[[dict[str, Tensor], Any], Any]:
    """A function ``(params, X)`` of one that takes the input only, and has the parameters inside."""
    return lambda params, X: model_func(X)
