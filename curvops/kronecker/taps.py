"""The tap: a function mode that sees each operation with the very tensor that is a parameter."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from curvops.kronecker import contractions, recurrent  # noqa: F401  # they register their rules
from curvops.kronecker.elementwise import ADDS
from curvops.kronecker.lookups import Lookups
from curvops.kronecker.rules import RULES
from curvops.kronecker.uses import LinearUse, OneHot, Rows, Use, VectorUse, View, Windows
from curvops.substitutions import TABLE, embedding, embedding_bag, grouped_mm, linear_cross_entropy, opened

# Python functions of torch.nn.functional that apply parameters by operations inside
COMPOSITE = {F.multi_head_attention_forward}
# substitutes whose own operations apply parameters
TRANSPARENT = {embedding, embedding_bag, grouped_mm, linear_cross_entropy}
# operations that give a part or a rearrangement of a parameter
VIEWS = {
    getattr(owner, name)
    for name in [
        "t",
        "transpose",
        "permute",
        "view",
        "reshape",
        "flatten",
        "unflatten",
        "chunk",
        "split",
        "unbind",
        "narrow",
        "select",
        "squeeze",
        "unsqueeze",
        "contiguous",
        "movedim",
        "swapaxes",
        "swapdims",
        "view_as",
        "reshape_as",
        "tensor_split",
        "split_with_sizes",
        "adjoint",
        "moveaxis",
        "index_select",
    ]
    for owner in (torch, Tensor)
    if hasattr(owner, name)
} | {Tensor.T.__get__, Tensor.mT.__get__, Tensor.__getitem__, torch.split, Tensor.split}  # type: ignore[attr-defined]
CASTS = {
    Tensor.to,
    Tensor.float,
    Tensor.double,
    Tensor.half,
    Tensor.bfloat16,
    Tensor.type,
    Tensor.type_as,
    Tensor.clone,
    torch.clone,
}
# what reads a tensor without its values
NEUTRAL = {"shape", "dtype", "device", "ndim", "requires_grad", "is_cuda", "layout", "grad", "is_leaf", "grad_fn"}
QUERIES = {
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.stride,
    Tensor.is_contiguous,
    Tensor.__len__,
    Tensor.__hash__,
    Tensor.is_floating_point,
    torch.is_tensor,
    Tensor.storage_offset,
    Tensor.untyped_storage,
    Tensor.data_ptr,
    Tensor.element_size,
    Tensor.get_device,
    torch.is_floating_point,
    Tensor.detach,
    torch.is_autocast_enabled,
}
# operations whose rows depend on the data's values: the layout must be certified for each batch
DATA_DEPENDENT = {
    torch.nonzero,
    Tensor.nonzero,
    torch.masked_select,
    Tensor.masked_select,
    torch.argwhere,
    Tensor.argwhere,
    torch.sort,
    Tensor.sort,
    torch.argsort,
    Tensor.argsort,
    torch.unique,
    Tensor.unique,
    torch.topk,
    Tensor.topk,
}


class Taps(TorchFunctionMode):
    """Records how each parameter enters a forward pass.

    Args:
        leaves: The parameters that the model is run with, by name.

    Attributes:
        lookups: Rows of tables that are followed.
        unknowns: Names of parameters that also enter operations without a rule, and one such operation.
        data_dependent: Whether rows may be ordered by the data's values.
        precision: The lowest that was computed in.
        activations: Bytes of the operations' results that carry a graph.
    """

    def __init__(self, leaves: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._uses: list[Use] = []
        self.lookups = Lookups()
        self.unknowns: dict[str, str] = {}
        self.data_dependent = False
        self.precision: torch.dtype | None = None
        self.activations = 0
        self._views = {id(leaf): View(name, (), None, leaf.shape) for name, leaf in leaves.items()}
        self._sizes = {name: leaf.numel() for name, leaf in leaves.items()}
        self._kept: list[Tensor] = list(leaves.values())  # ids stay valid while the tensors live
        self._operation = ""

    @property
    def uses(self) -> list[Use]:
        """The applications that a rule knows."""
        return [*self._uses, *self.lookups.uses]

    def view(self, tensor: Any) -> View | None:
        """The view of a parameter that a tensor is, if it is one."""
        return self._views.get(id(tensor)) if isinstance(tensor, Tensor) else None

    def unknown(self, *tensors: Any) -> None:
        """Parameters among the tensors enter the current operation without a rule."""
        for tensor in tensors:
            if (view := self.view(tensor)) is not None:
                self.unknowns.setdefault(view.name, self._operation)

    def linear(
        self,
        out: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        inputs: Callable[[], Rows],
        outputs: Callable[[Tensor], Tensor],
        input_side: str,
        kind: str,
    ) -> None:
        """Record a linear map of rows."""
        w, b = self.view(weight), self.view(bias)
        if w is not None and w.index is not None and w.index.ndim == 2 and _is_natural(w.index.T, self._sizes[w.name]):
            # the transpose of a whole parameter is the parameter, applied the other way round
            w = View(w.name, (), None, w.index.T.shape)
            input_side = "left" if input_side == "right" else "right"
        if w is None:
            self.bias(out, bias, outputs, kind)
        elif out.requires_grad:
            edge, inputs = get_gradient_edge(out), inputs if isinstance(inputs, Windows) else _constant(inputs)
            self._uses.append(LinearUse(w, b, edge, inputs, outputs, input_side, b is not None, kind, out.shape))

    def bias(self, out: Tensor, bias: Tensor | None, outputs: Callable[[Tensor], Tensor], kind: str) -> None:
        """Record a bias whose weight is no parameter, or that cannot join it."""
        b = self.view(bias)
        if b is not None and out.requires_grad:
            edge = get_gradient_edge(out)
            self._uses.append(
                LinearUse(None, b, edge, lambda: OneHot(torch.empty(0), 1), outputs, "right", False, kind, out.shape)
            )

    def vector(
        self, out: Tensor, vector: Tensor | None, rows: Callable[[Tensor], Tensor], lead: torch.Size, kind: str
    ) -> None:
        """Record a vector that is applied entry by entry."""
        v = self.view(vector)
        if v is None or not out.requires_grad:
            return
        if v.index is not None and (places := v.index.unique(return_inverse=True))[0].numel() < v.index.numel():
            # entries that the view holds several times
            v = View(v.name, (*v.key, "pooled"), places[0], places[0].shape)
            rows = _pooled(rows, places[1].flatten(), places[0].numel())
        self._uses.append(VectorUse(v, get_gradient_edge(out), _constant(rows), kind, lead))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (
            func in DATA_DEPENDENT
            or (func is Tensor.__getitem__ and _has_mask(args[1]))
            or (func is torch.where and len(args) == 1)
        ):
            self.data_dependent = True
        tensors = _tensors(args, kwargs)
        parameters = [t for t in tensors if id(t) in self._views]
        rows = [t for t in tensors if t in self.lookups]
        alone = len(rows) == 1 and rows[0] is args[0]
        if rows and func not in ADDS and not (alone and (func in VIEWS or func in CASTS)) and not _is_neutral(func):
            self.lookups.use(rows)
        substitute = TABLE.get(func, func)
        if not parameters and not (rows and func in ADDS):
            out = substitute(*args, **kwargs)
            self._note(func, args, out)
            if alone and func in VIEWS:
                self.lookups.arrange(func, rows[0], args[1:], kwargs, out)
            elif alone and func in CASTS:
                self.lookups.cast(rows[0], out)
            return out
        self._operation = getattr(func, "__name__", str(func))
        if func in COMPOSITE:
            with self:
                return opened(func)(*args, **kwargs)
        if substitute in TRANSPARENT:
            with self:
                return substitute(*args, **kwargs)
        if func in RULES and _fits(RULES[func], 2 + len(args), tuple(kwargs)):
            out = RULES[func](self, substitute, *args, **kwargs)
            self._note(func, args, out)
            return out
        out = substitute(*args, **kwargs)
        if func in VIEWS and len(parameters) == 1 and parameters[0] is args[0]:
            self._derive(func, args, kwargs, out)
        elif func in CASTS and parameters[0] is args[0] and isinstance(out, Tensor):
            self._remember(out, self._views[id(args[0])])
        elif not _is_neutral(func):
            self.unknown(*parameters)
        return out

    def _note(self, func: Any, args: Any, out: Any) -> None:
        """Note the precision of a result, and the memory that it takes."""
        if not (isinstance(out, Tensor) and out.is_floating_point() and out.requires_grad):
            return
        if out.dtype != self.precision and (
            self.precision is None or torch.finfo(out.dtype).eps > torch.finfo(self.precision).eps
        ):
            self.precision = out.dtype
        if func not in VIEWS:
            self.activations += out.numel() * out.itemsize
        if func is F.scaled_dot_product_attention:  # its scores, of all pairs of positions, stay inside
            self.activations += 2 * args[0].shape[:-1].numel() * args[1].shape[-2] * out.itemsize

    def _derive(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """The same operation on the entries' places tells which entries the result holds."""
        parent = self._views[id(args[0])]
        index = parent.index
        if index is None:
            index = torch.arange(parent.shape.numel(), device=args[0].device).view(parent.shape)
        places = func(index, *args[1:], **kwargs)
        for tensor, place in zip(*((out,), (places,)) if isinstance(out, Tensor) else (out, places), strict=True):
            size = self._sizes[parent.name]
            if _is_natural(place, size):
                self._remember(tensor, View(parent.name, (), None, tensor.shape))
            else:
                self._remember(tensor, View(parent.name, _key(place), place, tensor.shape))

    def _remember(self, tensor: Tensor, view: View) -> None:
        self._views[id(tensor)] = view
        self._kept.append(tensor)


@cache
def _fits(function: Any, count: int, names: tuple[str, ...]) -> bool:
    """Whether a rule knows all arguments of a call: so many by place, and those with names."""
    try:
        inspect.signature(function).bind(*[None] * count, **dict.fromkeys(names))
    except TypeError:
        return False
    return True


def _constant(rows: Callable[..., Any]) -> Callable[..., Any]:
    """The same rows without the graph of what they are made of."""

    def run(*args: Tensor) -> Any:
        with torch.no_grad():
            made = rows(*args)
        return made.detach() if isinstance(made, Tensor) else made

    return run


def _pooled(rows: Callable[[Tensor], Tensor], places: Tensor, size: int) -> Callable[[Tensor], Tensor]:
    def run(g: Tensor) -> Tensor:
        found = rows(g)
        return found.new_zeros(*found.shape[:-1], size).index_add_(-1, places, found)

    return run


def _is_natural(place: Tensor, size: int) -> bool:
    """Whether a view holds all entries of its parameter in their order."""
    return place.numel() == size and torch.equal(place.flatten(), torch.arange(size, device=place.device))


def _key(place: Tensor) -> tuple[object, ...]:
    """Views with the same key hold the same entries in the same order."""
    flat = place.flatten()
    ramp = torch.arange(1, len(flat) + 1, device=place.device, dtype=torch.float64)
    return (tuple(place.shape), int(flat[0]) if len(flat) else -1, float((flat * ramp.sqrt()).sum()))


def _tensors(args: Any, kwargs: Any) -> list[Tensor]:
    found = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found.extend(t for t in value if isinstance(t, Tensor))
    return found


def _has_mask(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, Tensor) and part.dtype in (torch.bool, torch.int64) and part.ndim > 0 for part in parts)


def _is_neutral(func: Any) -> bool:
    """Whether an operation reads a tensor without its values."""
    owner = getattr(func, "__self__", None)
    return func in QUERIES or getattr(owner, "__name__", "") in NEUTRAL
