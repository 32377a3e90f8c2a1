"""Kronecker states in files: open, without pickle, written whole or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from curvops.files import read_tensors, write_tensors
from curvops.kronecker.groups import Group
from curvops.kronecker.state import Entry, State
from curvops.operators.places import Places
from curvops.space import TensorSpace, describe

FORMAT = "Kronecker factors"
FIELDS = ("kind", "reduction", "count", "data", "settings", "averaged")  # of a state, written as they are
CONVENTIONS = (
    "a vector is the concatenation of the flattened (row-major) parameters in this order; block = c * (B kron A) for a weight "
    "out x in; A = sum a a^T / rows, B = sum g g^T, g without c; c = 1/count for the mean, 1 for the sum"
)


def write_state(path: Path, state: State) -> None:
    """Write a state; a file that was there before stays unless this one is complete."""
    tensors, groups = packed(state.groups)
    shapes, dtypes = state.space.shapes, state.space.dtypes
    about = {
        **{name: getattr(state, name) for name in FIELDS},
        "conventions": CONVENTIONS,
        "parameters": [[name, list(shapes[name]), str(dtypes[name]).removeprefix("torch.")] for name in shapes],
        "groups": groups,
    }
    write_tensors(path, tensors, about, FORMAT)


def read_state(path: Path, params: Mapping[str, Tensor] | None) -> State:
    """Read a state, and compare it with the parameters that it must fit."""
    tensors, about = read_tensors(path, FORMAT)
    shapes = {name: (tuple(shape), dtype) for name, shape, dtype in about["parameters"]}
    if params is not None:
        _compare(path, shapes, params)
    device = torch.device("cpu") if params is None else TensorSpace(params).device
    space = TensorSpace(
        {
            name: torch.empty(shape, dtype=getattr(torch, dtype), device=device)
            for name, (shape, dtype) in shapes.items()
        }
    )
    known = unpacked({name: tensor.to(device) for name, tensor in tensors.items()}, about["groups"], device)
    groups = [(group, entry) for group, entry in known if entry is not None]
    return State(space=space, groups=groups, **{name: about[name] for name in FIELDS})


def packed(groups: Iterable[tuple[Group, Entry | None]]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Groups, with what is known of each, as tensors and what JSON can hold."""
    tensors: dict[str, Tensor] = {}
    about: list[dict[str, Any]] = []
    for k, (group, entry) in enumerate(groups):
        where = group.places.index
        if isinstance(where, Tensor):
            tensors[f"{k}.positions"] = where
        own = {name: getattr(group, name) for name in ("key", "names", "kind", "shape", "operation", "weight")}
        own["range"] = [where.start, where.stop] if isinstance(where, slice) else None
        if entry is not None:
            tensors.update({f"{k}.{name}": tensor for name, tensor in entry.tensors.items()})
            own |= {"entry": entry.kind, "numbers": {"rows": entry.rows}}
        about.append(own)
    return tensors, about


def unpacked(
    tensors: Mapping[str, Tensor], about: Iterable[Mapping[str, Any]], device: torch.device
) -> list[tuple[Group, Entry | None]]:
    """What was packed."""
    own: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        k, _, part = name.partition(".")
        own.setdefault(k, {})[part] = tensor
    groups: list[tuple[Group, Entry | None]] = []
    for place, saved in enumerate(about):
        mine = own.get(str(place), {})
        where = Places(slice(*saved["range"]) if saved["range"] else mine.pop("positions"), device)
        named = {name: frozen(saved[name]) for name in ("key", "names", "shape", "weight")}
        group = Group(kind=saved["kind"], operation=saved["operation"], places=where, **named)
        groups.append(
            (group, Entry(saved["entry"], mine, saved["numbers"].get("rows", {})) if "entry" in saved else None)
        )
    return groups


def frozen(value: Any) -> Any:
    """Lists as the tuples that they were before JSON."""
    return tuple(frozen(item) for item in value) if isinstance(value, list) else value


def _compare(path: Path, saved: Mapping[str, tuple[tuple[int, ...], str]], params: Mapping[str, Tensor]) -> None:
    lacking = {"model": [n for n in saved if n not in params], "file": [n for n in params if n not in saved]}
    problems = [f"the {which} lacks {describe(names)}" for which, names in lacking.items() if names]
    for name, (shape, dtype) in saved.items():
        if name in params and tuple(params[name].shape) != shape:
            problems.append(f"{name!r} is {tuple(params[name].shape)} in the model and {shape} in the file")
        elif name in params and str(params[name].dtype).removeprefix("torch.") != dtype:
            problems.append(f"{name!r} is {params[name].dtype} in the model and torch.{dtype} in the file")
    if not problems and list(saved) != list(params):
        problems.append("the parameters are in another order")
    if problems:
        raise ValueError(f"'{path}' does not fit the model: {'; '.join(problems)}.")
