"""What must be as the caller left it: random generators, autocast, gradient mode, settings that are switched for a call."""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from threading import Lock
from typing import Any

import torch
from torch import Tensor

# what a model or a loss may raise on data that are cut or joined otherwise than it expects
UNFIT = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError)
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
    """The caller's autocast state: the model runs in it, our own algebra without it."""

    def __init__(self, device: torch.device) -> None:
        self.kind = device.type
        self.enabled, self.dtype = torch.is_autocast_enabled(self.kind), torch.get_autocast_dtype(self.kind)

    def off(self) -> torch.autocast:
        return torch.autocast(self.kind, enabled=False)

    def on(self) -> AbstractContextManager[Any]:
        """A context in the caller's state (without the cache of cast weights, which would outlive the graph)."""
        return torch.autocast(self.kind, dtype=self.dtype, cache_enabled=False) if self.enabled else nullcontext()
