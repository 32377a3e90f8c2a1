"""What is kept of a Kronecker operator's computation in a checkpoint, and how it goes on from there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from curvops.checkpoint import Checkpoint
from curvops.digest import digest
from curvops.kronecker.files import frozen, packed, unpacked
from curvops.kronecker.groups import Key
from curvops.kronecker.marks import Marks
from curvops.kronecker.options import Options
from curvops.kronecker.state import Entry
from curvops.kronecker.sweep import Sweep
from curvops.memory import budget
from curvops.ranks import RanksError
from curvops.risk.empirical_risk import EmpiricalRisk
from curvops.sharding import common, least, world

# of a sweep, as they are
FIELDS = (
    "data",
    "reasons",
    "whole",
    "size",
    "forward_passes",
    "backward_passes",
    "signed",
    "mingled",
    "cuts",
    "most",
    "apart",
)


class Progress:
    """The place that a computation has reached, written to a checkpoint and found again; it does nothing without one.

    Stages lie between meetings of all processes, places are batches of a stage. A process writes its stages to two files
    in turn. It writes each stage when it begins, and comes to the next meeting after that; so whenever the processes are
    killed, there is a stage of which all have a state. What each of them has added in this stage is its own, so that they
    may go on from different places; but those that have parts of one model must go on from one. They wait for each other
    when they have written, and write the places of a stage to two files in turn, too.

    Raises:
        ValueError: If a file is of another computation.
    """

    def __init__(self, checkpoint: Checkpoint | None, risk: EmpiricalRisk, options: Options, title: str) -> None:
        self.stage = self.place = 0  # where to go on
        self.checked = False  # whether the data were found deterministic
        self._risk, self._options, self._written = risk, options, (-1, -1)
        self._files: list[list[Checkpoint]] = []  # for stages in turn, of each for places in turn
        self._turn = 0  # of the places of a stage
        self._found: dict[str, Any] | None = None
        if checkpoint is None:
            return
        ranks, shards = risk.ranks, risk.model.shards
        tensors = {name: digest({name: tensor}) for name, tensor in risk.state.items()}
        self._every = checkpoint.every
        self._witness = {
            "computation": title,
            **{name: option for name, option in asdict(options).items() if name != "spill"},  # wherever tensors are
            **risk.described,
            "device": risk.space.device.type,
            "tensors": tensors,
        }
        self._files = [[checkpoint]]
        if shards or not ranks.alone:
            own = [f"{stage}.{place}" for stage in range(2) for place in range(2)] if shards else ["0", "1"]
            rank, number = world() if shards else (ranks.rank, ranks.number)
            files = [checkpoint.beside(f"{rank}-of-{number}.{turn}") for turn in own]
            self._files = [files[: len(files) // 2], files[len(files) // 2 :]]
        found: dict[tuple[int, int], tuple[int, dict[str, Any]]] = {}
        with self._together():
            for files in self._files:
                for turn, file in enumerate(files):
                    if (one := file.about(self._witness)) is not None:
                        found[one["stage"], one["place"]] = turn, one
        known = dict(sorted(self._common(set(found))))  # of each stage the last place
        ranks.meet(f"{title}: checkpoint")
        several = ranks.gather({stage: found[stage, place][1]["checked"] for stage, place in known.items()})
        if stages := set.intersection(*map(set, several)):
            self.stage = max(stages)
            self._turn, self._found = found[self.stage, known[self.stage]]
            self.checked = all(one[self.stage] for one in several)
            self.budget = self._found["budget"]  # some sums are cut by it

    @cached_property
    def budget(self) -> int:
        """Bytes that rows may take, by default of what is free when this is first asked."""
        space = self._risk.space
        return int(least(budget(space.device, self._options.memory_budget), self._risk.model.shards))

    @property
    def keeps(self) -> bool:
        """Whether there is a checkpoint."""
        return bool(self._files)

    @property
    def _file(self) -> Checkpoint:
        return self._files[self.stage % len(self._files)][self._turn]

    def resume(self, sweep: Sweep) -> tuple[int, dict[Key, Entry]]:
        """The batch that a first walk goes on from, and what was added before, if a state of it was found, else 0."""
        found = self._restored(sweep)
        place, self.place = self.place, 0
        return place, found

    def second(self, sweep: Sweep) -> dict[Key, Entry] | None:
        """The entries that a second look at the data adds to, if a state of it was found."""
        if self._found is None or not self._found["second"]:
            return None
        return self._restored(sweep)

    def next(self) -> None:
        """The processes have met, and another stage begins."""
        self.stage, self.place = self.stage + 1, 0

    def write(
        self,
        place: int,
        sweep: Sweep,
        entries: Callable[[], Mapping[Key, Entry]],
        *,
        second: bool = False,
        due: bool = False,
    ) -> None:
        """Write the state after some batches, if it is their turn or it is ``due``, unless it is there already."""
        if not self._files or (self.stage, place) == self._written or not (due or place % self._every == 0):
            return
        begins, shards = self._written == (-1, -1), self._risk.model.shards
        self._written = self.stage, place
        self._turn = 1 - self._turn if shards else 0
        found = entries()
        tensors, groups = packed((group, found.get(key)) for key, group in sweep.grouping.groups.items())
        numbers = [number for mark in sweep.marks.known for number in mark]
        tensors["marks"] = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        tensors["lengths"] = torch.tensor([len(mark) for mark in sweep.marks.known], dtype=torch.int64, device="cpu")
        about = {
            **{name: getattr(sweep, name) for name in FIELDS},
            "stage": self.stage,
            "place": place,
            "second": second,
            "checked": self.checked,
            "budget": self.budget,
            "groups": groups,
            "refuted": sweep.grouping.refuted,
            "partners": list(sweep.grouping.partners.items()),
            "learnt": list(sweep.learnt.items()),
            "progress": sweep.progress,
            "pieces": (sweep.division.sizes, sweep.division.account.rows),
            "constant": sweep.constant if second else None,
        }
        with self._together():
            self._file.write(self._witness, tensors, about, begins)
        self._common(set())  # no process writes another place before all have written this one

    def _common(self, values: set[Any]) -> set[Any]:
        """Those that all processes have that have parts of the model; they wait for each other."""
        if (found := common(values, self._risk.model.shards)) is None:
            raise RanksError(
                "checkpoint: another process, which has parts of the same parameters, failed with its file."
            )
        return found

    @contextmanager
    def _together(self) -> Iterator[None]:
        """What is followed by `_common`; where it fails, the other processes learn it there."""
        try:
            yield
        except Exception:
            common(None, self._risk.model.shards)
            raise

    def _restored(self, sweep: Sweep) -> dict[Key, Entry]:
        """Bring a sweep to the state that was found, once; what is known of groups."""
        if self._found is None:
            return {}
        about, self._found = self._found, None
        device = self._risk.space.device
        tensors: dict[str, Tensor] = self._file.tensors(device)
        self.place, self._written = about["place"], (self.stage, about["place"])
        for name in FIELDS:
            setattr(sweep, name, about[name])
        known = unpacked(tensors, about["groups"], device)
        grouping = sweep.grouping
        grouping.refuted, grouping.partners = about["refuted"], dict(frozen(about["partners"]))
        grouping.restart()
        for group, _ in known:
            grouping.add(group)
        lengths, marks = tensors["lengths"].tolist(), iter(tensors["marks"].tolist())
        sweep.marks = Marks([tuple(next(marks) for _ in range(length)) for length in lengths])
        sweep.learnt = dict(frozen(about["learnt"]))
        sweep.forgotten = dict(sweep.learnt)
        sweep.progress = frozen(about["progress"])
        sweep.division.sizes, sweep.division.account.rows = about["pieces"]
        if about["second"]:
            sweep.constant = about["constant"]
        return {group.key: entry for group, entry in known if entry is not None}
