"""Named tensors as vectors: flat, list and dict formats, each with optional columns."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import reduce
from itertools import accumulate
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from curvops.sharding import Sharding, gathered, is_sharded, local, shardings

Vector: TypeAlias = Tensor | Sequence[Tensor] | Mapping[str, Tensor]


class Format(NamedTuple):
    """How a vector was given, so that the answer can be given likewise."""

    kind: str  # "flat", "array" (NumPy's), "list", "tuple" or "dict"
    columns: bool
    leading: bool = False  # whether the axis of several vectors leads, as it does from the left
    cuts: Mapping[str, Sharding] = {}  # of tensors that the space knows whole, how they were cut over processes


class TensorSpace:
    """The space of vectors with one entry per entry of some named tensors.

    A vector is the concatenation of the flattened (row-major) tensors in their order: a tensor or a NumPy array ``[D]``
    or ``[D, K]``, a list of tensors (each of its shape, optionally with a trailing axis of ``K`` columns), or a dict of
    such by name. Of the given tensors only shapes, dtypes and the device are read. Where some are cut over processes
    (DTensors), or ``shards`` says how they are, shapes and entries are those of this process's parts, and vectors are lists
    or dicts of DTensors.

    Raises:
        ValueError: If there is no tensor, or they are spread over several devices.
        TypeError: If an entry is not a real floating-point tensor.

    Example:
        >>> import torch
        >>> from curvops import TensorSpace
        >>> space = TensorSpace({"weight": torch.zeros(2, 3), "bias": torch.zeros(2)})
        >>> space.dim, space.slice("bias")
        (8, slice(6, 8, None))
        >>> [tuple(t.shape) for t in space.split(torch.arange(8.0))]
        [(2, 3), (2,)]
    """

    def __init__(self, tensors: Mapping[str, Tensor], shards: Mapping[str, Sharding] | None = None) -> None:
        if not isinstance(tensors, Mapping):
            raise TypeError(
                f"expected a dict of named tensors, got {type(tensors).__name__}. "
                "Pass dict(model.named_parameters()) or a subset of it."
            )
        if not tensors:
            raise ValueError("expected at least one named tensor, got an empty dict.")
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise TypeError(f"{name!r}: expected a real floating-point tensor, got {got}.")
        self.names = list(tensors)
        #: of tensors that are cut over processes, how; shapes and entries are those of this process's parts
        self.shards = shardings(tensors) if shards is None else dict(shards)
        self.shapes = {name: local(tensor).shape for name, tensor in tensors.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
        devices = {tensor.device for tensor in tensors.values()}
        if len(devices) > 1:
            raise ValueError(
                f"expected all tensors on one device, got {sorted(map(str, devices))}. "
                "Move the model to one device, or pass the parameters of one device only."
            )
        self.device = devices.pop()
        self.dtype = reduce(torch.promote_types, self.dtypes.values())
        #: precision for sums over many batches, at least single
        self.sum_dtype = torch.promote_types(self.dtype, torch.float32)
        self.sizes = [shape.numel() for shape in self.shapes.values()]
        self.dim = sum(self.sizes)
        ends = zip(self.shapes, self.sizes, accumulate(self.sizes), strict=True)
        self._slices = {name: slice(end - size, end) for name, size, end in ends}
        formats = f"one vector of length {self.dim}, a list of {len(tensors)} tensors, or a dict with these names"
        self._hint = f"Pass {formats}."
        self._key = tuple(self.shapes.items()), tuple(self.dtypes.values()), self.device, str(self.shards)

    @classmethod
    def flat(
        cls, dim: int, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", name: str = "vector"
    ) -> TensorSpace:
        """The space of plain vectors with ``dim`` entries (of the default dtype if none is given).

        Example:
            >>> from curvops import TensorSpace
            >>> TensorSpace.flat(3).dim
            3
        """
        return cls({name: _stand_in((dim,), dtype or torch.get_default_dtype(), torch.device(device))})

    def subspace(self, names: Iterable[str]) -> TensorSpace:
        """The space of some of the tensors, in the order of this one; a KeyError if there is none of a name."""
        chosen = {name: self.slice(name) for name in names}
        return TensorSpace(
            {n: _stand_in(self.shapes[n], self.dtypes[n], self.device) for n in self.names if n in chosen},
            {n: how for n, how in self.shards.items() if n in chosen},
        )

    @property
    def gathered(self) -> TensorSpace:
        """The space of the same tensors whole."""
        if not self.shards:
            return self
        shapes = {n: self.shards[n].shape if n in self.shards else shape for n, shape in self.shapes.items()}
        return TensorSpace({n: _stand_in(shape, self.dtypes[n], self.device) for n, shape in shapes.items()})

    def match(self, patterns: str | Iterable[str]) -> list[str]:
        """Names that equal one of the patterns or match it (``*``, ``?``, ``[…]`` as in file names), in order.

        Raises:
            KeyError: If a pattern matches nothing; the message gives names that are near.

        Example:
            >>> import torch
            >>> from curvops import TensorSpace
            >>> TensorSpace({"0.weight": torch.zeros(2, 3), "0.bias": torch.zeros(2)}).match("*.bias")
            ['0.bias']
        """
        chosen: set[str] = set()
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            found = [n for n in self.names if n == pattern] or [n for n in self.names if fnmatchcase(n, pattern)]
            if not found:
                inside = any(name.startswith(f"{pattern}.") for name in self.names)
                near = [f"{pattern}.*"] if inside else get_close_matches(pattern, [*self.names, *_modules(self.names)])
                hint = f"near: {describe(near)}" if near else f"there are {describe(self.names)}"
                raise KeyError(f"no parameter's name matches {pattern!r}; {hint}.")
            chosen.update(found)
        return [name for name in self.names if name in chosen]

    def positions(self, names: Iterable[str]) -> Tensor:
        """Rows that some tensors take in a flat vector, one by one."""
        slices = [self.slice(name) for name in names]
        return torch.cat([torch.arange(s.start, s.stop, device=self.device) for s in slices])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TensorSpace) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        return f"TensorSpace({describe(self.names)}; dim={self.dim}, {self.dtype}, {self.device})"

    def slice(self, name: str) -> slice:
        """Rows that a tensor takes in a flat vector; a KeyError if there is none of this name."""
        if name not in self.shapes:
            raise KeyError(f"no tensor is named {name!r}; there are {describe(self.names)}.")
        return self._slices[name]

    def split(self, flat: Tensor) -> list[Tensor]:
        """Tensors of a flat vector ``[D]``, or with trailing columns of ``[D, K]``, in their own dtypes."""
        parts = zip(flat.split(self.sizes), self.shapes.values(), self.dtypes.values(), strict=True)
        return self.wholes([aligned(part.reshape((*shape, *flat.shape[1:])).to(dtype)) for part, shape, dtype in parts])

    @property
    def uncut(self) -> Tensor:
        """Which entries of a flat vector ``[D]`` are those of tensors that are not cut."""
        each = zip(self.names, self.sizes, strict=True)
        return torch.cat([torch.full((size,), n not in self.shards, device=self.device) for n, size in each])

    def wholes(self, parts: list[Tensor]) -> list[Tensor]:
        """Tensors of which this process has parts; the same where nothing is cut."""
        return [
            self.shards[n].whole(part) if n in self.shards else part for n, part in zip(self.names, parts, strict=True)
        ]

    def parts(self, tensors: list[Tensor | None]) -> list[Tensor | None]:
        """This process's parts of tensors in order; the same where nothing is cut."""
        return [
            self.shards[n].part(t) if n in self.shards and t is not None else t
            for n, t in zip(self.names, tensors, strict=True)
        ]

    def join(self, tensors: Iterable[Tensor | None], total: Tensor | None = None) -> Tensor:
        """Flat vector ``[D]`` of tensors in order, added to ``total`` if that is given; ``None`` stands for zeros."""
        flat = torch.zeros(self.dim, dtype=self.dtype, device=self.device) if total is None else total
        for part, tensor in zip(
            flat.split(self.sizes), self.parts(list(tensors)) if self.shards else tensors, strict=True
        ):
            if tensor is not None:
                part.add_(tensor.reshape(-1))
        return flat

    def random(self, generator: torch.Generator, columns: int | None = None) -> Tensor:
        """Standard normal vector ``[D]`` or ``[D, K]`` from a CPU generator."""
        shape = (self.dim,) if columns is None else (self.dim, columns)
        return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(self.device, self.dtype)

    def to_columns(self, vector: Any, context: str, leading: bool = False) -> tuple[Tensor, Format]:
        """Columns ``[D, K]`` of a vector in any format, and the format; ``context`` says in errors what is computed.

        With ``leading`` the axis of several vectors comes first: ``[K, D]``, or tensors ``[K, *shape]``.

        Raises:
            TypeError: If the vector is of no known format, or of another dtype.
            ValueError: If lengths, shapes, names or devices do not fit.
        """
        if self.shards and not isinstance(vector, (Mapping, list, tuple)):
            raise TypeError(
                f"{context}: the parameters are cut over processes, and so are vectors: expected a list of {len(self.names)} DTensors, or a "
                f"dict with these names, got {type(vector).__name__}. What needs flat vectors can be had of GatheredOperator(op)."
            )
        if isinstance(vector, Tensor):
            if is_sharded(vector):
                raise TypeError(
                    f"{context}: expected a whole vector, or a list or dict of tensors, got a flat DTensor."
                )
            self._check_kind(vector, self.dtype, context)
            return self._flat_columns(vector, "flat", context, leading)
        if _is_array(vector):
            return self._flat_columns(self._tensor_of(vector, context), "array", context, leading)
        if isinstance(vector, Mapping):
            if mismatch := self.mismatch(vector):
                raise ValueError(f"{context}: expected a dict with the names {describe(self.names)}{mismatch}.")
            tensors, kind = [vector[name] for name in self.names], "dict"
        elif isinstance(vector, (list, tuple)):
            if len(vector) != len(self.shapes):
                raise ValueError(
                    f"{context}: expected {len(self.shapes)} tensors ({describe(self.names)}), got {len(vector)}. {self._hint}"
                )
            tensors, kind = list(vector), "tuple" if isinstance(vector, tuple) else "list"
        else:
            raise TypeError(
                f"{context}: expected a tensor, an array, a list of tensors or a dict of tensors, got {type(vector).__name__}. {self._hint}"
            )
        return self._tensor_columns(tensors, kind, context, leading)

    def from_columns(self, columns: Tensor, form: Format) -> Any:
        """Vector in the given format from columns ``[D, K]``."""
        flat = columns if form.columns else columns.squeeze(1)
        if form.kind in ("flat", "array"):
            flat = flat.T if form.columns and form.leading else flat
            return flat if form.kind == "flat" else flat.cpu().numpy()
        tensors = self.split(flat)
        if form.columns and form.leading:
            tensors = [tensor.movedim(-1, 0) for tensor in tensors]
        for k, (name, tensor) in enumerate(zip(self.names, tensors, strict=True)) if form.cuts else ():
            if name in form.cuts and form.cuts[name].shape == tensor.shape:
                tensors[k] = form.cuts[name].cut(tensor)
        if form.kind == "dict":
            return dict(zip(self.names, tensors, strict=True))
        return tuple(tensors) if form.kind == "tuple" else tensors

    def _flat_columns(self, vector: Tensor, kind: str, context: str, leading: bool) -> tuple[Tensor, Format]:
        if vector.ndim not in (1, 2):
            raise ValueError(
                f"{context}: expected a tensor with one or two axes, got shape {tuple(vector.shape)}. {self._hint}"
            )
        rows = vector.T if leading and vector.ndim == 2 else vector
        if rows.shape[0] != self.dim:
            axis = "rows" if rows is vector else "columns"
            raise ValueError(
                f"{context}: expected {self.dim} {axis} (the entries of {describe(self.names)}), got {rows.shape[0]}. {self._hint}"
            )
        return rows if rows.ndim == 2 else rows.unsqueeze(1), Format(kind, rows.ndim == 2, leading)

    def _tensor_of(self, array: Any, context: str) -> Tensor:
        dtype = str(self.dtype).removeprefix("torch.")
        if array.dtype.name != dtype:
            advice = "Pass a tensor" if self.dtype == torch.bfloat16 else f"Convert it with .astype({dtype!r})"
            raise TypeError(f"{context}: expected an array of {dtype}, got {array.dtype.name}. {advice}.")
        # a copy: arrays may be read-only or have negative strides
        return torch.from_numpy(array.copy()).to(self.device)

    def _tensor_columns(self, tensors: list[Tensor], kind: str, context: str, leading: bool) -> tuple[Tensor, Format]:
        cuts: dict[str, Sharding] = {}
        if self.shards:
            tensors = [self._own(name, tensor, context) for name, tensor in zip(self.names, tensors, strict=True)]
        elif cuts := shardings(dict(zip(self.names, tensors, strict=True))):
            tensors = [gathered(tensor) for tensor in tensors]
        extra: set[tuple[int, ...]] = set()
        axis, many = ("leading", "rows") if leading else ("trailing", "columns")
        for (name, shape), tensor in zip(self.shapes.items(), tensors, strict=True):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{context}: expected a tensor for {name!r}, got {type(tensor).__name__}.")
            self._check_kind(tensor, self.dtypes[name], f"{context}, {name!r}")
            cut = max(tensor.ndim - len(shape), 0) if leading else len(shape)
            before, after = tensor.shape[:cut], tensor.shape[cut:]
            own, others = (after, before) if leading else (before, after)
            if own != shape or len(others) > 1:
                raise ValueError(
                    f"{context}: expected shape {tuple(shape)} for {name!r}, "
                    f"or with one {axis} axis of {many}, got {tuple(tensor.shape)}."
                )
            extra.add(tuple(others))
        if len(extra) > 1:
            raise ValueError(f"{context}: expected the same {many} for each tensor, got {axis} axes {sorted(extra)}.")
        (rest,) = extra
        moved = [t.movedim(0, -1) for t in tensors] if rest and leading else tensors
        width = rest[0] if rest else 1
        parts = [t.reshape(size, width).to(self.dtype) for t, size in zip(moved, self.sizes, strict=True)]
        return torch.cat(parts), Format(kind, bool(rest), leading, cuts)

    def _own(self, name: str, tensor: Tensor, context: str) -> Tensor:
        """This process's part of a tensor that belongs to a parameter."""
        if is_sharded(tensor) != (name in self.shards):
            wanted = "a DTensor" if name in self.shards else "a plain tensor"
            raise TypeError(
                f"{context}: expected {wanted} for {name!r}, as the parameter is, got {type(tensor).__name__}."
            )
        return self.shards[name].part(tensor) if name in self.shards else tensor

    def _check_kind(self, tensor: Tensor, dtype: torch.dtype, context: str) -> None:
        if tensor.dtype != dtype:
            raise TypeError(f"{context}: expected {dtype}, got {tensor.dtype}. Convert it with .to({dtype}).")
        if tensor.layout != torch.strided:
            raise TypeError(
                f"{context}: expected a dense tensor, got one of layout {tensor.layout}: pass v.to_dense()."
            )
        if tensor.device != self.device:
            raise ValueError(
                f"{context}: expected a tensor on {self.device}, got one on {tensor.device}. Move it with .to({str(self.device)!r})."
            )

    def mismatch(self, names: Mapping[str, Any]) -> str:
        """What is missing or unknown among some names, for a message; empty if nothing is."""
        missing, unknown = [n for n in self.shapes if n not in names], [n for n in names if n not in self.shapes]
        found = {"missing": missing, "unknown": unknown}
        return "".join(f"; {what}: {describe(some)}" for what, some in found.items() if some)


def aligned(part: Tensor) -> Tensor:
    """A part of a vector, or of several, in memory that `torch.view_as_complex` takes: a copy where it begins at odd entries."""
    rows = part.ndim > 1 and part.stride(0) % 2 and (len(part) == 1 or not part.is_contiguous())
    odd = part.storage_offset() % 2 or rows
    return part.clone(memory_format=torch.contiguous_format) if odd and not part.numel() % 2 else part


def describe(names: Sequence[str]) -> str:
    """Some names for a message: all of a few, else the first two and the last."""
    quoted = [repr(name) for name in names]
    return ", ".join(quoted if len(quoted) <= 4 else [*quoted[:2], "…", quoted[-1]])


def _stand_in(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of a shape that takes no memory."""
    return torch.empty((), dtype=dtype, device=device).expand(tuple(shape))


def _is_array(vector: Any) -> bool:
    numpy: Any = sys.modules.get("numpy")
    return numpy is not None and isinstance(vector, numpy.ndarray)


def _modules(names: Iterable[str]) -> list[str]:
    """Patterns of the modules that own some parameters."""
    return sorted({f"{name.rpartition('.')[0]}.*" for name in names if "." in name})
