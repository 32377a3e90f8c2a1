"""The user's problem: model, loss, data and parameters, on the device and in the precision that were asked for."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any

import click
import torch
from torch import Tensor
from torch.nn import Module

from curvops.cli import processes
from curvops.cli.failures import Failure, UserError
from curvops.cli.find import find_function
from curvops.losses import output_loss
from curvops.risk.determinism import NotFiniteWarning, check_deterministic
from curvops.risk.empirical_risk import EmpiricalRisk, ProblemOptions
from curvops.space import TensorSpace, describe
from curvops.tree import map_tensors

_NAMES = ("model", "loss", "data", "params")
_EXPECTED = "model, loss and data (and params by name, if only some), or a dict with these keys"


@dataclass
class Problem:
    """What a user's function returned, and what it was asked with."""

    target: str
    model: Any
    loss: Any
    data: Any
    params: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def arguments(self) -> tuple[Any, Any, dict[str, Tensor], Any]:
        """What all operators take."""
        return self.model, self.loss, self.params, self.data

    @cached_property
    def risk(self) -> EmpiricalRisk:
        """The empirical risk, of which all operators are made."""
        return EmpiricalRisk(*self.arguments, **self.options)

    @cached_property
    def checked_risk(self) -> EmpiricalRisk:
        """The same, after its determinism was checked."""
        check_deterministic(self.risk)
        return self.risk


class Batches:
    """The first batches of a loader, with floating-point tensors in one precision; a loader in all else."""

    def __init__(self, loader: Any, dtype: torch.dtype | None, count: int | None) -> None:
        self._loader, self._dtype, self._count = loader, dtype, count

    def __iter__(self) -> Iterator[Any]:
        for batch in islice(self._loader, self._count):
            yield map_tensors(lambda t: t.to(self._dtype) if t.is_floating_point() else t, batch)

    def __len__(self) -> int:
        return len(self._loader) if self._count is None else min(len(self._loader), self._count)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._loader, name)


def load_problem(
    target: str,
    *,
    device: str | None = None,
    dtype: str | None = None,
    params: tuple[str, ...] = (),
    batches: int | None = None,
    seed: int = 0,
    threads: int | None = None,
) -> Problem:
    """Call the user's function, seeded, and bring what it returns to a device and a precision.

    Raises:
        click.UsageError: If device or parameter patterns do not fit.
        Failure: If there is no such function, or it returns something else; the message says what helps.
        UserError: If the user's own code raises something.
    """
    warnings.simplefilter("error", NotFiniteWarning)  # within the session's context
    if threads is not None:
        torch.set_num_threads(threads)
    where = None if device is None else find_device(device)
    target, function = find_function(target)
    torch.manual_seed(seed)
    try:
        given = function()
    except SystemExit:
        raise Failure(f"{target!r} ended the program (SystemExit); it must return {_EXPECTED}") from None
    except Exception as error:
        raise UserError(f"{target!r} failed") from error
    model, loss, data, named, options = _parts(target, given)
    kind = None if dtype is None else getattr(torch, dtype)
    for module in (model, loss):
        if isinstance(module, Module):
            module.to(where, kind)
    if not isinstance(model, Module):
        # a function's parameters are whoever's; it takes others in their place
        named = {name: p.detach().to(where, kind).requires_grad_() for name, p in named.items()}
    if dtype is not None or batches is not None:
        data = Batches(data, kind, batches)
    if (group := processes.join(device)) is not None:
        data, options = processes.Share(data, group), {**options, "process_group": group}
    if isinstance(model, Module) and not params:
        _refuse_copies(target, model, named)
    chosen = _chosen(named, params)
    if any(p.device.type == "meta" for p in chosen.values()):
        raise Failure(
            f"{target!r}: the model's parameters are on the meta device: they have no values. Load its weights"
        )
    if chosen and not any(p.numel() for p in chosen.values()):
        raise Failure(
            f"{target!r}: the parameters {describe(list(chosen))} have 0 entries, so that no curvature is in them. Return a model, or "
            "params, with at least one entry"
        )
    return Problem(target, model, loss, data, chosen, options)


def find_device(text: str) -> torch.device:
    """A device that is here; a usage error says which ones are."""
    here = ["cpu", *(f"cuda:{k}" for k in range(torch.cuda.device_count()))]
    here += ["mps"] * torch.backends.mps.is_available()
    with suppress(RuntimeError):
        device = torch.device(text)
        if device.type == "cuda" and device.index is None and processes.number() > 1:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.type in ("cpu", "mps") and device.type in here:
            return device
        if device.type == "cuda" and f"cuda:{device.index or 0}" in here:
            return device
    raise click.UsageError(f"--device: there is no device {text!r} here; there are: {', '.join(here)}")


def _parts(target: str, given: Any) -> tuple[Any, Any, Any, dict[str, Tensor], dict[str, Any]]:
    if isinstance(given, Mapping):
        known = [*_NAMES, *(name for name in ProblemOptions.__annotations__ if name != "progressbar")]
        if unknown := [key for key in given if key not in known]:
            raise TypeError(
                f"{target!r} returned a dict with unknown keys {describe(unknown)}; there are {', '.join(known)}"
            )
        if missing := [key for key in _NAMES[:3] if key not in given]:
            raise TypeError(f"{target!r} returned a dict without {describe(missing)}; expected {_EXPECTED}")
        found = dict(given)
    elif isinstance(given, (tuple, list)) and len(given) in (3, 4):
        found = dict(zip(_NAMES, given, strict=False))
    else:
        got = f"{type(given).__name__} of {len(given)}" if isinstance(given, (tuple, list)) else type(given).__name__
        raise TypeError(f"{target!r} returned a {got}; expected {_EXPECTED}")
    model, loss, data, params = (found.pop(name, None) for name in _NAMES)
    if not callable(model) or not callable(loss):
        wrong, what = ("model", model) if not callable(model) else ("loss", loss)
        raise TypeError(f"{target!r} returned a {type(what).__name__} as {wrong}; expected, in this order, {_EXPECTED}")
    if isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        data = [tuple(data)]  # all data as one batch
    if "reduction" not in found:
        _refuse_unknown_reduction(target, loss)
    if params is None and not isinstance(model, Module):
        raise TypeError(f"{target!r} returned a function as model; then params, by name, must be returned as well")
    named = dict(model.named_parameters()) if params is None else params
    if not isinstance(named, Mapping):
        raise TypeError(
            f"{target!r} returned a {type(named).__name__} as params; expected a dict such as dict(model.named_parameters())"
        )
    return model, loss, data, dict(named), found


def _refuse_unknown_reduction(target: str, loss: Any) -> None:
    try:
        output_loss(loss)
    except ValueError as error:
        if "is not known" not in str(error):
            raise
        raise Failure(
            f"{target!r}: {str(error).partition('. Pass')[0]}. Return a dict with the keys model, loss, data and reduction: 'mean' or 'sum'"
        ) from None


def _refuse_copies(target: str, model: Module, named: Mapping[str, Tensor]) -> None:
    """A failure if parameters that take no gradient are not the model's own, as those of its `state_dict()`."""
    own = {id(p) for p in model.parameters()}
    copies = [name for name, p in named.items() if id(p) not in own]
    if copies and not any(p.requires_grad for p in named.values()):
        raise Failure(
            f"{target!r}: params: {describe(copies)} are not the tensors of the model, but others of the same names (copies, as in "
            "model.state_dict()?). Return dict(model.named_parameters()), or a subset of it"
        )


def _chosen(named: dict[str, Tensor], patterns: tuple[str, ...]) -> dict[str, Tensor]:
    """The parameters that some patterns match; those that are trained, if there are no patterns."""
    if not patterns:
        trained = {name: p for name, p in named.items() if p.requires_grad}
        if named and not trained:
            raise click.UsageError(
                "no parameter requires a gradient: all are frozen. Pass --params '*' to take them all"
            )
        return trained
    try:
        return {name: named[name] for name in TensorSpace(named).match(patterns)}
    except KeyError as error:
        raise click.UsageError(f"--params: {error.args[0]}") from None
