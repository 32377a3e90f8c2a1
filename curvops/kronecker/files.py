"""Kronecker states in files: open, without pickle, written whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
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
    tensors: dict[str, Tensor] = {}
    groups: list[dict[str, Any]] = []
    for k, (group, entry) in enumerate(state.groups):
        where = group.places.index
        if isinstance(where, Tensor):
            tensors[f"{k}.positions"] = where
        tensors.update({f"{k}.{name}": tensor for name, tensor in entry.tensors.items()})
        own = {name: getattr(group, name) for name in ("names", "kind", "shape", "operation")}
        span = [where.start, where.stop] if isinstance(where, slice) else None
        groups.append({**own, "range": span, "entry": entry.kind, "numbers": entry.numbers})
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
    groups = []
    for k, saved in enumerate(about["groups"]):
        own = {name.partition(".")[2]: t.to(device) for name, t in tensors.items() if name.partition(".")[0] == str(k)}
        where = Places(slice(*saved["range"]) if saved["range"] else own.pop("positions"), device)
        names, shape = tuple(saved["names"]), (saved["shape"][0], saved["shape"][1], saved["shape"][2])
        group = Group(((k, *names),), names, saved["kind"], shape, where, saved["operation"])
        groups.append((group, Entry(saved["entry"], own, saved["numbers"])))
    return State(space=space, groups=groups, **{name: about[name] for name in FIELDS})


def _compare(path: Path, saved: Mapping[str, tuple[tuple[int, ...], str]], params: Mapping[str, Tensor]) -> None:
    problems = []
    missing = [name for name in saved if name not in params]
    unknown = [name for name in params if name not in saved]
    if missing:
        problems.append(f"the model lacks {describe(missing)}")
    if unknown:
        problems.append(f"the file lacks {describe(unknown)}")
    for name, (shape, dtype) in saved.items():
        if name in params and tuple(params[name].shape) != shape:
            problems.append(f"{name!r} is {tuple(params[name].shape)} in the model and {shape} in the file")
        elif name in params and str(params[name].dtype).removeprefix("torch.") != dtype:
            problems.append(f"{name!r} is {params[name].dtype} in the model and torch.{dtype} in the file")
    if not problems and list(saved) != list(params):
        problems.append("the parameters are in another order")
    if problems:
        raise ValueError(f"'{path}' does not fit the model: {'; '.join(problems)}.")
