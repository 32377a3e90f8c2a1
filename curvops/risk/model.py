"""The model as it stands: the caller's own module or function, at the caller's own tensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from functools import partial
from itertools import islice
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.parameter import is_lazy

from curvops.context import attributes_kept
from curvops.description import described
from curvops.fully_shard import check_fully_sharded
from curvops.ranks import Ranks
from curvops.sharding import gathered, is_sharded, shardings
from curvops.space import TensorSpace, describe
from curvops.substitutions import Substitutions
from curvops.tree import strided, tensors_of

ModelFunction = Callable[[dict[str, Tensor], Any], Tensor]
STANDARD = frozenset(vars(Module()))  # attributes that all modules have
LARGEST = 1000  # entries of a container that modules are looked for in
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

    def __init__(
        self, model_func: Module | ModelFunction, params: Mapping[str, Tensor], *, searched: Any = None
    ) -> None:
        if not callable(model_func):
            raise TypeError(
                f"model_func: expected a module or a function (params, X), got {type(model_func).__name__}."
            )
        if isinstance(params, Mapping) and (lazy := [name for name, tensor in params.items() if is_lazy(tensor)]):
            raise ValueError(
                f"params: {describe(lazy)} have no entries yet (lazy modules). Run the model once, then take its parameters."
            )
        try:
            self.space = TensorSpace(params)
        except (TypeError, ValueError) as error:
            raise type(error)(f"params: {error}") from None
        if self.space.device.type == "meta":
            raise ValueError(
                f"params: {describe(self.space.names)} are on the meta device and have no values. Load the model's weights first, or make them "
                "(model.to_empty(device='cpu')): plan(), too, runs the model."
            )
        self.params = dict(params)
        self._kinds = {name: _kind(tensor) for name, tensor in self.params.items()}
        while (attribute := WRAPPERS.get(type(model_func).__name__)) is not None:
            model_func = getattr(model_func, attribute)
        self.module = model_func if isinstance(model_func, Module) else None
        self.function = None if isinstance(model_func, Module) else model_func
        self._searched: Any = model_func if searched is None else searched  # where modules are looked for
        self.cut: list[Tensor] = []  # over processes that have other data each
        self._stand_ins: dict[int, Tensor] = {}
        self._check()

    @property
    def training_modules(self) -> list[Module]:
        """Submodules in train mode."""
        return [m for m in self.modules() if m.training]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers, each once: those of ``params`` under their names there."""
        own = ((m, n, t) for m in self.modules() for n, t in {**m._parameters, **m._buffers}.items())
        named = {f"{type(m).__name__}.{n} {k}": t for k, (m, n, t) in enumerate(own) if t is not None}
        unique = {id(tensor): name for name, tensor in {**named, **self.params}.items()}
        return {name: tensor for name, tensor in {**self.params, **named}.items() if unique[id(tensor)] == name}

    @property
    def description(self) -> str:
        """What it is, in words that are the same in another process."""
        return described(self._searched)

    def __call__(self, X: Any) -> Tensor:
        """Output of the model as it stands.

        Raises:
            TypeError: If the output is not a tensor.
        """
        with self._buffers_kept():
            try:
                output = self._called(X) if self.module is not None else self._function(self.params, X)
            except RuntimeError as error:
                own, given = self.space.dtypes.values(), {t.dtype: 1 for t in tensors_of(X) if t.is_floating_point()}
                others = [dtype for dtype in given if dtype not in own]
                if type(error) is not RuntimeError or not others or "type" not in str(error):
                    raise
                raise RuntimeError(
                    f"model_func: it fails ({error}). X has {_told(others[0])}, the parameters {_told(self.space.dtype)}: "
                    "batches keep their dtype, so convert X yourself."
                ) from error
            return _tensor(output)

    def functional(self, params: Mapping[str, Tensor], X: Any) -> Tensor:
        """Output with other tensors in the place of the parameters: see `standing_in`."""
        # what a module stores as it runs would be a dead wrapper of a transform
        with self._buffers_kept(contents=False), attributes_kept(self.modules()), self.standing_in(params):
            return _tensor(self.module(X) if self.module is not None else self._function(params, X))

    def standing_in(self, params: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> Substitutions:
        """A mode in which other tensors stand in for the parameters, wherever an operation is given one.

        A view of a parameter that was made before, or a `torch.autograd.Function` that takes one, is out of
        reach, so this serves ways that are compared with the model as it stands. Everything else of the model is
        brought to the precision ``dtype``.
        """
        stand_ins = {id(tensor): params[name] for name, tensor in self.params.items()}
        for module in self.modules():
            # copies of buffers, as no transform lets a model change them in place
            others = (*(module._parameters.values() if dtype is not None else ()), *module._buffers.values())
            for tensor in others:
                if tensor is not None:
                    stand_ins.setdefault(id(tensor), floating_to(tensor.detach().clone(), dtype))
        return Substitutions(stand_ins)

    def restricted(self, names: Iterable[str]) -> Model:
        """The same model as a function of some of its parameters only."""
        some = {name: self.params[name] for name in names}
        if self.module is not None:
            return Model(self.module, some)
        return Model(lambda params, X: self._function({**self.params, **params}, X), some, searched=self._searched)

    def check_current(self) -> None:
        """A ValueError if the module has lost or converted one of the tensors since this was made; the message names it."""
        own = {id(p) for p in self.module.parameters()} if self.module is not None and self._own else set()
        if names := [name for name in self._own if id(self.params[name]) not in own]:
            raise ValueError(
                f"params: {describe(names)} are no longer tensors of the module {type(self.module).__name__}: they were replaced "
                "by others. Make the operator anew, with dict(model.named_parameters())."
            )
        # `module.double()` and `.to(device)` keep the tensors and change what they are
        kinds = ((name, self._kinds[name], _kind(tensor)) for name, tensor in self.params.items())
        if changed := [(name, before, now) for name, before, now in kinds if before != now]:
            pairs = zip(*changed[0][1:], strict=True)
            before, now = (_told(kind) for kind in next(pair for pair in pairs if pair[0] != pair[1]))
            raise ValueError(
                f"params: {describe([name for name, *_ in changed])}: converted from {before} to {now} since the operator was made. "
                "Make it anew, with data to match."
            )

    def _called(self, X: Any) -> Any:
        """The module's output; where it was made for keywords or several arguments, an error that says so."""
        assert self.module is not None
        try:
            return self.module(X)
        except (AttributeError, TypeError) as error:
            if (call := _call(self.module, X)) is None:
                raise
            raise TypeError(
                f"model_func: {type(self.module).__name__} is called as model(X), and X is a {type(X).__name__}, which it does "
                f"not take ({type(error).__name__}: {error}). {_wrapper(*call)}"
            ) from error

    def _function(self, params: Mapping[str, Tensor], X: Any) -> Any:
        assert self.function is not None
        return self.function(dict(params), X)

    def whole(self, ranks: Ranks) -> Model:
        """The same model with whole parameters in the place of those that are cut over some processes: in `stood_in`."""
        model = copy(self)
        model._stand_ins = {}
        for k, tensor in enumerate(self.cut):
            ranks.meet(f"parameter {k} whole")
            model._stand_ins[id(tensor)] = Parameter(gathered(tensor.detach()), tensor.requires_grad)
        model.params = {name: model._stand_ins.get(id(p), p) for name, p in self.params.items()}
        model.space, model.shards = TensorSpace(model.params), {}
        model._kinds, model._own = {name: _kind(p) for name, p in model.params.items()}, []
        return model

    @contextmanager
    def stood_in(self) -> Iterator[None]:
        """The modules have whole parameters in the place of those that are cut, as `fully_shard` itself puts them there."""
        modules = self.modules() if self._stand_ins else ()
        changed = [(m, n, p) for m in modules for n, p in m._parameters.items() if id(p) in self._stand_ins]
        try:
            for module, name, p in changed:
                setattr(module, name, self._stand_ins[id(p)])
            yield
        finally:
            for module, name, p in changed:
                setattr(module, name, p)

    @contextmanager
    def _buffers_kept(self, contents: bool = True) -> Iterator[None]:
        """Put back buffers that change as the model runs, and their contents unless copies stand in for them."""
        # in place, so that a graph that needs what they had become notices, and its backward pass is an error
        found = [(m, n, b) for m in self.modules() for n, b in m._buffers.items()]
        kept = [(m, n, b, b.detach().clone() if contents else b) for m, n, b in found if b is not None]
        try:
            yield
        finally:
            with torch.no_grad():
                for module, name, buffer, before in kept:
                    # a ScriptModule's have no `get`
                    if name not in module._buffers or module._buffers[name] is not buffer:
                        module._buffers[name] = buffer
                    if before is not buffer and not _same(buffer, before):
                        buffer.copy_(before)

    def modules(self) -> list[Module]:
        """All modules, those too that are held in containers, by functions or by objects that are called."""
        found: dict[int, Module] = {}
        seen: set[int] = set()
        todo: list[Any] = [self._searched]
        while todo:
            value = todo.pop()
            if isinstance(value, (str, Tensor, type)) or id(value) in seen:
                continue
            seen.add(id(value))
            if isinstance(value, Module):
                found[id(value)] = value
                todo += value.children()
            if isinstance(value, (dict, list, tuple, set)):
                items = value.values() if isinstance(value, dict) else value
                some = list(islice(items, LARGEST + 1))  # their own length may mean something else
                todo += some if len(some) <= LARGEST else ()
            elif isinstance(value, Module) or (value is self._searched and hasattr(value, "__dict__")):
                own = [v for name, v in vars(value).items() if name not in STANDARD]
                todo += [v for v in own if isinstance(v, (Module, dict, list, tuple, set, FunctionType))]
            if isinstance(value, (FunctionType, MethodType, partial)) or value is self._searched:
                todo += _held(value)
        return list(found.values())

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
        self.fully_sharded = check_fully_sharded(self.modules())
        # what the processes do alike: parameters that are not asked about are gathered, too
        self.shards = shardings(self.tensors) if self.fully_sharded else self.space.shards
        self._own: list[str] = []  # of the parameters, those that the module has under some name
        if self.module is None:
            return
        own = dict(self.module.named_parameters(remove_duplicate=False))
        mine = {id(p) for p in own.values()}
        others = {name: tensor for name, tensor in self.params.items() if id(tensor) not in mine}
        self._own = [name for name in self.params if name not in others]
        foreign = [n for n in others if n in own or n.removeprefix("module.").removeprefix("_orig_mod.") in own]
        if foreign:
            raise ValueError(
                f"params: {describe(foreign)} are not the tensors of the module {type(self.module).__name__}, but others of the same "
                "names (copies?). Curvature is taken where the module is: pass a subset of dict(model.named_parameters()), or a "
                "function (params, X) such as lambda p, X: torch.func.functional_call(model, p, (X,))."
            )
        unknown = [name for name, tensor in others.items() if not (tensor.requires_grad or tensor.grad_fn)]
        if unknown:
            raise ValueError(
                f"params: the module {type(self.module).__name__} has no parameter {describe(unknown)}; "
                f"it has {describe(list(own))}. Pass a subset of dict(model.named_parameters())."
            )


def _kind(tensor: Tensor) -> tuple[torch.dtype, torch.device, torch.Size]:
    return tensor.dtype, tensor.device, tensor.shape


def _told(kind: object) -> str:
    return f"shape {tuple(kind)}" if isinstance(kind, torch.Size) else str(kind).removeprefix("torch.")


def _held(function: Any) -> list[Any]:
    """What a function, a method or a partial refers to."""
    names = getattr(getattr(function, "__code__", None), "co_names", ())
    held = [getattr(function, name, None) for name in ("__self__", "func", "args", "keywords", "__defaults__")]
    held += [getattr(function, "__globals__", {}).get(name) for name in names]
    for cell in getattr(function, "__closure__", None) or ():
        try:
            held.append(cell.cell_contents)
        except ValueError:  # not filled yet
            continue
    return [v for v in held if isinstance(v, (Module, dict, list, tuple, FunctionType, MethodType, partial))]


def _same(tensor: Tensor, before: Tensor) -> bool:
    if tensor.layout != torch.strided:
        pairs = list(zip(strided(tensor), strided(before), strict=True))
        return all(one.shape == other.shape and _same(one, other) for one, other in pairs)
    if torch.equal(tensor, before):
        return True
    return tensor.is_floating_point() and torch.allclose(tensor, before, rtol=0.0, atol=0.0, equal_nan=True)


SEVERAL = "\nWhere the loss takes several outputs, let it return them as one: torch.cat([…], 1)."


def _tensor(output: Any) -> Tensor:
    if is_sharded(output):
        raise TypeError(
            "model_func: expected a plain tensor as output, got a DTensor. Let the model's last layer give it whole, or wrap the model in "
            "one that returns model(X).full_tensor()."
        )
    if isinstance(output, Tensor):
        return output
    kind, several = type(output).__name__, isinstance(output, (Mapping, tuple, list)) and len(output) > 1
    part = ".logits" if hasattr(output, "logits") else "['name']" if isinstance(output, Mapping) else "[0]"
    raise TypeError(f"model_func: expected a tensor as output, got {kind}. {_wrapper('X', part)}{SEVERAL * several}")


def _wrapper(arguments: str, part: str = "") -> str:
    """How to wrap a model that takes its input in another way, or gives its output in another form."""
    return (
        "Wrap the model so that it takes X and returns the tensor that the loss takes:\n"
        "    class Wrapped(torch.nn.Module):\n"
        "        def __init__(self, model):\n"
        "            super().__init__()\n"
        "            self.model = model\n"
        "        def forward(self, X):\n"
        f"            return self.model({arguments}){part}"
    )


def _call(module: Module, X: Any) -> tuple[str, str] | None:
    """How X would be spread over the arguments of a module that has several, or None if it does not take them."""
    try:
        names = list(inspect.signature(module.forward).parameters)
    except (TypeError, ValueError):
        return None
    part = ".logits" if "labels" in names else ""  # a model that knows its loss gives it along with the logits
    if isinstance(X, Mapping) and set(map(str, X)) & set(names):
        return "**X", part
    return ("*X", part) if isinstance(X, (tuple, list)) and 1 < len(X) <= len(names) else None


def floating_to(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The tensor in another precision, if it is a floating-point one and a precision is given."""
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
