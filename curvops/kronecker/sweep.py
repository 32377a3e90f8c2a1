"""The passes over the data that Kronecker operators make: forward once, backward for each cotangent."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import torch

from curvops.kronecker.captured import Captured, Route
from curvops.kronecker.cotangents import LIMIT, Cotangents
from curvops.kronecker.few import FEW, JOINED, Few, failures, fit, look, peeked
from curvops.kronecker.groups import Group, Grouping, Key, arranged_inputs
from curvops.kronecker.layout import ONE_UNIT, Layout
from curvops.kronecker.tape import Tape, certify, record
from curvops.kronecker.uses import LinearUse, OneHot
from curvops.losses import Noise, OutputCurvature
from curvops.products.account import relative_difference, tolerance
from curvops.risk.data import Batch
from curvops.risk.empirical_risk import EmpiricalRisk
from curvops.tree import select, tensors_of


@dataclass(frozen=True)
class FirstBatch:
    """What the first batch takes.

    Attributes:
        batch_size: Number of data.
        groups: The groups.
        forward_passes: Forward passes.
        backward_passes: Backward passes to the layers' outputs.
        row_bytes: Bytes of the layers' inputs, and of their output gradients in all backward passes.
    """

    batch_size: int
    groups: list[Group]
    forward_passes: int
    backward_passes: int
    row_bytes: int


class Demoted(Exception):
    """A later batch refuted what was certified on the first; the routes have changed."""


class Sweep:
    """Walks the data and yields what each backward pass gives.

    Args:
        risk: The empirical risk.
        fisher_type: Kind of the output factor.
        mc_samples: Monte-Carlo samples.
        seed: Seed of the samples.
        joint: Whether a bias joins its weight's block.
        terms_per_datum: Loss terms of a datum, to compare with what is seen.
        budget: Bytes that intermediate results may take.
    """

    def __init__(
        self,
        risk: EmpiricalRisk,
        fisher_type: str,
        mc_samples: int,
        seed: int,
        joint: bool,
        terms_per_datum: int | None = None,
        budget: int | None = None,
    ) -> None:
        self.risk = risk
        self.fisher_type, self.mc_samples, self.seed = fisher_type, mc_samples, seed
        self.grouping = Grouping(risk.space, joint)
        self.routes: dict[str, Route] = {}
        self.signed = False
        self.backward_passes = 0
        self.units = {"data": 0, "batches": 0}
        self._terms_per_datum = terms_per_datum
        self._signature: tuple[object, ...] | None = None
        self._layouts: list[Any] = []
        self._budget = JOINED if budget is None else min(JOINED, budget)
        self._few: Few | None = None
        self._processed = 0
        self._looked = self._shared = self._agreed = self._apart = False  # apart: batches must not be joined

    @property
    def groups(self) -> dict[Key, Group]:
        """The groups seen so far."""
        return self.grouping.groups

    def captures(self, title: str, skip: int = 0, joined: bool = True) -> Iterator[tuple[int, Captured]]:
        """What each backward pass gives, with the place of its batch.

        Args:
            title: For the progress bar.
            skip: Number of batches at the beginning that are not needed.
            joined: Whether small batches may be processed together, as one.

        Raises:
            Demoted: If a batch refutes what was certified before; start again.
        """
        with closing(self.risk.batches(title)) as batches:
            counted = self._counted(batches)
            for place, batch in enumerate(self._together(counted) if joined else counted):
                if place >= skip:
                    for captured in self._captures(batch):
                        yield place, captured
                        del captured  # its graph is gone before the next one grows
                self.units["data"] = batch.start + batch.size
                self._processed = place + 1

    def _counted(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for place, batch in enumerate(batches):
            self.units["batches"] = place + 1
            yield batch

    def _captures(self, batch: Batch, pull: bool = True) -> Iterator[Captured]:
        tape = record(self.risk, batch.X, batch.size)
        curvature = self.risk.output_curvature(tape.z.detach(), batch)
        self._check_terms(curvature)
        self._certify(batch, tape, curvature)
        noise = Noise(self.seed, batch.start)
        factor = curvature.factor(self.fisher_type, self.mc_samples, noise)
        data_units = batch.size if curvature.terms_per_datum is not None else 1
        columns = Cotangents(curvature, factor, self.fisher_type, noise, data_units)
        together, mixed = self._names("batch"), self._names("whole")
        if together:
            yield from self._pull(tape, together, columns, "batch", pull, last=not mixed)
        if mixed:
            whole = Cotangents(curvature, factor, self.fisher_type, noise, 1)
            yield from self._pull(_as_one_unit(tape), mixed, whole, "whole", pull)
        del tape
        if alone := self._names("datum"):
            for n in range(batch.size):
                single = record(self.risk, select(batch.X, batch.size, slice(n, n + 1)), 1)
                yield from self._pull(single, alone, columns, "datum", pull, n, batch.size)

    def first(self) -> FirstBatch:
        """What one batch takes, from its forward passes alone."""
        with closing(self.risk.batches("Plan")) as batches:
            batch = next(batches)
        before = self.backward_passes
        forward, backward, row_bytes = 0, 0, 0
        seen: set[int] = set()
        for captured in self._captures(batch, pull=False):
            if id(captured.tape) not in seen:
                seen.add(id(captured.tape))
                forward += 1
            backward += captured.columns
            row_bytes += _row_bytes(captured)
        self.backward_passes = before
        return FirstBatch(batch.size, list(self.groups.values()), forward, backward, row_bytes)

    def notes(self) -> list[str]:
        """Remarks for the account."""
        found = []
        if self._shared:
            found.append("how the parameters enter was certified by an earlier operator of this model")
        if self._processed < self.units["batches"]:
            found.append(
                f"{self.units['batches']} batches were processed as {self._processed}: no datum's output depends on others"
            )
        if self.signed:
            found.append(
                f"more than {LIMIT:,} backward passes a batch would keep all loss terms apart; terms of a datum share one "
                "with random signs, so that cross terms vanish in expectation"
            )
        return found

    def _check_terms(self, curvature: OutputCurvature) -> None:
        expected, seen = self._terms_per_datum, curvature.terms_per_datum
        if expected is not None and seen != expected:
            raise ValueError(
                f"num_per_example_loss_terms: expected {expected}, the model's output has {seen}. "
                "Leave it out: it is inferred."
            )

    def _names(self, units: str) -> list[str]:
        # a list: the order of the groups must not depend on how strings are hashed
        return [name for name, route in self.routes.items() if route.units == units]

    def _pull(
        self,
        tape: Tape,
        names: list[str],
        columns: Cotangents,
        route: str,
        pull: bool,
        datum: int = 0,
        size: int = 1,
        last: bool = True,
    ) -> Iterator[Captured]:
        """One backward pass for each cotangent, the ``last`` of the graph at the end; none if not to ``pull``."""
        uses = self.grouping.assign(tape, {name for name in names if self.routes[name].tapped})
        plain = {n: self.grouping.leaf(n, self.routes[n].why) for n in names if not self.routes[n].tapped}
        indices = sorted({k for several in uses.values() for k, _ in several})
        self.signed = self.signed or columns.signed
        if not pull:
            yield Captured(tape, uses, {}, {}, True, route, len(columns))
            return
        if not len(columns):  # forward-only has none
            yield Captured(tape, uses, {}, {}, True, route, 0)

        def captured(position: int) -> Captured:
            u = columns[position]
            if route == "datum":
                u = u.unflatten(0, (size, -1))[datum].reshape(tape.z.shape)
            found, totals = tape.gradients(u, indices, list(plain), last and position == len(columns) - 1)
            self.backward_passes += 1
            slopes = dict(zip(indices, found, strict=True))
            leaves = {
                group.key: total.reshape(1, -1)
                for group, total in zip(plain.values(), totals, strict=True)
                if total is not None
            }
            return Captured(tape, uses, slopes, leaves, position == 0, route, len(columns))

        yield from map(captured, range(len(columns)))

    def _certify(self, batch: Batch, tape: Tape, curvature: OutputCurvature) -> None:
        """Give the tape its layouts; find the routes on the first batch, and again where it looks different."""
        signature = tape.signature()
        self._check_joining(batch, tape)
        known = signature == self._signature and len(self._layouts) == len(tape.uses) and not tape.data_dependent
        if known and fit(self._layouts, tape):
            tape.layouts = list(self._layouts)
            return
        failed = self._failures_on_few(batch, tape)
        if failed is None:
            failed = failures(self.risk, self.grouping, tape, curvature)
        # layouts of a batch with one datum say nothing of others
        self._signature, self._layouts = (signature, list(tape.layouts)) if batch.size > 1 else (None, [])
        if not self.routes:
            self.grouping.learn(tape)
            self.routes = self._find_routes(batch, tape, failed)
            return
        broken = [name for name in failed if self.routes[name].units == "batch"]
        if broken:
            fresh = self._find_routes(batch, tape, {name: failed[name] for name in broken})
            self.routes.update({name: fresh[name] for name in broken})
            self._apart = True
            self.risk.certificates().clear()
            raise Demoted

    def _failures_on_few(self, batch: Batch, tape: Tape) -> dict[str, str] | None:
        """Certify on a few data of a batch, which costs less; ``None`` where that says nothing of the batch."""
        few = self._few
        if tape.data_dependent or batch.size <= FEW:
            return None
        if few is None or few.start != batch.start:
            few = look(self.risk, self.grouping, batch, 0)
        if few is None or not few.speaks_for(tape):
            return None
        tape.layouts = list(few.layouts)
        if not few.failed:
            self.risk.certificates()[self._few_key(batch)] = replace(few, z=None)
        return few.failed

    def _together(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches, small ones joined if what was seen of a few data allows it."""
        if not self._looked:
            self._looked = True
            first, batches = peeked(batches)
            self._few = None if first is None else self._look(first)
        return batches if self._few is None or self._apart else self._few.joined(batches)

    def _look(self, first: Batch) -> Few | None:
        """What was found on a few data, if not now then by another operator of this model as it is."""
        known = self.risk.certificates().get(self._few_key(first))
        if known is None:
            return look(self.risk, self.grouping, first, self._budget)
        self._shared, self._agreed = True, True
        return replace(known, start=first.start)

    def _few_key(self, batch: Batch) -> object:
        looks = tuple((t.shape[1:], t.dtype) for t in tensors_of((batch.X, batch.y)))
        return "few", looks, type(self.risk.loss), self._budget, self.grouping.joint

    def _check_joining(self, batch: Batch, tape: Tape) -> None:
        """Compare the first joined batch with the few data that were seen without the others."""
        few = self._few
        if few is None or few.shape is None or self._apart or self._agreed or batch.start != few.start:
            return
        if not few.agrees(tape):
            self._apart = True  # the output depends on which data come together
            raise Demoted
        self._agreed = True

    def _find_routes(self, batch: Batch, tape: Tape, failed: Mapping[str, str]) -> dict[str, Route]:
        routes = {name: Route("batch", True, "tapped") for name in self.risk.space.names}
        if not failed:
            return routes
        units = "whole" if self._mixes(batch, tape) else "datum"
        again = (
            _as_one_unit(tape) if units == "whole" else record(self.risk, select(batch.X, batch.size, slice(0, 1)), 1)
        )
        ones = torch.ones(1, dtype=torch.float64, device=again.z.device)
        still = {**self.grouping.overlapping(again), **certify(again, ones, torch.ones_like(again.z), list(failed))}
        for name, why in failed.items():
            tapped = name not in still
            routes[name] = Route(units, tapped, why if tapped else still[name])
        return routes

    def _mixes(self, batch: Batch, tape: Tape) -> bool:
        """Whether a datum's output depends on the other data of its batch, or cannot be had alone."""
        if batch.size == 1:
            return False
        if any(t.ndim == 0 or t.shape[0] != batch.size for t in tensors_of(batch.X)) or tape.z.shape[0] % batch.size:
            return True
        n = batch.size - 1
        try:
            with torch.no_grad():
                alone = self.risk.forward(self.risk.model.params, select(batch.X, batch.size, slice(n, n + 1)))
        except (RuntimeError, ValueError, IndexError):
            return True  # such as batch norm, which refuses a single datum
        expected = tape.z.detach().unflatten(0, (batch.size, -1))[n]
        if alone.numel() != expected.numel():
            return True
        return not relative_difference(alone.reshape(expected.shape), expected) <= max(
            tolerance(expected.dtype), tolerance(tape.precision)
        )


def _as_one_unit(tape: Tape) -> Tape:
    layouts: list[Layout | None] = [ONE_UNIT] * len(tape.uses)
    return replace(tape, units=1, layouts=layouts, inputs={})


def _row_bytes(captured: Captured) -> int:
    """Bytes that keeping a forward pass's linear rows would take, with all of its backward passes."""
    tape, total = captured.tape, 0
    roles = sorted({pair for several in captured.uses.values() for pair in several})
    for k, role in roles:
        use = tape.uses[k]
        if isinstance(use, LinearUse):
            a = arranged_inputs(tape, k, role)
            a = a.ids if isinstance(a, OneHot) else a
            total += a.numel() * a.itemsize
            if role != "bias" or (k, "weight") not in roles:  # else they share their output gradients
                g = use.outputs(torch.empty(use.shape, dtype=tape.z.dtype, device="meta"))
                total += captured.columns * g.numel() * g.itemsize
    return total


def run(sweep: Callable[[], None]) -> None:
    """Run a sweep until no batch refutes what was certified."""
    while True:
        try:
            return sweep()
        except Demoted:
            continue
