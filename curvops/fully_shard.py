"""Models of PyTorch's ``fully_shard``, whose own hooks gather copies of parameters in which there are no second derivatives.

Here the hooks rest, and each operation that takes a parameter gathers it. What its backward pass needs of it is gathered
again there, so that no process holds more than one parameter whole, besides those that are gathered as it computes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import Module
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from curvops.sharding import gathered, is_sharded
from curvops.tree import map_tensors

Hook = Callable[[Any], Any]
_PACKAGE = "torch.distributed.fsdp"
# what operations are asked that the parts know of the whole, too; to gather for them would be slow, not wrong
_KNOWN = {
    *("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf"),
    *("size", "dim", "numel", "__len__", "is_floating_point", "is_complex"),
}
_NOW: ContextVar[Gathering | None] = ContextVar("what gathers parameters", default=None)


def fully_sharded(modules: Iterable[Module]) -> list[Module]:
    """Those modules to which ``fully_shard`` was applied."""
    kind = getattr(sys.modules.get(_PACKAGE), "FSDPModule", ())  # which takes long to import, and is there if one is
    return [module for module in modules if isinstance(module, kind)]


def check_fully_sharded(modules: Iterable[Module]) -> bool:
    """Whether ``fully_shard`` was applied to one of the modules, in a way that is known here.

    Raises:
        TypeError: If it computes in another precision than that of the parameters, or beside tensor parallelism.
        ValueError: If parameters are gathered at the moment.
    """
    own = fully_sharded(modules)
    for module in own:
        state = module._get_fsdp_state()  # type: ignore[operator]
        policy, groups = state._mp_policy, state._fsdp_param_groups
        several = [p for p in module.parameters() if sum(how.is_shard() for how in getattr(p, "placements", ())) > 1]
        if policy.param_dtype is not None or policy.output_dtype is not None or several:
            what = "parameters that are cut along two axes" if several else f"{policy}"
            raise TypeError(
                f"model_func: fully_shard with {what} is not supported. Use it without, or cut the parameters as plain DTensors "
                "(torch.distributed.tensor.distribute_module, or parallelize_module)."
            )
        if not all(group.is_sharded for group in groups):
            raise ValueError(
                f"model_func: the parameters of {type(module).__name__} are gathered at the moment, as after a forward pass. Call "
                "reshard() of each module to which fully_shard was applied, and then take the parameters."
            )
    return bool(own)


def gathering() -> AbstractContextManager[Any]:
    """The context in which a model runs forward, or again in a backward pass; below the modes that see its operations."""
    now = _NOW.get()
    return nullcontext() if now is None else now.on()


@contextmanager
def at_rest(modules: list[Module]) -> Iterator[None]:
    """The hooks of ``fully_shard`` do nothing, and `gathering` is what gathers the modules' parameters."""
    own = fully_sharded(modules)
    if not own or _NOW.get() is not None:
        yield
        return
    before = _NOW.set(Gathering(p for m in modules for p in m._parameters.values() if p is not None and is_sharded(p)))
    try:
        with ExitStack() as stack:
            for module in own:
                for hooks in (module._forward_pre_hooks, module._forward_hooks):
                    for key, hook in list(hooks.items()):
                        if hook.__module__.startswith(_PACKAGE):
                            stack.callback(hooks.__setitem__, key, hook)
                            hooks[key] = _rest  # under the same key, so that the order stays
            yield
    finally:
        _NOW.reset(before)


def _rest(*_: Any) -> None:
    """A hook that does nothing."""


class Kept(NamedTuple):
    """A tensor in a graph: as other hooks keep it, how they give it back, and its place in the memory if it is gathered."""

    tensor: Any
    unpack: Hook
    layout: tuple[Any, ...] | None


class Gathering(TorchFunctionMode):
    """Operations take some tensors whole that are cut over processes; no graph keeps them whole."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self._cut = {id(tensor): tensor for tensor in tensors}
        self._gathered: Any = WeakIdKeyDictionary()  # by memory, of which tensor it is

    @contextmanager
    def on(self) -> Iterator[None]:
        """The mode, and graphs that keep the parts only; what is run again (checkpointing) has hooks of its own."""
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(False) or (_as_it_is, _as_it_is)
        with saved_tensors_hooks(partial(self._pack, *hooks), self._unpack), self:
            yield

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _name(func) in _KNOWN or func is torch.autograd.grad:
            return func(*args, **kwargs)
        return func(*map_tensors(self._whole, args), **map_tensors(self._whole, kwargs))

    def _whole(self, tensor: Tensor) -> Tensor:
        return self._gather(tensor) if id(tensor) in self._cut else tensor

    def _gather(self, tensor: Tensor) -> Tensor:
        found = gathered(tensor)
        self._gathered[found.untyped_storage()] = tensor
        return found

    def _pack(self, pack: Hook, unpack: Hook, tensor: Tensor) -> Kept:
        """What a graph keeps of a tensor, by the hooks that are there besides: of one that was gathered its parts."""
        cut = self._gathered.get(tensor.untyped_storage()) if tensor.layout == torch.strided else None
        layout = None if cut is None else (tensor.shape, tensor.stride(), tensor.storage_offset())
        with torch._C.DisableTorchFunction():  # backward passes run in this mode, too
            return Kept(pack(tensor if cut is None else cut), unpack, layout)

    def _unpack(self, kept: Kept) -> Tensor:
        with torch._C.DisableTorchFunction():
            found: Tensor = kept.unpack(kept.tensor)
            return found if kept.layout is None else self._gather(found.detach()).as_strided(*kept.layout)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _name(func: Any) -> str:
    owner = getattr(func, "__self__", None)  # of an attribute's getter
    return str(getattr(owner, "__name__", None) or getattr(func, "__name__", ""))
