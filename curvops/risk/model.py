"""The model as a pure function of its parameters: nothing of the caller's module changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import Module

from curvops.space import TensorSpace, describe
from curvops.tree import content

ModelFunction = Callable[[dict[str, Tensor], Any], Tensor]
# modules that only wrap another one, and the attribute that holds it
WRAPPERS = {"OptimizedModule": "_orig_mod", "DistributedDataParallel": "module", "DataParallel": "module"}


class Model:
    """A module or a function ``(params, X)`` as a function of named parameters.

    Parameters that are not asked for are constants; buffers are cloned for each call, so that
    statistics and power iterations leave the caller's untouched.

    Args:
        model_func: Module, or function of a dict of parameters and an input.
        params: The parameters in which the curvature is taken, by name.

    Raises:
        TypeError: If ``model_func`` is not callable.
        ValueError: If the module has no parameter of a given name and shape.
    """

    def __init__(self, model_func: Module | ModelFunction, params: Mapping[str, Tensor]) -> None:
        if not callable(model_func):
            raise TypeError(
                f"model_func: expected a module or a function (params, X), got {type(model_func).__name__}."
            )
        self.space = TensorSpace(params)
        self.params = dict(params)
        self.module: Module | None = None
        self.function: ModelFunction | None = None
        self._first_dtype = next(iter(self.params.values())).dtype
        if isinstance(model_func, Module):
            self.module, self._names = _unwrap(model_func, self.params)
            own = dict(self.module.named_parameters(remove_duplicate=False))
            self._mine = {id(own[name]) for name in self._names.values()}
        else:
            self.function = model_func

    @property
    def training_modules(self) -> list[Module]:
        """Submodules in train mode."""
        return [] if self.module is None else [m for m in self.module.modules() if m.training]

    def token(self) -> object:
        """Changes whenever parameters, buffers, modes, plain attributes, functions or hooks have changed.

        Values that change by way of ``p.data`` are seen too.
        """
        modules = [m for root in self._roots() for m in root.modules()]
        tensors = list(self.params.values())
        settings: list[object] = []
        for module in modules:
            for name, value in vars(module).items():
                if isinstance(value, (bool, int, float, str)):
                    settings.append((name, value))
                elif isinstance(value, Tensor):
                    tensors.append(value)
                elif name.endswith("_hooks"):
                    settings.append((name, *map(id, value.values())))
                elif callable(value):
                    settings.append((name, id(value)))
            tensors += [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
        return tuple(settings), content(tensors)

    def _roots(self) -> list[Module]:
        """The module, or the modules that a function refers to."""
        if self.module is not None:
            return [self.module]
        held: list[object] = [
            self.function,
            getattr(self.function, "__self__", None),
            getattr(self.function, "func", None),
        ]
        held += getattr(self.function, "args", ())
        for cell in getattr(self.function, "__closure__", None) or ():
            held.append(cell.cell_contents)
        names = getattr(getattr(self.function, "__code__", None), "co_names", ())
        held += [getattr(self.function, "__globals__", {}).get(name) for name in names]
        return [value for value in held if isinstance(value, Module)]

    def leaves(self) -> dict[str, Tensor]:
        """Fresh leaves of the autograd graph that share the parameters' memory."""
        return {name: _plain(p).requires_grad_() for name, p in self.params.items()}

    def __call__(self, params: Mapping[str, Tensor], X: Any) -> Tensor:
        """Output of the model at the given parameters.

        Raises:
            TypeError: If the output is not a tensor.
        """
        output = self._forward(params, X)
        if not isinstance(output, Tensor):
            raise TypeError(_not_a_tensor(output))
        return output

    def _forward(self, params: Mapping[str, Tensor], X: Any) -> Any:
        if self.module is None:
            assert self.function is not None
            return self.function(dict(params), X)
        given = {self._names[name]: tensor for name, tensor in params.items()}
        # in another precision (the judge's double), constants and buffers follow the parameters
        dtype = None if next(iter(params.values())).dtype == self._first_dtype else torch.float64
        constants = {n: _plain(p) for n, p in self.module.named_parameters() if id(p) not in self._mine}
        buffers = {n: b.clone() for n, b in self.module.named_buffers()}
        others = {n: floating_to(t, dtype) for n, t in {**constants, **buffers}.items()}
        return functional_call(self.module, {**others, **given}, (X,))


def _unwrap(module: Module, params: Mapping[str, Tensor]) -> tuple[Module, dict[str, str]]:
    """The innermost module, and the name there of each parameter."""
    prefixes = [""]
    while (attribute := WRAPPERS.get(type(module).__name__)) is not None:
        prefixes.append(f"{prefixes[-1]}{attribute}.")
        module = getattr(module, attribute)
    own = dict(module.named_parameters(remove_duplicate=False))
    names, unknown = {}, []
    for name, tensor in params.items():
        candidates = (name.removeprefix(prefix) for prefix in reversed(prefixes))
        found = next((n for n in candidates if n in own), None)
        if found is None:
            unknown.append(name)
            continue
        names[name] = found
        if own[found].shape != tensor.shape:
            raise ValueError(
                f"params[{name!r}]: expected shape {tuple(own[found].shape)} as in the module, got {tuple(tensor.shape)}."
            )
    first: dict[int, str] = {}
    for name, found in names.items():
        if (other := first.setdefault(id(own[found]), name)) != name:
            raise ValueError(
                f"params: {other!r} and {name!r} are one parameter of the module {type(module).__name__}. "
                "Pass it under one name, as dict(model.named_parameters()) does."
            )
    if unknown:
        raise ValueError(
            f"params: the module {type(module).__name__} has no parameter {describe(unknown)}; "
            f"it has {describe(list(own))}. Pass a subset of dict(model.named_parameters())."
        )
    return module, names


def _not_a_tensor(output: Any) -> str:
    kind = type(output).__name__
    part = ".logits" if hasattr(output, "logits") else "['name']" if isinstance(output, Mapping) else "[0]"
    return (
        f"model_func: expected a tensor as output, got {kind}. Wrap the model so that it returns the tensor that the loss takes:\n"
        "    class Wrapped(torch.nn.Module):\n"
        "        def __init__(self, model):\n"
        "            super().__init__()\n"
        "            self.model = model\n"
        "        def forward(self, X):\n"
        f"            return self.model(X){part}"
    )


def _plain(tensor: Tensor) -> Tensor:
    """The tensor without its graph, and as a normal one if it was made in inference mode."""
    return tensor.detach().clone() if tensor.is_inference() else tensor.detach()


def floating_to(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The tensor in another precision, if it is a floating-point one and a precision is given."""
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
