"""What all Kronecker operators share: blocks from a state, and a state from model and data."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from curvops.kronecker.account import Explanation, Form, byte_size, explain_state, kronecker_form, plan, uncovered
from curvops.kronecker.collect import MomentCollector, WholeCollector
from curvops.kronecker.factors import BlockRule, Moments
from curvops.kronecker.files import read_state, write_state
from curvops.kronecker.groups import Group, Key
from curvops.kronecker.replay import Collector
from curvops.kronecker.rows import LayerRows, layer_rows
from curvops.kronecker.state import Entry, State
from curvops.kronecker.sweep import Sweep, run
from curvops.memory import budget
from curvops.operators.block_diagonal import BlockDiagonalOperator, Placed
from curvops.operators.blocks import KroneckerBlock
from curvops.operators.places import Places
from curvops.risk.determinism import check_deterministic as check
from curvops.risk.empirical_risk import EmpiricalRisk
from curvops.risk.model import ModelFunction
from curvops.space import TensorSpace

FISHER_TYPES = ("type-2", "mc", "empirical", "forward-only")
APPROXIMATIONS = ("expand", "reduce")


class StatefulOperator(BlockDiagonalOperator):
    """Blocks that come from a state, which can be merged, averaged, saved and loaded."""

    def __init__(self, space: TensorSpace) -> None:
        super().__init__(space, psd=True)
        self._blocks: list[Placed] | None = None

    @property
    @abstractmethod
    def state(self) -> State:
        """What the operator is made of."""

    @property
    def blocks(self) -> Sequence[Placed]:
        """The blocks, made from the state at first use."""
        if self._blocks is None:
            self._blocks = _blocks(self.state)
        return self._blocks

    def merge(self, other: StatefulOperator) -> LoadedOperator:
        """The operator of both data sets together, exactly as if computed in one go.

        Raises:
            ValueError: If the two are of different kinds, parameters or options, or have eigenbases of their own.
        """
        return LoadedOperator(self.state.merged(other.state))

    def moving_average(self, new: StatefulOperator, decay: float) -> LoadedOperator:
        """``decay`` · this + (1 − ``decay``) · new, of the factors A and B and of the other blocks."""
        return LoadedOperator(self.state.average(new.state, decay))

    def save(self, path: str | Path) -> None:
        """Write the operator to a file without pickle (safetensors), in one step.

        Raises:
            OSError: If the file cannot be written; one that was there before stays.
        """
        write_state(Path(path), self.state)

    def explain(self) -> Explanation:
        """How each parameter is treated, and why: a table that prints, with its rows as data in ``.rows``."""
        return explain_state(repr(self), self.state, self.blocks, self._reasons(), self._notes())

    def _reasons(self) -> Mapping[str, str]:
        return {}

    def _notes(self) -> list[str]:
        return []


class LoadedOperator(StatefulOperator):
    """An operator from a state: loaded, merged or averaged."""

    def __init__(self, state: State) -> None:
        super().__init__(state.space)
        self._state = state

    @property
    def name(self) -> str:
        return self._state.kind

    @property
    def state(self) -> State:
        return self._state


def load(path: str | Path, params: Mapping[str, Tensor] | None = None) -> LoadedOperator:
    """Read an operator that `save` wrote; it equals the one that was saved bit for bit.

    Args:
        path: The file.
        params: The parameters that it must fit, by name; it is moved to their device.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is cut or not one of ours, or if it differs from ``params``; the message says how.
    """
    return LoadedOperator(read_state(Path(path), params))


class KroneckerOperator(StatefulOperator):
    """A block-diagonal approximation from taps on model and data; subclasses say what they take from the rows."""

    def __init__(
        self,
        model_func: Module | ModelFunction,
        loss_func: Callable[[Any, Any], Tensor],
        params: Mapping[str, Tensor],
        data: Iterable[tuple[Any, Any]],
        *,
        progressbar: bool = False,
        check_deterministic: bool = True,
        num_data: int | None = None,
        batch_size_fn: Callable[[Any], int] | None = None,
        fisher_type: str = "mc",
        mc_samples: int = 1,
        kfac_approx: str = "expand",
        separate_weight_and_bias: bool = True,
        num_per_example_loss_terms: int | None = None,
        seed: int = 2147483647,
        reduction: str | None = None,
        memory_budget: int | None = None,
        rule: BlockRule | None = None,
    ) -> None:
        _one_of("fisher_type", fisher_type, FISHER_TYPES)
        _one_of("kfac_approx", kfac_approx, APPROXIMATIONS)
        if not isinstance(mc_samples, int) or mc_samples < 1:
            raise ValueError(f"mc_samples: expected a number ≥ 1, got {mc_samples!r}.")
        self.risk = EmpiricalRisk(
            model_func,
            loss_func,
            params,
            data,
            reduction=reduction,
            progressbar=progressbar,
            num_data=num_data,
            batch_size_fn=batch_size_fn,
        )
        super().__init__(self.risk.space)
        self.fisher_type, self.kfac_approx = fisher_type, kfac_approx
        self.rule = BlockRule() if rule is None else rule
        self._settings = {
            "fisher_type": fisher_type,
            "mc_samples": mc_samples if fisher_type == "mc" else None,
            "kfac_approx": kfac_approx,
            "separate_weight_and_bias": separate_weight_and_bias,
        }
        self._sweep = Sweep(
            self.risk,
            fisher_type,
            mc_samples,
            seed,
            not separate_weight_and_bias,
            num_per_example_loss_terms,
            memory_budget,
        )
        self._memory_budget = memory_budget
        self._compute_dtype = torch.promote_types(self.dtype, torch.float32)
        self._kept_bytes = 0
        self._state: State | None = None
        if check_deterministic:
            check(self.risk)

    @property
    def state(self) -> State:
        """What the operator is made of, computed at first use."""
        if self._state is None:
            with torch.inference_mode(False), self.risk.evaluation():
                entries = self._compute()
            groups = [(group, entries[key]) for key, group in self._sweep.groups.items() if key in entries]
            reduction, count = self.risk.loss.reduction, 1.0 / self.risk.constant
            units, settings = dict(self._sweep.units), dict(self._settings)
            self._state = State(self.name, self.domain, groups, reduction, count, units, settings)
        return self._state

    def plan(self) -> Explanation:
        """What computing would take, from one forward pass of the first batch: blocks, memory, cost in gradients."""
        with torch.inference_mode(False), self.risk.evaluation():
            return plan(repr(self), self._sweep, self._form, self._compute_dtype, self._again, self._budget())

    def layers(self) -> Iterator[LayerRows]:
        """Inputs and output gradients of each layer, one backward pass at a time: see `LayerRows`."""
        rows = layer_rows(self._sweep, f"{self.name} layers")
        while True:
            # the caller's code between two rows runs in the caller's context
            with torch.inference_mode(False), self.risk.evaluation():
                row = next(rows, None)
            if row is None:
                return
            yield row

    #: sweeps over the data, at most, that follow the first one where its rows are not kept
    _again = 0

    def _form(self, group: Group) -> Form:
        """What a group's block will be."""
        return kronecker_form(group, self.rule, self.fisher_type)

    @abstractmethod
    def _compute(self) -> dict[Key, Entry]:
        """What is known of each group after the sweeps."""

    def _collect(self, *collectors: Collector) -> None:
        """One sweep over the data, started anew where a batch refutes what was certified."""

        def sweep() -> None:
            for collector in collectors:
                collector.clear()
            for place, captured in self._sweep.captures(self.name):
                for collector in collectors:
                    collector.add(place, captured)
                del captured  # or it would be held beside the next batch's

        run(sweep)

    def _moments(self) -> MomentCollector:
        return MomentCollector(self._sweep, Moments(self.kfac_approx, self._compute_dtype, self.rule))

    def _wholes(self) -> WholeCollector:
        return WholeCollector(self._sweep, self.rule, self._compute_dtype)

    def _reasons(self) -> Mapping[str, str]:
        return {name: route.why for name, route in self._sweep.routes.items()}

    def _notes(self) -> list[str]:
        passes = f"{self._sweep.backward_passes:,} backward passes to the layers' outputs"
        kept = [f"rows kept for the second look: {byte_size(self._kept_bytes)}"] if self._again else []
        return [passes, *self._sweep.notes(), *kept]

    def _budget(self) -> int:
        return budget(self.device, self._memory_budget)


def _blocks(state: State) -> list[Placed]:
    """Blocks that cover all parameters; what the model never uses is exactly zero."""
    space = state.space
    placed, dtype = [], torch.promote_types(space.dtype, torch.float32)
    for group, entry in state.groups:
        block = entry.block(state.constant)
        if block is not None:
            placed.append(Placed(group.names, group.places, block))
    for name, where in uncovered(space, [p.places for p in placed]):
        zeros = torch.zeros(1, len(where), dtype=dtype, device=space.device)
        placed.append(Placed((name,), Places.listed(where), KroneckerBlock(zeros, torch.ones_like(zeros[:, :1]))))
    return placed


def _one_of(name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}.")
