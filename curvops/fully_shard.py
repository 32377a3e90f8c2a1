"""Models of PyTorch's ``fully_shard``, whose own hooks gather copies of parameters in which there are no second derivatives.

Here the hooks rest, and each operation that takes a parameter gathers it. What its backward pass needs of it is gathered
again there, so that no process holds more than one parameter whole, besides those that are gathered as it computes.
"""

from __future__ import annotations

import re
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

from curvops.context import switched
from curvops.divided import Parts
from curvops.ranks import Ranks
from curvops.sharding import LEAST, Sharding, gathered, is_sharded
from curvops.tree import map_tensors, tensors_of

Hook = Callable[[Any], Any]
_PACKAGE = "torch.distributed.fsdp"
_IN_PLACE = re.compile(
    r"(?!requires_grad_|detach_)(?:_foreach_)?[a-z]\w*_|__setitem__|__i(add|sub|mul|truediv|floordiv|mod|pow|and|or|xor|lshift|rshift)__"
)
# what operations are asked that the parts know of the whole, too; to gather for them would be slow, not wrong
_KNOWN = {
    *("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf"),
    *("size", "dim", "numel", "__len__", "is_floating_point", "is_complex"),
}
GATHERS = (
    "a module of fully_shard gathers its parameters during a computation of curvature, in which it takes part in a way that is not "
    "seen: by unshard() or register_fsdp_forward_method, in the data's iteration, or as a part of model_func that is not found. Pass "
    "the module itself as model_func, and let it be called as a module."
)
_WATCHED: ContextVar[bool] = ContextVar("whether modules that gather by themselves are an error", default=False)
_NOW: ContextVar[WholeAtUse | None] = ContextVar("what gathers parameters", default=None)


def fully_sharded(modules: Iterable[Module]) -> list[Module]:
    """Those modules to which ``fully_shard`` was applied."""
    kind = getattr(sys.modules.get(_PACKAGE), "FSDPModule", ())  # which takes long to import, and is there if one is
    return [module for module in modules if isinstance(module, kind)]


def check_fully_sharded(modules: Iterable[Module]) -> bool:
    """Whether ``fully_shard`` was applied to one of the modules, in a way that is known here.

    Raises:
        TypeError: If it computes in another precision than that of the parameters, or beside tensor parallelism; with a
            PyTorch that is older than what is known to be right.
        ValueError: If parameters are gathered at the moment.
    """
    own = fully_sharded(modules)
    if own and torch.__version__ < LEAST:
        raise TypeError(f"model_func: fully_shard needs PyTorch {LEAST} or newer, got {torch.__version__}.")
    for module in own:
        state = module._get_fsdp_state()  # type: ignore[operator]
        policy = state._mp_policy
        several = [p for p in module.parameters() if sum(how.is_shard() for how in getattr(p, "placements", ())) > 1]
        if policy.param_dtype is not None or policy.output_dtype is not None or several:
            what = "parameters that are cut along two axes" if several else f"{policy}"
            raise TypeError(
                f"model_func: fully_shard with {what} is not supported. Use it without, or cut the parameters as plain DTensors "
                "(torch.distributed.tensor.distribute_module, or parallelize_module)."
            )
    _expect_cut(own)
    return bool(own)


def _expect_cut(modules: list[Module]) -> None:
    for module in modules:
        if not all(group.is_sharded for group in module._get_fsdp_state()._fsdp_param_groups):  # type: ignore[operator]
            raise ValueError(
                f"model_func: the parameters of {type(module).__name__} are gathered at the moment, as after a forward pass. Call "
                "reshard() of each module to which fully_shard was applied, and then take the parameters."
            )


def gathering() -> AbstractContextManager[Any]:
    """The context in which a model runs forward, or again in a backward pass; below the modes that see its operations."""
    now = _NOW.get()
    return nullcontext() if now is None else now.on()


@contextmanager
def at_rest(modules: list[Module], ranks: Ranks | None = None) -> Iterator[None]:
    """The hooks of ``fully_shard`` do nothing, and `gathering` is what gathers the modules' parameters.

    Where the processes that have the parts divide the data, these are the ``ranks`` over which gradients are summed.
    """
    own, now = fully_sharded(modules), _NOW.get()
    cut = [p for m in modules for p in m._parameters.values() if p is not None and is_sharded(p)]
    if now is not None and now.ranks is ranks and all(p in now for p in cut):
        yield
        return
    _expect_cut(own)
    before = _NOW.set(WholeAtUse(cut, now, ranks))
    try:
        with ExitStack() as stack:
            for module in own:
                for hooks in (module._forward_pre_hooks, module._forward_hooks):
                    for key, hook in list(hooks.items()):
                        if str(getattr(hook, "__module__", "")).startswith(_PACKAGE):
                            stack.callback(hooks.__setitem__, key, hook)
                            hooks[key] = _rest  # under the same key, so that the order stays
            yield
    finally:
        _NOW.reset(before)


@contextmanager
def unused() -> Iterator[None]:
    """Where a module gathers its parameters by itself (it is not among the model's, or was asked to), that is an error.

    PyTorch takes no derivatives in its copies, so that a matrix would be zero.
    """
    kind = getattr(sys.modules.get(_PACKAGE), "FSDPModule", None)
    if kind is None or not kind.__subclasses__():  # fully_shard makes one of each class that it is applied to
        yield
        return
    before = _WATCHED.set(True)
    try:
        with switched("fully_shard", _watched):
            yield
    finally:
        _WATCHED.reset(before)


@contextmanager
def _watched() -> Iterator[None]:
    from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
    from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState

    own = FSDPState._root_pre_forward, FSDPParamGroup.unshard

    def begin(state: Any, *args: Any) -> Any:
        if _WATCHED.get() and torch.is_grad_enabled():
            state._training_state = TrainingState.IDLE  # as before this call
            raise RuntimeError(GATHERS)
        return own[0](state, *args)

    def unshard(group: Any, *args: Any, **kwargs: Any) -> Any:
        if _WATCHED.get() and torch.is_grad_enabled():
            raise RuntimeError(GATHERS)
        return own[1](group, *args, **kwargs)

    FSDPState._root_pre_forward, FSDPParamGroup.unshard = begin, unshard  # type: ignore[assignment]
    try:
        yield
    finally:
        FSDPState._root_pre_forward, FSDPParamGroup.unshard = own  # type: ignore[method-assign]


def _rest(*_: Any) -> None:
    """A hook that does nothing."""


class Kept(NamedTuple):
    """A tensor in a graph: as other hooks keep it, how they give it back, and its place in the memory if it is gathered."""

    tensor: Any
    unpack: Hook
    layout: tuple[Any, ...] | None
    parts: Parts | None


class WholeAtUse(TorchFunctionMode):
    """Operations take some tensors whole that are cut over processes; no graph keeps them whole."""

    def __init__(self, tensors: Iterable[Tensor], others: WholeAtUse | None = None, ranks: Ranks | None = None) -> None:
        super().__init__()
        self.ranks = ranks
        # tensors, and how their gradients are summed over processes that have other data
        self._cut: dict[int, tuple[Tensor, Parts | None]] = {} if others is None else dict(others._cut)
        for k, tensor in enumerate(tensors):
            name = f"parameter {k} of shape {tuple(tensor.shape)}"
            self._cut[id(tensor)] = tensor, None if ranks is None else Parts(Sharding.of(tensor), ranks, name)
        self._gathered: Any = WeakIdKeyDictionary()  # by memory, of which tensor it is

    def __contains__(self, tensor: Tensor) -> bool:
        return id(tensor) in self._cut

    @contextmanager
    def on(self) -> Iterator[None]:
        """The mode, and graphs that keep the parts only; what is run again (checkpointing) has hooks of its own."""
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(False) or (_alone, _as_it_is)
        with saved_tensors_hooks(partial(self._pack, *hooks), self._unpack), self:
            yield

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = _name(func)
        if name in _KNOWN:
            return func(*args, **kwargs)
        if func is torch.autograd.grad and any(tensor in self for tensor in tensors_of((args, kwargs))):
            raise RuntimeError(
                "the model takes a gradient in one of its own parameters, of which fully_shard has parts only. Pass the model whole."
            )
        changed = [kwargs.get("out"), *(args[:1] or list(kwargs.values())[:1]) * bool(_IN_PLACE.fullmatch(name))]
        if any(self._is_of_cut(tensor) for tensor in tensors_of(changed)):
            raise RuntimeError(
                f"the model changes a parameter in place ({name}), of which fully_shard has parts only. Change it before, outside of forward()."
            )
        return func(*map_tensors(self._whole, args), **map_tensors(self._whole, kwargs))

    def _is_of_cut(self, tensor: Tensor) -> bool:
        strided = tensor.layout == torch.strided and not is_sharded(tensor)
        return tensor in self or (strided and tensor.untyped_storage() in self._gathered)

    def _whole(self, tensor: Tensor) -> Tensor:
        return self._gather(*self._cut[id(tensor)]) if id(tensor) in self._cut else tensor

    def _gather(self, tensor: Tensor, parts: Parts | None) -> Tensor:
        found = gathered(tensor) if parts is None else parts.whole(tensor)
        self._gathered[found.untyped_storage()] = tensor, parts
        return found

    def _pack(self, pack: Hook, unpack: Hook, tensor: Tensor) -> Kept:
        """What a graph keeps of a tensor, by the hooks that are there besides: of one that was gathered its parts."""
        known = self._gathered.get(tensor.untyped_storage()) if tensor.layout == torch.strided else None
        cut, parts = known or (None, None)
        if cut is not None and (tensor.dtype != cut.dtype or tensor.is_conj() or tensor.is_neg()):
            cut = None  # a view that a place in the memory does not tell
        layout = None if cut is None else (tensor.shape, tensor.stride(), tensor.storage_offset())
        with torch._C.DisableTorchFunction():  # backward passes run in this mode, too
            return Kept(pack(tensor if cut is None else cut), unpack, layout, parts)

    def _unpack(self, kept: Kept) -> Tensor:
        with torch._C.DisableTorchFunction():
            found: Tensor = kept.unpack(kept.tensor)
            return found if kept.layout is None else self._gather(found.detach(), kept.parts).as_strided(*kept.layout)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _alone(tensor: Tensor) -> Tensor:
    """Without its graph, as the node that keeps its own output would keep itself; PyTorch puts the graph back."""
    return tensor if tensor.is_leaf else tensor.detach()


def _name(func: Any) -> str:
    owner = getattr(func, "__self__", None)  # of an attribute's getter
    return str(getattr(owner, "__name__", None) or getattr(func, "__name__", ""))
