"""The tap: a function mode that sees each operation with the very tensor that is a parameter."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from curvops.fully_shard import gathering
from curvops.kronecker.conduct import SELECTS, conducted
from curvops.kronecker.lookups import Lookups
from curvops.kronecker.operations import ADDS, CASTS, INDEXING, OPENED, VIEWS, is_data_dependent, is_query
from curvops.kronecker.signature import PLAIN, Recording, Signature
from curvops.kronecker.uses import LinearUse, Rows, Use, VectorUse, View, Windows
from curvops.sharding import Gathering, gathered, is_sharded
from curvops.substitutions import COND, TABLE, cond, opened

Rule = Callable[..., Any]  # (taps, function, *args, **kwargs) -> output


class Taps(TorchFunctionMode):
    """Records how each parameter enters a forward pass of ``size`` data; rules say how to apply what takes them.

    For gradients of a ``conducting`` pass see `curvops.kronecker.conduct`.
    """

    def __init__(
        self, params: Mapping[str, Tensor], rules: Mapping[Any, Rule], size: int = 1, conducting: bool = False
    ) -> None:
        super().__init__()
        self._rules = rules
        self._uses: list[Use] = []
        self.lookups = Lookups()
        self.unknowns: dict[str, str] = {}  # parameters that also enter operations without a rule, and one such
        self.data_dependent = False  # whether which datum a row belongs to may depend on the data's values
        self.precision: torch.dtype | None = None  # the lowest that was computed in
        # a parameter without entries has no gradient to follow
        self._views = {id(p): View(name, (), None, p.shape) for name, p in params.items() if p.numel()}
        self._sizes = {name: p.numel() for name, p in params.items()}
        self._kept: list[Tensor] = list(params.values())  # ids stay valid while the tensors live
        self._recording = Recording(params.values(), size)
        self._active = True
        self._conducting = conducting
        self._operation = ""

    @property
    def uses(self) -> list[Use]:
        """The applications that a rule knows."""
        return [*self._uses, *self.lookups.uses]

    @property
    def pools(self) -> bool:
        """Whether the data's values enter by something that they have in common, such as their largest."""
        return self._recording.pools

    def signature(self, output: Tensor) -> Signature:
        """The operations of the pass, which gave an output."""
        return self._recording.signature(output)

    def gradients(self, outputs: Any, inputs: Any, cotangents: Any = None, **options: Any) -> tuple[Tensor | None, ...]:
        """`torch.autograd.grad`; what is run again in it (checkpointing) runs as before, and leaves no record."""
        self._active = False
        try:
            with gathering(), self:  # called plainly, it would be handed to the mode, and run without it
                return opened(torch.autograd.grad)(outputs, inputs, cotangents, **options)
        finally:
            self._active = True

    def view(self, tensor: Any) -> View | None:
        """The view of a parameter that a tensor is, if it is one."""
        return self._views.get(id(tensor)) if isinstance(tensor, Tensor) else None

    def unknown(self, *tensors: Any, how: str = "") -> None:
        """Parameters among the tensors enter the current operation without a rule."""
        for tensor in tensors if self._active else ():
            if (view := self.view(tensor)) is not None:
                self.unknowns.setdefault(view.name, self._operation + how)

    def linear(
        self,
        out: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        inputs: Callable[[], Rows],
        outputs: Callable[[Tensor], Tensor],
        input_side: str,
        kind: str,
    ) -> None:
        """Record a linear map of rows: weight, bias or both, as far as they are parameters."""
        w, b = self._of_matrix(weight), self.view(bias)
        if w is not None and w.index is not None and w.index.ndim == 2 and _is_natural(w.index.T, self._sizes[w.name]):
            # the transpose of a whole parameter is the parameter, applied the other way round
            w = View(w.name, (), None, w.index.T.shape)
            input_side = "left" if input_side == "right" else "right"
        if b is not None and b.repeats:
            lead = outputs(torch.empty(out.shape, device="meta")).shape[:-2]
            self.vector(out, bias, lambda g: outputs(g).flatten(-2), lead, kind)
            b = None
        if (w is not None or b is not None) and self._follows(out):
            if is_sharded(out):
                inputs, outputs = partial(_whole, inputs), partial(_whole, outputs)
            inputs = inputs if isinstance(inputs, Windows) else partial(_constant, inputs)
            edge, joint = get_gradient_edge(out), w is not None and b is not None
            self._uses.append(LinearUse(w, b, edge, inputs, outputs, input_side, joint, kind, out.shape))

    def vector(
        self, out: Tensor, vector: Tensor | None, rows: Callable[[Tensor], Tensor], lead: torch.Size, kind: str
    ) -> None:
        """Record a vector that is applied entry by entry."""
        v = self.view(vector)
        if v is None or not self._follows(out):
            return
        if is_sharded(out):
            rows = partial(_whole, rows)
        if v.repeats:  # and other passes may choose other entries: the gradient in the whole parameter
            assert v.index is not None
            size = self._sizes[v.name]
            rows = partial(_placed, rows, v.index.flatten(), size)
            v = View(v.name, (), None, torch.Size([size]))
        self._uses.append(VectorUse(v, get_gradient_edge(out), partial(_constant, rows), kind, lead))

    def lookup(self, out: Tensor, table: Tensor, ids: Tensor) -> None:
        """Record rows ``ids`` of a table that are looked up; −1 for rows without a gradient."""
        view = self._of_matrix(table)
        if view is not None and self._follows(out):
            self.lookups.start(out, view, ids, table.shape[0])

    def _of_matrix(self, tensor: Tensor | None) -> View | None:
        """The view of a parameter that is applied as a matrix; none where an index repeats its entries.

        The gradient in the entries is then no sum of outer products.
        """
        view = self.view(tensor)
        if view is not None and view.repeats:
            self.unknown(tensor, how=" by an index that repeats entries")
            return None
        return view

    def _follows(self, out: Tensor) -> bool:
        return self._active and out.requires_grad

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        query = is_query(func)
        out = func(*args, **kwargs) if query else self._run(func, args, kwargs)
        if self._active and (isinstance(out, Tensor) or not query):
            self._note(func, args, kwargs, out)
        return out

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        tensors = _tensors(args, kwargs)
        parameters = [t for t in tensors if id(t) in self._views]
        rows = [t for t in tensors if t in self.lookups] if self._active else []
        first: Any = args[0] if args else None
        arranged = func in VIEWS and [id(t) for t in parameters + rows] == [id(first)]
        if rows and not (arranged or func in ADDS or func in CASTS):
            self.lookups.use(rows)
        if func is COND:
            with self:
                return cond(*args, **kwargs)
        substitute = TABLE.get(func, func)
        if parameters or (rows and func in ADDS):
            self._operation = getattr(func, "__name__", str(func))
            if func in OPENED:
                with self:
                    return OPENED[func](*args, **kwargs)
            if func in self._rules and _fits(self._rules[func], 2 + len(args), tuple(kwargs)):
                return self._rules[func](self, substitute, *args, **kwargs)
        if self._conducting and func in SELECTS:
            out = conducted(args, kwargs, substitute)
        else:
            out = substitute(*args, **kwargs)
        if arranged:
            arrange = self._derive if parameters else self.lookups.arrange
            arrange(func, first, args[1:], kwargs, out)
        elif func in CASTS:
            if id(first) in self._views:
                self._remember(out, self._views[id(first)])
            elif first in self.lookups:
                self.lookups.cast(first, out)
        else:
            self.unknown(*parameters)
        return out

    def _note(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Note a call, and the precision of its result."""
        for tensor in self._recording.call(func, args, kwargs, out):
            dtype = tensor.dtype
            if dtype is not self.precision and tensor.requires_grad and dtype.is_floating_point and func not in VIEWS:
                self.precision = max(self.precision or dtype, dtype, key=lambda dtype: torch.finfo(dtype).eps)
        if not self.data_dependent:
            # which entries of a parameter were taken is told by the view's key
            by_values = is_data_dependent(func, args) and self.view(args[0] if args else None) is None
            self.data_dependent = by_values or self._recording.mixes

    def _derive(self, func: Any, tensor: Tensor, args: Any, kwargs: Any, out: Any) -> None:
        """The same operation on the entries' places tells which entries the result holds."""
        parent = self._views[id(tensor)]
        index = parent.index
        if index is None:
            index = torch.arange(parent.shape.numel(), device=tensor.device).view(parent.shape)
        places = func(index, *args, **kwargs)
        size = self._sizes[parent.name]
        for part, place in zip(*((out,), (places,)) if isinstance(out, Tensor) else (out, places), strict=True):
            if not place.numel():
                continue
            if _is_natural(place, size):
                self._remember(part, View(parent.name, (), None, part.shape))
            else:
                repeats = (parent.repeats or func in INDEXING) and int(place.flatten().bincount().max()) > 1
                self._remember(part, View(parent.name, _key(place), place, part.shape, repeats))

    def _remember(self, tensor: Tensor, view: View) -> None:
        self._views[id(tensor)] = view
        self._kept.append(tensor)
        if self._active:
            self._recording.add(view.key)


@cache
def _fits(function: Any, count: int, names: tuple[str, ...]) -> bool:
    """Whether a rule knows all arguments of a call: so many by place, and those with names."""
    try:
        inspect.signature(function).bind(*[None] * count, **dict.fromkeys(names))
    except TypeError:
        return False
    return True


def _constant(rows: Callable[..., Any], *args: Tensor) -> Any:
    """Rows without the graph of what they are made of."""
    with torch.no_grad():
        made = rows(*args)
    return made.detach() if isinstance(made, Tensor) else made


def _whole(rows: Callable[..., Any], *args: Tensor) -> Any:
    """Rows of a layer that is cut over processes, whole."""
    with Gathering():
        return gathered(rows(*args))


def _placed(rows: Callable[[Tensor], Tensor], places: Tensor, size: int, g: Tensor) -> Tensor:
    """Rows as parts of longer ones; what falls on one place is added."""
    found = rows(g)
    return found.new_zeros(*found.shape[:-1], size).index_add_(-1, places, found)


def _is_natural(place: Tensor, size: int) -> bool:
    """Whether a view holds all entries of its parameter in their order."""
    return place.numel() == size and torch.equal(place.flatten(), torch.arange(size, device=place.device))


def _key(place: Tensor) -> tuple[object, ...]:
    """Views with the same key hold the same entries in the same order."""
    flat = place.flatten()
    ramp = torch.arange(1, len(flat) + 1, device=place.device, dtype=torch.float64)
    return (tuple(place.shape), int(flat[0]), float((flat * ramp.sqrt()).sum()))


def _tensors(args: Any, kwargs: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for value in (*args, *kwargs.values()):
        if type(value) in PLAIN:  # most settings are; to ask whether something is a tensor takes longer
            continue
        if isinstance(value, (list, tuple)):
            found.extend(t for t in value if isinstance(t, Tensor))
        elif isinstance(value, Tensor):
            found.append(value)
    return found
