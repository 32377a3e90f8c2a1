"""The caller's model in double precision with parameters that can be moved: by stand-ins, or as a copy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Module

from curvops.context import UNFIT
from curvops.products.account import relative_difference, tolerance
from curvops.risk.empirical_risk import EmpiricalRisk
from curvops.risk.model import Model
from curvops.space import TensorSpace
from curvops.substitutions import Substitutions, gradients

Leaves = Mapping[str, Tensor]
Run = Callable[[], Tensor]  # the model's output at the data


class Movable(Protocol):
    """The model at some data in double precision, wherever its parameters are moved to."""

    def at(self, flat: Tensor) -> AbstractContextManager[tuple[Leaves, Run]]:
        """A context for forward and backward passes at a parameter vector ``[D]``: the leaves, and what runs the model."""


class StandIns:
    """Other tensors, wherever an operation is given a parameter.

    Args:
        risk: The caller's.
        X: The data, in double precision.
        space: The parameters', in double precision.
    """

    def __init__(self, risk: EmpiricalRisk, X: Any, space: TensorSpace) -> None:
        self._risk, self._X, self._space = risk, X, space

    @contextmanager
    def at(self, flat: Tensor) -> Iterator[tuple[Leaves, Run]]:
        leaves = {name: t.detach().requires_grad_() for name, t in _named(self._space, flat).items()}
        # also for what the loss reads, and the backward pass runs again
        with self._risk.model.standing_in(leaves, torch.float64):
            yield leaves, lambda: self._risk.functional(leaves, self._X)


class Copied:
    """A copy of the module: parameters may be reached where no mode sees them, as by a `torch.autograd.Function`.

    Args:
        model: A copy, of `copied`, which is brought to double precision.
        X, space: As above.
        mode: What the copy runs in.
    """

    def __init__(
        self, model: Model, X: Any, space: TensorSpace, mode: Callable[[], AbstractContextManager[Any]] = nullcontext
    ) -> None:
        assert model.module is not None
        model.module.double()
        for leaf in model.params.values():
            leaf.data = leaf.data.double()
        self._model, self._leaves, self._X, self._space, self._mode = model, model.params, X, space, mode

    @contextmanager
    def at(self, flat: Tensor) -> Iterator[tuple[Leaves, Run]]:
        before = self._space.join(p.detach().clone() for p in self._leaves.values())
        self._set(flat)
        try:
            yield self._leaves, self._run
        finally:
            self._set(before)

    def _run(self) -> Tensor:
        with self._mode():
            return self._model(self._X)

    def _set(self, flat: Tensor) -> None:
        with torch.no_grad():
            for name, value in _named(self._space, flat).items():
                self._leaves[name].copy_(value)


def movable(risk: EmpiricalRisk, X: Any, double: Any, space: TensorSpace) -> tuple[Movable, Tensor] | None:
    """What reaches whatever the parameters do, and Jᵀu at a few data X for a random u; ``None`` if nothing does.

    Args:
        risk: The caller's.
        X: The data, in the caller's precision.
        double: The same in double precision.
        space: The parameters', in double precision.
    """
    slope = _pulled(risk, risk.params, risk.forward(X))
    leaves = {name: p.detach().requires_grad_() for name, p in risk.params.items()}
    if _same(risk, slope, _pulled(risk, leaves, risk.functional(leaves, X))):
        return StandIns(risk, double, space), slope
    try:
        model = copied(risk)
    except UNFIT:
        return None
    with Substitutions():
        z = model(X)
    same = _same(risk, slope, _pulled(risk, model.params, z))
    return (Copied(model, double, space, Substitutions), slope) if same else None


def copied(risk: EmpiricalRisk) -> Model:
    """A copy of the module, with its own tensors in the place of the parameters.

    Raises:
        TypeError, ValueError, LookupError: If there is no module to copy, or as of `apart`.
    """
    if risk.model.module is None:
        raise TypeError("a function of the parameters is run with others")
    memo: dict[int, Any] = {}
    made = apart(risk.model.module, memo)
    names = {id(p): name for name, p in risk.model.module.named_parameters(remove_duplicate=False)}
    theirs = dict(made.named_parameters(remove_duplicate=False))
    # TorchScript copies its modules by itself, and tells nobody what became of a tensor
    leaves = {name: memo[id(p)] if id(p) in memo else theirs[names[id(p)]] for name, p in risk.params.items()}
    _expect_apart(leaves.values(), risk.params.values())  # also those that are no module's
    return Model(made, {name: leaf.requires_grad_() for name, leaf in leaves.items()})


def apart(module: Module, memo: dict[int, Any]) -> Module:
    """A deep copy of a module, which can be converted and moved: it shares no tensor with it.

    Raises:
        TypeError: If it cannot be copied.
        ValueError: If the copy shares a tensor, by a `__deepcopy__` of its own or of a part of it.
    """
    try:
        made = deepcopy(module, memo)
    except Exception as error:  # of the module's own code
        raise TypeError(f"the module cannot be copied: {error}") from error
    for p in made.parameters():
        if not p.is_leaf:  # TorchScript's copies hang on the originals by a graph, in their precision
            p.detach_().requires_grad_()
    _expect_apart(*([*one.parameters(), *one.buffers()] for one in (made, module)))
    return made


def _expect_apart(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> None:
    """Neither a tensor nor its memory is shared."""

    def held(tensors: Iterable[Tensor]) -> set[tuple[str, int]]:
        known = list(tensors)
        places = {t.untyped_storage().data_ptr() for t in known if t.layout == torch.strided} - {0}
        return {("tensor", id(t)) for t in known} | {("memory", place) for place in places}

    if held(ours) & held(theirs):
        raise ValueError("the copy shares tensors with the module")


def _named(space: TensorSpace, flat: Tensor) -> dict[str, Tensor]:
    return dict(zip(space.names, space.split(flat), strict=True))


def _pulled(risk: EmpiricalRisk, inputs: Mapping[str, Tensor], z: Tensor) -> Tensor:
    """Jᵀu of an output for a random u."""
    u = torch.randn(z.shape, generator=torch.Generator().manual_seed(2), device="cpu").to(z)
    with risk.model.standing_in(inputs):
        found = (
            gradients(z, list(inputs.values()), u, retain_graph=True, allow_unused=True)
            if z.requires_grad
            else [None] * len(inputs)
        )
    return risk.space.join(found)


def _same(risk: EmpiricalRisk, one: Tensor, other: Tensor) -> bool:
    return relative_difference(other, one) <= tolerance(risk.space.dtype)
