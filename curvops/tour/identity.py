"""Whether two computations are of one problem: what its tensors, objects and data hold, and what its code gives."""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from collections.abc import Mapping
from enum import Enum
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module

from curvops.files import versions
from curvops.lengths import dots, size_of
from curvops.risk.empirical_risk import EmpiricalRisk
from curvops.risk.model import STANDARD
from curvops.tour.matrices import OPERATORS, refusals
from curvops.tree import select, tensors_of

LIBRARIES = ("curvops", "python", "torch")  # whose versions decide what is computed
FEW = 4  # data of which a product is taken
# Matrices of which a product is taken: the GGN sees what moves between model and loss, the empirical Fisher what a loss
# term is. The Monte-Carlo Fisher's mean is the GGN, and its factor may not fit.
_PRODUCTS = {"hessian": "Hessian", "ggn": "Generalized Gauss-Newton", "ef": "Empirical Fisher"}
# from each number that the code gives to the one that its rounding goes by
_WITNESSES = {"risk": "risk", "gradient_norm": "gradient_norm", "gradient_probe": "gradient_norm"} | {
    f"{name}_{what}": f"{name}_norm" for name in _PRODUCTS for what in ("norm", "probe")
}
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_PLAIN = (str, bytes, int, float, complex, Enum, range, slice, type(None), np.generic, torch.dtype, torch.device)
_FOREIGN = {"builtins", "curvops", "numpy", "torch", *sys.stdlib_module_names}  # their versions say what their code is


def identity(risk: EmpiricalRisk) -> dict[str, Any]:
    """What tells this problem from any other, in a form that JSON can hold; to be compared by `differences`.

    Device and precision; the `content`; and witnesses of what no digest sees, code that is called from somewhere: the
    risk, the norm of its gradient g, g · v with a fixed random unit vector v, and of the first few data the norm of A v and
    v · A v for the Hessian, the GGN and the empirical Fisher (None where they cannot be had), so that what moves between
    model and loss is seen, and another cut of the loss into terms. Together they take little more than a gradient.

    Example:
        >>> from curvops.tour.setups import tiny
        >>> here, setup = identity(tiny().risk()), tiny()
        >>> setup.model[1] = torch.nn.LeakyReLU()
        >>> differences(here, identity(tiny().risk())), differences(here, identity(setup.risk()))
        ([], ['other model'])
    """
    value, gradient = risk.value_and_gradient()
    probe = torch.randn(risk.space.dim, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
    probe = (probe / probe.norm()).to(gradient)
    found: dict[str, Any] = {
        "device": str(risk.space.device),
        "dtype": str(risk.space.dtype).removeprefix("torch."),
        "risk": float(value),
        "gradient_norm": float(size_of(gradient)),
        "gradient_probe": float(dots(gradient, probe)),
    }
    some = _beginning(risk)
    for name, title in _PRODUCTS.items():
        norm = along = None
        with refusals({}, title):  # whoever asks for it is told why
            product = OPERATORS[title][0].of(some) @ probe
            norm, along = float(size_of(product)), float(dots(product, probe))
        found |= {f"{name}_norm": norm, f"{name}_probe": along}
    return {**found, "content": content(risk)}


def content(risk: EmpiricalRisk) -> dict[str, str]:
    """Digests of what the parameters, the model, the loss and the data hold, and the versions of what computes.

    Of the parameters their names, too; of the model and the loss all tensors (also buffers that are not persistent, frozen
    weights, attributes, what a function refers to), modes, hooks, attributes that are plain, and the code of `forward` or
    of the function; of the data also keys, order and cut into batches.
    """
    cut = hashlib.blake2b(digest_size=16)
    model = risk.model.function if risk.model.module is None else risk.model.module
    known = versions()
    with risk.walk("Content") as walk:
        for batch in walk:
            cut.update(_digest(batch.X, batch.y, batch.size))
        own = {
            "weights": _digest(risk.params).hex(),
            "model": _digest(model, named={id(tensor): name for name, tensor in risk.params.items()}).hex(),
            "loss": _digest(risk.loss_func, risk.loss.reduction).hex(),
            "data": cut.hexdigest(),
            "versions": ", ".join(f"{name} {known.get(name, 'unknown')}" for name in LIBRARIES),
        }
        walk.join()
        if risk.ranks.alone:
            return own
        shares = risk.ranks.gather(own)  # so that all processes decide alike
    return {name: _digest([share[name] for share in shares]).hex() for name in own}


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """In what the settings of two computations differ, in a few words each; empty where in nothing.

    Both contain an `identity`. Its witnesses may differ by rounding, since a sum by other numbers of threads is not the
    same to the last digit; everything else must be equal.
    """
    there, here = (json.loads(json.dumps(dict(settings))) for settings in (there, here))  # as from a file
    found = []
    for name in [name for name in {**there, **here} if name not in _WITNESSES]:
        before, now = there.get(name), here.get(name)
        if name == "content":
            known = before if isinstance(before, Mapping) else {}
            parts = {**known, **here["content"]}
            found += [f"other {part}" for part in parts if known.get(part) != here["content"].get(part)]
        elif before != now:
            short = all(isinstance(value, (int, float, str, type(None))) for value in (before, now))
            found.append(f"{name} {before}, now {now}" if short else f"other {name}")
    if not found:  # the same tensors, objects and data
        moved = [name for name in _WITNESSES if not _agree(name, there, here)]
        found += [f"other code: {name} {there.get(name)}, now {here.get(name)}" for name in moved[:1]]
    return found


def _beginning(risk: EmpiricalRisk) -> EmpiricalRisk:
    """The risk of a few data, of which a product takes little time and memory; of the first batch if it cannot be cut."""
    with risk.walk("Content") as walk:
        batch = next(iter(walk), None)
    if batch is None:  # an empty share of the data
        return risk.of_data([])
    plain = all(t.ndim and t.shape[0] == batch.size for t in tensors_of((batch.X, batch.y)))
    some = slice(FEW if plain else batch.size)
    found = risk.of_data([(select(batch.X, batch.size, some), select(batch.y, batch.size, some))])
    found.proofs = []
    return found


def _agree(name: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> bool:
    before, now, scale = there.get(name), here.get(name), here.get(_WITNESSES[name])
    if before is None or now is None or scale is None:
        return before is now is None
    rounding = torch.finfo(getattr(torch, here["dtype"])).eps ** 0.7  # 1e-5 in single precision, 1e-11 in double
    return abs(before - now) <= rounding * abs(scale)


def _digest(*values: Any, named: Mapping[int, str] | None = None) -> bytes:
    digest = _Digest(named or {})
    for value in values:
        digest.add(value)
    return digest.hash.digest()


class _Digest:
    """A hash of what objects hold; tensors that are known by their `id` go by their names.

    Names of modules are left out: a script's is another where it is imported.
    """

    def __init__(self, named: Mapping[int, str]) -> None:
        self._known = named
        self.hash = hashlib.blake2b(digest_size=16)
        #: with the objects, whose numbers would be given to others
        self._seen: dict[tuple[int, bool], tuple[int, Any]] = {}

    def add(self, value: Any, inner: bool = False) -> None:
        """Take in a value; of an object that is ``inner`` to another one only its class."""
        if isinstance(value, Tensor):
            self._tensor(value)
        elif isinstance(value, np.ndarray):
            self._text(value.dtype, value.shape)
            self.hash.update(np.ascontiguousarray(value).tobytes())
        elif isinstance(value, _PLAIN):
            self._text(repr(value))
        elif (id(value), inner) in self._seen:
            self._text("again", self._seen[id(value), inner][0])
        else:
            self._seen[id(value), inner] = (len(self._seen), value)
            self._text(type(value).__qualname__)
            self._parts(value, inner)

    def _parts(self, value: Any, inner: bool) -> None:
        if isinstance(value, Mapping):
            self._named(value, inner)
        elif isinstance(value, (list, tuple)):
            self._text(len(value))
            for one in value:
                self.add(one, inner)
        elif isinstance(value, (set, frozenset)):
            self._text(*sorted(_digest(one).hex() for one in value))
        elif isinstance(value, Module):
            self._module(value)
        elif isinstance(value, FunctionType):
            self._function(value)
        elif isinstance(value, CodeType):
            self._text(value.co_code.hex(), value.co_names)
            self.add(value.co_consts)
        elif isinstance(value, partial):
            self.add([value.func, value.args, value.keywords])
        elif isinstance(value, MethodType):
            self.add([value.__func__, value.__self__])
        elif name := getattr(value, "__qualname__", ""):
            self._text(name)  # a class, or a function of PyTorch's
        elif not inner:
            self.add(inspect.getattr_static(type(value), "__call__", None), inner=True)
            attributes = getattr(value, "__dict__", {})
            self._named({name: one for name, one in attributes.items() if not name.startswith("_")}, inner=True)

    def _module(self, module: Module) -> None:
        self._text(module.training)
        self.add(inspect.getattr_static(type(module), "forward", None), inner=True)
        self.add([list(getattr(module, name).values()) for name in _HOOKS])
        for parts in (module._parameters, module._buffers, module._modules):
            self._named(parts)
        self._named({name: one for name, one in vars(module).items() if name not in STANDARD})

    def _function(self, function: FunctionType) -> None:
        self._text(function.__qualname__)
        if (function.__module__ or "").partition(".")[0] in _FOREIGN:
            return
        self.add([function.__code__, function.__defaults__, function.__kwdefaults__])
        for cell in function.__closure__ or ():
            try:
                held = cell.cell_contents
            except ValueError:  # not filled yet
                continue
            self.add(held)
        of_module = {name: function.__globals__.get(name) for name in _names(function.__code__)}
        some = (Tensor, np.ndarray, Module, FunctionType, partial, *_PLAIN)
        self._named({name: one for name, one in of_module.items() if isinstance(one, some)})

    def _named(self, parts: Mapping[Any, Any], inner: bool = False) -> None:
        self._text(len(parts))
        for name, one in parts.items():
            self.add(name)
            self.add(one, inner)

    def _tensor(self, tensor: Tensor) -> None:
        if id(tensor) in self._known:
            self._text("named", self._known[id(tensor)])
            return
        self._text(tensor.dtype, tuple(tensor.shape))
        if hasattr(tensor, "to_local"):
            tensor = tensor.to_local()  # this process's part of a DTensor
        plain = tensor.detach().to_dense() if tensor.layout != torch.strided else tensor.detach()
        flat = plain.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
        if flat.numel():
            buffer: Any = flat.view(torch.uint8).numpy()
            self.hash.update(buffer)

    def _text(self, *values: Any) -> None:
        text = json.dumps([str(value) for value in values])
        self.hash.update(text.encode())


def _names(code: CodeType) -> list[str]:
    """The names of what a function and those inside it look up."""
    inside = [name for const in code.co_consts if isinstance(const, CodeType) for name in _names(const)]
    return [*code.co_names, *inside]
