"""The model as it stands: the caller's own module or function, at the caller's own tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from curvops.space import TensorSpace, describe
from curvops.substitutions import Substitutions

ModelFunction = Callable[[dict[str, Tensor], Any], Tensor]
# modules that only distribute another one, and the attribute that holds it
WRAPPERS = {"DistributedDataParallel": "module", "DataParallel": "module"}


class Model:
    """A module or a function ``(params, X)``, run as it stands; its buffers are afterwards as before.

    Args:
        model_func: Module, or function of a dict of parameters and an input.
        params: The tensors in which the curvature is taken, by name: the module's own, under any names.

    Raises:
        TypeError: If ``model_func`` is not callable.
        ValueError: If a tensor is not the module's own, or comes under two names.
    """

    def __init__(self, model_func: Module | ModelFunction, params: Mapping[str, Tensor]) -> None:
        if not callable(model_func):
            raise TypeError(
                f"model_func: expected a module or a function (params, X), got {type(model_func).__name__}."
            )
        self.space = TensorSpace(params)
        self.params = dict(params)
        while (attribute := WRAPPERS.get(type(model_func).__name__)) is not None:
            model_func = getattr(model_func, attribute)
        self.module = model_func if isinstance(model_func, Module) else None
        self.function = None if isinstance(model_func, Module) else model_func
        self._check()

    @property
    def training_modules(self) -> list[Module]:
        """Submodules in train mode."""
        return [m for root in self._roots() for m in root.modules() if m.training]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Parameters, those of ``params`` too, and buffers."""
        named = [(n, t) for root in self._roots() for n, t in (*root.named_parameters(), *root.named_buffers())]
        return {**dict(named), **self.params}

    def __call__(self, X: Any) -> Tensor:
        """Output of the model as it stands.

        Raises:
            TypeError: If the output is not a tensor.
        """
        with self._buffers_kept():
            return _tensor(self.module(X) if self.module is not None else self._function(self.params, X))

    def functional(self, params: Mapping[str, Tensor], X: Any) -> Tensor:
        """Output with other tensors in the place of the parameters: see `standing_in`."""
        with self._buffers_kept(), self.standing_in(params):
            return _tensor(self.module(X) if self.module is not None else self._function(params, X))

    def standing_in(self, params: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> Substitutions:
        """A mode in which other tensors stand in for the parameters, wherever an operation is given one.

        A view of a parameter that was made before, or a `torch.autograd.Function` that takes one, is out of
        reach, so this serves ways that are compared with the model as it stands.

        Args:
            params: The tensors by name.
            dtype: Precision that everything else of the model is brought to.
        """
        stand_ins = {id(tensor): params[name] for name, tensor in self.params.items()}
        if dtype is not None:
            for root in self._roots():
                for tensor in (*root.parameters(), *root.buffers()):
                    stand_ins.setdefault(id(tensor), floating_to(tensor.detach().clone(), dtype))
        return Substitutions(stand_ins)

    def check_current(self) -> None:
        """Refuse a module that has lost one of the tensors since this was made.

        Raises:
            ValueError: If it has; the message names it.
        """
        if self.module is not None and self._own:
            own = {id(p) for p in self.module.parameters()}
            if names := [name for name in self._own if id(self.params[name]) not in own]:
                raise ValueError(
                    f"params: {describe(names)} are no longer tensors of the module {type(self.module).__name__}: they were replaced "
                    "by others. Make the operator anew, with dict(model.named_parameters())."
                )

    def _function(self, params: Mapping[str, Tensor], X: Any) -> Any:
        assert self.function is not None
        return self.function(dict(params), X)

    @contextmanager
    def _buffers_kept(self) -> Iterator[None]:
        """Put back buffers that change as the model runs.

        In place, so that a graph that needs what they had become notices, and its backward pass is an error.
        """
        found = [(m, n, b) for root in self._roots() for m in root.modules() for n, b in m._buffers.items()]
        kept = [(m, n, b, b.detach().clone()) for m, n, b in found if b is not None]
        try:
            yield
        finally:
            with torch.no_grad():
                for module, name, buffer, before in kept:
                    if module._buffers.get(name) is not buffer:
                        module._buffers[name] = buffer
                    if not _same(buffer, before):
                        buffer.copy_(before)

    def _roots(self) -> list[Module]:
        """The module, or the modules that a function refers to."""
        if self.module is not None:
            return [self.module]
        function: Any = self.function
        held = [function, getattr(function, "__self__", None), getattr(function, "func", None)]
        held += getattr(function, "args", ())
        held += [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
        names = getattr(getattr(function, "__code__", None), "co_names", ())
        held += [getattr(function, "__globals__", {}).get(name) for name in names]
        return [value for value in held if isinstance(value, Module)]

    def _check(self) -> None:
        first: dict[int, str] = {}
        for name, tensor in self.params.items():
            if (other := first.setdefault(id(tensor), name)) != name:
                raise ValueError(
                    f"params: {other!r} and {name!r} are one tensor. Pass it under one name, as dict(model.named_parameters()) does."
                )
            if tensor.is_inference():
                raise ValueError(
                    f"params[{name!r}]: it was made in inference mode, so nothing can be differentiated in it. "
                    "Build the model outside torch.inference_mode()."
                )
        self._own: list[str] = []  # of the parameters, those that the module has under some name
        if self.module is None:
            return
        own = dict(self.module.named_parameters(remove_duplicate=False))
        mine = {id(p) for p in own.values()}
        self._own = [name for name, tensor in self.params.items() if id(tensor) in mine]
        foreign = [name for name, tensor in self.params.items() if id(tensor) not in mine and _stands_for(name, own)]
        if foreign:
            raise ValueError(
                f"params: {describe(foreign)} are not the tensors of the module {type(self.module).__name__}, but others of the same "
                "names (copies?). Curvature is taken where the module is: pass a subset of dict(model.named_parameters()), or a "
                "function (params, X) such as lambda p, X: torch.func.functional_call(model, p, (X,))."
            )
        unknown = [n for n, t in self.params.items() if id(t) not in mine and not (t.requires_grad or t.grad_fn)]
        if unknown:
            raise ValueError(
                f"params: the module {type(self.module).__name__} has no parameter {describe(unknown)}; "
                f"it has {describe(list(own))}. Pass a subset of dict(model.named_parameters())."
            )


def _stands_for(name: str, own: Mapping[str, Tensor]) -> bool:
    return name.removeprefix("module.").removeprefix("_orig_mod.") in own or name in own


def _same(tensor: Tensor, before: Tensor) -> bool:
    if torch.equal(tensor, before):
        return True
    return tensor.is_floating_point() and torch.allclose(tensor, before, rtol=0.0, atol=0.0, equal_nan=True)


def _tensor(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    kind = type(output).__name__
    part = ".logits" if hasattr(output, "logits") else "['name']" if isinstance(output, Mapping) else "[0]"
    raise TypeError(
        f"model_func: expected a tensor as output, got {kind}. Wrap the model so that it returns the tensor that the loss takes:\n"
        "    class Wrapped(torch.nn.Module):\n"
        "        def __init__(self, model):\n"
        "            super().__init__()\n"
        "            self.model = model\n"
        "        def forward(self, X):\n"
        f"            return self.model(X){part}"
    )


def floating_to(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The tensor in another precision, if it is a floating-point one and a precision is given."""
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
