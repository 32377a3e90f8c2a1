"""What must be as the caller left it: random generators, autocast, gradient mode, settings that are switched for a call."""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial, wraps
from threading import Lock
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

# what a model or a loss may raise on data that are cut or joined otherwise than it expects
UNFIT = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError)
SomeMethod = TypeVar("SomeMethod", bound=Callable[..., Any])
_LOCK = Lock()
_SWITCHED: dict[Hashable, tuple[ExitStack, int]] = {}  # what is switched now, and by how many calls


@contextmanager
def switched(key: Hashable, switch: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """A setting that all threads feel, switched while any call needs it: the first one switches it, the last one back."""
    with _LOCK:
        stack, count = _SWITCHED.get(key, (ExitStack(), 0))
        if not count:
            stack.enter_context(switch())
        _SWITCHED[key] = stack, count + 1
    try:
        yield
    finally:
        with _LOCK:
            stack, count = _SWITCHED.pop(key)
            if count > 1:
                _SWITCHED[key] = stack, count - 1
            else:
                stack.close()


def quietly() -> AbstractContextManager[None]:
    """A context for trials, such as on a few data, whose warnings are none of the caller's business."""
    return switched("warnings", _ignoring)


@contextmanager
def _ignoring() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def requiring_gradients(tensors: Iterable[Tensor]) -> Iterator[None]:
    """The caller's tensors require gradients, those too that did not."""
    with ExitStack() as stack:
        for tensor in tensors:
            if tensor.is_leaf and (not tensor.requires_grad or ("gradients", id(tensor)) in _SWITCHED):
                stack.enter_context(switched(("gradients", id(tensor)), partial(_requiring, tensor)))
        yield


@contextmanager
def _requiring(tensor: Tensor) -> Iterator[None]:
    with ExitStack() as stack:
        stack.callback(tensor.requires_grad_, tensor.requires_grad)
        tensor.requires_grad_(True)
        yield


@contextmanager
def preserved_random_state(data: object = None) -> Iterator[None]:
    """Put back the global random state (PyTorch's on all devices, NumPy's, Python's) and a loader's own on the way out."""
    sampler = getattr(data, "sampler", None)
    owners = (data, sampler, getattr(getattr(data, "batch_sampler", None), "sampler", None))
    generators = [g for g in (getattr(owner, "generator", None) for owner in owners) if isinstance(g, torch.Generator)]
    numpy: Any = sys.modules.get("numpy.random")
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices), ExitStack() as stack:
        stack.callback(random.setstate, random.getstate())
        if numpy is not None:
            stack.callback(numpy.set_state, numpy.get_state())
        for generator in generators:
            stack.callback(generator.set_state, generator.get_state())
        yield


@contextmanager
def attributes_kept(owners: Iterable[object]) -> Iterator[None]:
    """Put back attributes that objects set as they run."""
    kept = [(own, dict(own)) for own in (getattr(owner, "__dict__", None) for owner in owners) if own is not None]
    try:
        yield
    finally:
        for now, before in kept:
            for name in [name for name, value in now.items() if before.get(name, now) is not value]:
                if name in before:
                    now[name] = before[name]
                else:
                    del now[name]


@contextmanager
def differentiable() -> Iterator[None]:
    """Gradients on, whatever mode the caller is in."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


class Autocast:
    """An autocast state: the caller's model runs in the caller's, our own algebra without it."""

    def __init__(self, device: torch.device) -> None:
        self.kind = device.type
        self.enabled, self.dtype = torch.is_autocast_enabled(self.kind), torch.get_autocast_dtype(self.kind)

    @classmethod
    def of_caller(cls, device: torch.device) -> Autocast:
        """The state here, or around our own algebra where we are in it."""
        around = _AROUND.get()
        return cls(device) if around is None or around.kind != device.type else around

    def off(self) -> torch.autocast:
        return torch.autocast(self.kind, enabled=False)

    def on(self) -> AbstractContextManager[Any]:
        """A context in the caller's state (without the cache of cast weights, which would outlive the graph)."""
        return torch.autocast(self.kind, dtype=self.dtype, cache_enabled=False) if self.enabled else nullcontext()


# the caller's state while our own algebra runs without it
_AROUND: ContextVar[Autocast | None] = ContextVar("the caller's autocast state around our own algebra", default=None)


def own_precision(device: torch.device) -> AbstractContextManager[None]:
    """A context for our own algebra, which the caller's autocast is not to round."""
    # asked first, for it is cheap beside a small product
    return _own_precision(device) if torch._C._is_any_autocast_enabled() else nullcontext()


def in_own_precision(method: SomeMethod) -> SomeMethod:
    """The method of something on a ``device``, in our own precision."""

    @wraps(method)
    def call(self: Any, *args: Any, **options: Any) -> Any:
        with own_precision(self.device):
            return method(self, *args, **options)

    return cast(SomeMethod, call)


def callers_precision() -> AbstractContextManager[None]:
    """A context within our own algebra for code of the caller's, in the autocast state that was around it."""
    around = _AROUND.get()
    return nullcontext() if around is None else _callers_precision(around)


@contextmanager
def _own_precision(device: torch.device) -> Iterator[None]:
    if not (torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)):
        yield
        return
    state = Autocast(device)
    token = _AROUND.set(state)
    try:
        with state.off():
            yield
    finally:
        _AROUND.reset(token)


@contextmanager
def _callers_precision(around: Autocast) -> Iterator[None]:
    token = _AROUND.set(None)
    try:
        with around.on():
            yield
    finally:
        _AROUND.reset(token)
