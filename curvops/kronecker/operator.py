"""What all Kronecker operators share: blocks from a state, and a state from model and data."""

from __future__ import annotations

import glob
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Module
from typing_extensions import Unpack

from curvops.checkpoint import Checkpoint
from curvops.kronecker.account import Explanation, explained, notes_of, plan_notes, signed_note
from curvops.kronecker.collect import Collection
from curvops.kronecker.factors import Factors
from curvops.kronecker.files import read_state, write_state
from curvops.kronecker.groups import Key
from curvops.kronecker.options import KroneckerOptions, Options
from curvops.kronecker.progress import Progress
from curvops.kronecker.proof import Proof
from curvops.kronecker.rows import LayerRows, layer_rows
from curvops.kronecker.shares import assigned, decompositions
from curvops.kronecker.state import Entry, State
from curvops.kronecker.sweep import Sweep
from curvops.memory import byte_size
from curvops.operators.block_diagonal import BlockDiagonalOperator, Placed
from curvops.operators.blocks import KroneckerBlock
from curvops.operators.linear_operator import LinearOperator
from curvops.risk.determinism import check_deterministic as check
from curvops.risk.empirical_risk import EmpiricalRisk, RiskOptions
from curvops.risk.model import ModelFunction
from curvops.space import describe
from curvops.spill import Spill

SomeOperator = TypeVar("SomeOperator", bound="KroneckerOperator")


class StateOperator(BlockDiagonalOperator):
    """Blocks from a state, which can be merged, averaged, saved and loaded."""

    def __init__(self, state: State, reasons: Mapping[str, str] | None = None, notes: Sequence[str] = ()) -> None:
        super().__init__(state.space, psd=True)
        self.state, self._blocks = state, state.blocks()
        self._reasons, self._notes = dict(reasons or {}), list(notes)

    @property
    def name(self) -> str:
        return self.state.kind

    @property
    def blocks(self) -> Sequence[Placed]:
        return self._blocks

    def merge(self, other: StateOperator) -> StateOperator:
        """The operator of both data sets together, exactly as if computed in one go.

        With ``fisher_type="mc"``, the default of KFAC, it is one of other samples: both draw those of the first places of a
        data set, the same ones unless each is given a ``seed`` of its own.

        Raises:
            ValueError: If the two are of different kinds, parameters or options, or have eigenbases of their own.
        """
        return StateOperator(self.state.merged(other.state))

    def moving_average(self, new: StateOperator, decay: float) -> StateOperator:
        """``decay`` · this + (1 − ``decay``) · new, of the factors A and B and of the other blocks."""
        return StateOperator(self.state.average(new.state, decay))

    def save(self, path: str | Path) -> None:
        """Write the operator to a file without pickle (safetensors), in one step.

        Raises:
            OSError: If the file cannot be written; one that was there before stays.
        """
        write_state(Path(path), self.state)

    def _facts(self) -> list[tuple[str, str]]:
        own = self.explain()
        return [
            *super()._facts(),
            ("blocks", f"{len(own.rows)}, {byte_size(own.memory)}"),
            *(("", note) for note in own.notes),
        ]

    def explain(self) -> Explanation:
        """How each parameter is treated, and why: a table that prints, with its rows as data in ``.rows``."""
        return explained(repr(self), self.state, self.blocks, self._reasons, self._notes)


def load(path: str | Path, params: Mapping[str, Tensor] | None = None) -> StateOperator:
    """Read an operator that `save` wrote; it equals the one that was saved bit for bit.

    Args:
        path: The file.
        params: The parameters that it must fit, by name; it is moved to their device.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is cut or not one of ours, or if it differs from ``params``; the message says how.
    """
    return StateOperator(read_state(Path(path), params))


class KroneckerOperator(StateOperator):
    """A block-diagonal approximation from taps on model and data; subclasses say what they take from the rows."""

    default_fisher_type = "mc"
    #: walks over the data, at most, that follow the first one where its rows are not kept
    further_walks = 0
    #: what is missing without gradients, for the error
    needs_gradients = ""

    def __init__(
        self,
        model_func: Module | ModelFunction,
        loss_func: Callable[[Any, Any], Tensor],
        params: Mapping[str, Tensor],
        data: Iterable[tuple[Any, Any]],
        *,
        check_deterministic: bool = True,
        checkpoint: Checkpoint | None = None,
        **options: Unpack[KroneckerOptions],
    ) -> None:
        given: dict[str, Any] = dict(options)
        problem = {name: given.pop(name) for name in RiskOptions.__annotations__ if name in given}
        own = self._options(**given)
        risk = EmpiricalRisk(model_func, loss_func, params, data, **problem)
        whole = risk.whole()
        progress = self._progress(checkpoint, whole, own)
        if check_deterministic and not progress.checked:
            check(whole)
            progress.checked = True
        self._set(whole, own, progress)
        self.risk = risk

    @classmethod
    def of(
        cls: type[SomeOperator], risk: EmpiricalRisk, *, checkpoint: Checkpoint | None = None, **options: Any
    ) -> SomeOperator:
        """The operator of an existing risk, whose determinism is not checked; options as for the constructor."""
        operator, own, whole = cls.__new__(cls), cls._options(**options), risk.whole()
        operator._set(whole, own, cls._progress(checkpoint, whole, own))
        operator.risk = risk
        return operator

    @classmethod
    def plan(
        cls,
        model_func: Module | ModelFunction,
        loss_func: Callable[[Any, Any], Tensor],
        params: Mapping[str, Tensor],
        data: Iterable[tuple[Any, Any]],
        **options: Any,
    ) -> Explanation:
        """What making the operator would take, from one forward pass of the first batch: blocks, memory, cost.

        The arguments are those of the constructor; determinism and the number of data are not checked.
        """
        ignored = {"progressbar", "check_deterministic", "num_data", "checkpoint"}
        given = {name: option for name, option in options.items() if name not in ignored}
        problem = {name: given.pop(name) for name in RiskOptions.__annotations__ if name in given}
        risk = EmpiricalRisk(model_func, loss_func, params, data, **problem).whole()
        operator = cls.__new__(cls)
        own = cls._options(**given)
        operator._set(risk, own, cls._progress(None, risk, own), planned=True)
        return operator.explain()

    def refresh(
        self: SomeOperator,
        data: Iterable[tuple[Any, Any]] | None = None,
        *,
        decay: float = 0.0,
        seed: int | None = None,
    ) -> SomeOperator:
        """The operator of the model as it is now, as along a training run: what was certified is not certified again.

        A certificate serves passes of the same operations, of which a few data alone must give what they give in their
        batch. Determinism is not checked.

        Args:
            data: Other data; the same if not given.
            decay: Share of this operator in a moving average of the factors: ``decay`` · this + (1 − ``decay``) · new.
            seed: Seed of the samples; the next number after this operator's if not given.

        Raises:
            RuntimeError: If this is a copy, which holds neither model nor data.
            ValueError: If a ``decay`` is given for what has eigenbases of its own, or is not between 0 and 1.

        Example:
            >>> import torch
            >>> from curvops import KFACLinearOperator
            >>> model, data = torch.nn.Linear(3, 2), [(torch.rand(5, 3), torch.rand(5, 2))]
            >>> kfac = KFACLinearOperator(model, torch.nn.MSELoss(), dict(model.named_parameters()), data)
            >>> for step in range(3):
            ...     kfac = kfac.refresh([(torch.rand(5, 3), torch.rand(5, 2))], decay=0.9)
        """
        risk = self._data_of("refresh")
        with risk.ranks.together():
            if decay:
                self.state.expect_average(decay)
            risk = risk if data is None else risk.of_data(data)
            risk.ranks.meet(f"{self.name}: refresh with decay {decay}")
        options = replace(self.options, seed=self.options.seed + 1 if seed is None else seed)
        operator, whole = type(self).__new__(type(self)), risk.whole()
        operator._set(whole, options, self._progress(None, whole, options), proofs=self._proofs)
        operator.risk = risk
        if decay:
            mixed = self.state.average(operator.state, decay)
            StateOperator.__init__(operator, mixed, operator._reasons, operator._notes)
        return operator

    def decompose(self: SomeOperator) -> SomeOperator:
        """Take the eigendecompositions that exact inverses, powers and determinants need, divided among the processes.

        Each dense factor is decomposed by one process of the group that shares the data, and sent to the others, so that
        all can use it at once. Without a group it takes the same work that these would take later.

        Returns:
            The operator itself.

        Example:
            >>> import torch
            >>> from curvops import KFACLinearOperator
            >>> model, data = torch.nn.Linear(3, 2), [(torch.rand(5, 3), torch.rand(5, 2))]
            >>> kfac = KFACLinearOperator(model, torch.nn.MSELoss(), dict(model.named_parameters()), data)
            >>> kfac.decompose().inverse(damping=1e-2).shape
            (8, 8)
        """
        ranks = self._data_of("decompose").ranks
        with ranks.together(), torch.inference_mode(False):
            blocks = [(p.block, p.label) for p in self.blocks if isinstance(p.block, KroneckerBlock)]
            missing = {id(factor): (factor, label) for block, label in blocks for factor in block.undecomposed()}
            factors = list(missing.values())
            in_memory = Spill(None, self.device)  # as what else is made of an operator; the folder may be gone
            found = list(zip([f for f, _ in factors], decompositions(ranks, factors, in_memory), strict=True))
            for block, _ in blocks:
                block.decomposed = [*block.decomposed, *found]
        return self

    def share(self) -> LinearOperator:
        """The blocks that are this process's, as an operator on their parameters, so that it need not keep the others.

        Blocks are divided among the processes that share the data by the cost of their eigendecompositions.
        """
        ranks = self._data_of("share").ranks
        layers: dict[str, float] = {}
        for placed in self.blocks:
            layers[placed.names[0]] = layers.get(placed.names[0], 0.0) + sum(
                float(n) ** 3 for n in placed.block.shape[1:]
            )
        owners = assigned(list(layers.values()), ranks.number)
        own = [name for name, owner in zip(layers, owners, strict=True) if owner == ranks.rank]
        if not own:
            raise ValueError(f"{self.name}.share(): {len(layers)} layers are not enough for {ranks.number} processes.")
        names = {name for placed in self.blocks if placed.names[0] in own for name in placed.names}
        return self[[glob.escape(name) for name in self.domain.names if name in names]]

    def layers(self) -> Iterator[LayerRows]:
        """Inputs and output gradients of each layer, one backward pass at a time: see `LayerRows`.

        Model and data are asked again, as they are now.

        Raises:
            RuntimeError: If this is a copy, which holds neither.
        """
        risk = self._data_of("layers").whole()
        with risk.ranks.together():
            risk.model.check_current()
        rows = layer_rows(Sweep(risk, self.options).streamed(f"{self.name} layers"))
        while True:
            # the caller's code between two rows runs in the caller's context
            with torch.inference_mode(False), risk.evaluation():
                row = next(rows, None)
            if row is None:
                return
            yield row

    def _data_of(self, method: str) -> EmpiricalRisk:
        if "risk" not in vars(self):
            raise RuntimeError(f"{self.name}.{method}(): a copy holds neither model nor data. Make the operator anew.")
        return self.risk

    @classmethod
    def _options(cls, **given: Any) -> Options:
        if unknown := given.keys() - {field.name for field in fields(Options)}:
            raise TypeError(f"{cls.__name__}: unknown options {describe(sorted(unknown))}. See help({cls.__name__}).")
        options = Options(
            **{"fisher_type": cls.default_fisher_type} | {n: v for n, v in given.items() if v is not None}
        )
        if cls.needs_gradients and options.fisher_type == "forward-only":
            raise ValueError(f"fisher_type: 'forward-only' takes no gradients, {cls.needs_gradients}")
        return options

    @classmethod
    def _progress(cls, checkpoint: Checkpoint | None, risk: EmpiricalRisk, options: Options) -> Progress:
        with risk.ranks.together():
            return Progress(checkpoint, risk, options, cls.__name__)

    def _set(
        self,
        risk: EmpiricalRisk,
        options: Options,
        progress: Progress,
        planned: bool = False,
        proofs: Sequence[Proof] = (),
    ) -> None:
        self.risk, self.options = risk, options
        sweep = Sweep(risk, options, proofs)
        self._proofs = sweep.proofs
        collection = Collection(sweep, type(self).__name__, planned, progress)
        with risk.ranks.together(), torch.inference_mode(False), risk.evaluation():
            risk.model.check_current()
            if not (planned or risk.ranks.alone):
                risk.ranks.meet(
                    f"{collection.title}, {options.settings}, {options.rule}, seed {options.seed}", risk.state
                )
                risk.start(collection.title)
            entries = self._compute(collection)
        groups = [(group, entries[key]) for key, group in sweep.grouping.groups.items() if key in entries]
        count = 1.0 if planned else 1.0 / sweep.constant
        kind, reduction = type(self).__name__, risk.loss.reduction
        state = State(kind, risk.space.gathered, groups, reduction, count, sweep.data, options.settings)
        if not planned:
            for note in signed_note(sweep):
                what = f"{kind}, fisher_type={options.fisher_type!r}: {note}. Exact: rule=BlockRule(most_passes=…), which takes longer."
                warnings.warn(what, RuntimeWarning, stacklevel=3)
        notes = (plan_notes if planned else notes_of)(collection, self.further_walks)
        super().__init__(state, {name: "; ".join(whys) for name, whys in sweep.reasons.items()}, notes)

    @abstractmethod
    def _compute(self, collection: Collection) -> dict[Key, Entry]:
        """What is known of each group after walking the data."""

    def _kfac(self, collection: Collection, again: bool = False) -> dict[Key, Entry]:
        """KFAC's factors, and blocks of whole gradients; the rows may be looked at ``again``."""
        make = partial(Factors, self.options, collection.dtype, collection.spill)
        return collection.first(make, keep=again, together=again)

    def __getstate__(self) -> dict[str, Any]:
        # a copy holds the state and the blocks, and neither model nor data
        return {name: value for name, value in vars(self).items() if name not in ("risk", "_proofs")}
