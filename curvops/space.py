"""Named tensors as vectors: flat, list and dict formats, each with optional columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from itertools import accumulate
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

Vector: TypeAlias = Tensor | Sequence[Tensor] | Mapping[str, Tensor]


class Format(NamedTuple):
    """How a vector was given, so that the answer can be given likewise."""

    kind: str  # "flat", "list", "tuple" or "dict"
    columns: bool


class TensorSpace:
    """The space of vectors with one entry per entry of some named tensors.

    A vector is the concatenation of the flattened (row-major) tensors in their order: a tensor ``[D]`` or ``[D, K]``,
    a list of tensors (each of its shape, optionally with a trailing axis of ``K`` columns), or a dict of such by name.
    Of the given tensors only shapes, dtypes and the device are read.

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

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
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
        self.shapes = {name: tensor.shape for name, tensor in tensors.items()}
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
        self._key = tuple(self.shapes.items()), tuple(self.dtypes.values()), self.device

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
        return [part.reshape((*shape, *flat.shape[1:])).to(dtype) for part, shape, dtype in parts]

    def join(self, tensors: Iterable[Tensor | None], total: Tensor | None = None) -> Tensor:
        """Flat vector ``[D]`` of tensors in order, added to ``total`` if that is given; ``None`` stands for zeros."""
        flat = torch.zeros(self.dim, dtype=self.dtype, device=self.device) if total is None else total
        for part, tensor in zip(flat.split(self.sizes), tensors, strict=True):
            if tensor is not None:
                part.add_(tensor.reshape(-1))
        return flat

    def random(self, generator: torch.Generator, columns: int | None = None) -> Tensor:
        """Standard normal vector ``[D]`` or ``[D, K]`` from a CPU generator."""
        shape = (self.dim,) if columns is None else (self.dim, columns)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(self.device, self.dtype)

    def to_columns(self, vector: Vector, context: str) -> tuple[Tensor, Format]:
        """Columns ``[D, K]`` of a vector in any format, and the format; ``context`` says in errors what is computed.

        Raises:
            TypeError: If the vector is of no known format, or of another dtype.
            ValueError: If lengths, shapes, names or devices do not fit.
        """
        if isinstance(vector, Tensor):
            self._check_kind(vector, self.dtype, context)
            if vector.ndim not in (1, 2):
                raise ValueError(
                    f"{context}: expected a tensor with one or two axes, got shape {tuple(vector.shape)}. {self._hint}"
                )
            if vector.shape[0] != self.dim:
                raise ValueError(
                    f"{context}: expected {self.dim} rows (the entries of {describe(self.names)}), got {vector.shape[0]}. {self._hint}"
                )
            return vector if vector.ndim == 2 else vector.unsqueeze(1), Format("flat", vector.ndim == 2)
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
                f"{context}: expected a tensor, a list of tensors or a dict of tensors, got {type(vector).__name__}. {self._hint}"
            )
        return self._tensor_columns(tensors, kind, context)

    def from_columns(self, columns: Tensor, form: Format) -> Any:
        """Vector in the given format from columns ``[D, K]``."""
        flat = columns if form.columns else columns.squeeze(1)
        if form.kind == "flat":
            return flat
        tensors = self.split(flat)
        if form.kind == "dict":
            return dict(zip(self.names, tensors, strict=True))
        return tuple(tensors) if form.kind == "tuple" else tensors

    def _tensor_columns(self, tensors: list[Tensor], kind: str, context: str) -> tuple[Tensor, Format]:
        trailing: set[tuple[int, ...]] = set()
        for (name, shape), tensor in zip(self.shapes.items(), tensors, strict=True):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{context}: expected a tensor for {name!r}, got {type(tensor).__name__}.")
            self._check_kind(tensor, self.dtypes[name], f"{context}, {name!r}")
            rest = tuple(tensor.shape[len(shape) :])
            if tensor.shape[: len(shape)] != shape or len(rest) > 1:
                raise ValueError(
                    f"{context}: expected shape {tuple(shape)} for {name!r}, "
                    f"or with one trailing axis of columns, got {tuple(tensor.shape)}."
                )
            trailing.add(rest)
        if len(trailing) > 1:
            raise ValueError(
                f"{context}: expected the same columns for each tensor, got trailing axes {sorted(trailing)}."
            )
        (rest,) = trailing
        width = rest[0] if rest else 1
        parts = [t.reshape(size, width).to(self.dtype) for t, size in zip(tensors, self.sizes, strict=True)]
        return torch.cat(parts), Format(kind, bool(rest))

    def _check_kind(self, tensor: Tensor, dtype: torch.dtype, context: str) -> None:
        if tensor.dtype != dtype:
            raise TypeError(f"{context}: expected {dtype}, got {tensor.dtype}. Convert it with .to({dtype}).")
        if tensor.device != self.device:
            raise ValueError(
                f"{context}: expected a tensor on {self.device}, got one on {tensor.device}. Move it with .to({str(self.device)!r})."
            )

    def mismatch(self, names: Mapping[str, Any]) -> str:
        """What is missing or unknown among some names, for a message; empty if nothing is."""
        missing, unknown = [n for n in self.shapes if n not in names], [n for n in names if n not in self.shapes]
        found = {"missing": missing, "unknown": unknown}
        return "".join(f"; {what}: {describe(some)}" for what, some in found.items() if some)


def describe(names: Sequence[str]) -> str:
    """Some names for a message: all of a few, else the first two and the last."""
    quoted = [repr(name) for name in names]
    return ", ".join(quoted if len(quoted) <= 4 else [*quoted[:2], "…", quoted[-1]])
