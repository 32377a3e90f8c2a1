"""The walk over the data that Kronecker operators make: forward once, backward for each cotangent."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from curvops.checkpoint import REMOVE
from curvops.context import UNFIT
from curvops.digest import close
from curvops.kronecker.alone import SOME, Joint, agrees, cut, ends, same, scale_of, work_of
from curvops.kronecker.batches import Division, gathered, joinable
from curvops.kronecker.certify import certify
from curvops.kronecker.cotangents import Cotangents
from curvops.kronecker.groups import Grouping
from curvops.kronecker.marks import Marks, outline
from curvops.kronecker.options import Options
from curvops.kronecker.proof import Proof, keeps_apart
from curvops.kronecker.rows import Pass
from curvops.kronecker.shares import agree
from curvops.kronecker.tape import Tape, record
from curvops.losses import Noise, OutputCurvature
from curvops.risk.data import Batch, joined_batch
from curvops.risk.empirical_risk import EmpiricalRisk
from curvops.risk.walk import Walk
from curvops.sharding import least
from curvops.tree import tensors_of

Done: TypeAlias = "Callable[[int], None] | None"  # is told how many passes are through
SMALL = 2**22  # multiplications in the layers up to which a batch itself is certified: cheaper than another pass


class Sweep:
    """Walks the data and yields what the backward passes give.

    Each batch is certified. A parameter's rows belong to the data of the ``"batch"``, or each ``"datum"`` is run alone,
    or the batch is seen as ``"one"`` datum because the model mixes its data. After the last batch ``constant`` is the
    risk's c; ``data`` is for each parameter the number of data, of batches where these are seen as one. ``proofs`` of an
    earlier sweep serve passes of the same operations. Small batches after the first go together where that changes nothing.
    """

    def __init__(self, risk: EmpiricalRisk, options: Options, proofs: Sequence[Proof] = ()) -> None:
        self.risk, self.options = risk, options
        self._budget = least(options.room, risk.model.shards)
        self.proofs: list[Proof] = []  # that serve this sweep
        self._earlier = list(proofs)
        self.grouping = Grouping(risk.space.gathered, not options.separate_weight_and_bias)
        self.whole: dict[str, str] = {}  # parameters that are known by their whole gradients only, and why
        self.marks = Marks()
        # output of each batch, by its place, on which something was proved; of a run that was killed, for another look
        self.learnt: dict[int, tuple[float, float]] = {}
        self.forgotten: dict[int, tuple[float, float]] = {}
        self.noted = False  # whether these are asked for
        self.progress: tuple[float, int, bool | None] = (0.0, 0, None)  # what the loss has learnt of the batches so far
        self.size = self.forward_passes = self.backward_passes = 0
        self.signed = self.mingled = self._planned = self._streamed = self.apart = False
        self.division = Division(risk, options.memory_budget or 0)
        self.cuts: list[int] = []  # how many batches, or pieces, went together in each forward pass of a first walk
        self.most = 0  # data up to which batches go together
        self._reset()

    def walk(self, title: str, together: int, more: bool = False, start: int = 0, done: Done = None) -> Iterator[Pass]:
        """The passes of all batches; it ends where a batch sets `Grouping.again`, and then a new walk is due.

        Backward passes of one forward pass come together up to so many bytes of output gradients. If there may be
        ``more`` walks, these must yield the same batches. A walk of a run that goes on ``start``s at a later forward pass.
        After each, ``done`` is told how many these are.
        """
        if not start:
            self._reset()
            self.marks, self.division.sizes = Marks(), []
        # what is skipped goes together as it did: batches that came since are further passes
        self.cuts, self.most = self.cuts[:start], self.most if start else 0
        return self._passes(title, together, start, more, tuple(self.cuts), done)

    def agree(self) -> bool:
        """Whether the walk is valid, here and in all processes that share the data; else a new one is due."""
        if self.grouping.again:
            return False  # alone: several processes walk until their own data fit
        known = self.risk.ranks.sizes
        self._steps.join()
        if known != self.risk.ranks.sizes and any(self.risk.ranks.gather(self.signed)):
            raise RuntimeError(
                "random signs would belong to other data: the processes' shares have changed. Make it anew."
            )
        if agreed := agree(self.risk.ranks, self.grouping, self.whole):
            self.constant = self._steps.constant
        return agreed

    def further(self, title: str, skip: int, together: int, done: Done = None) -> Iterator[Pass]:
        """The same passes once more, without some at the beginning."""
        self._counts, self.most = False, sys.maxsize
        yield from self._passes(title, together, skip, True, self.cuts, done)
        if self.grouping.again:
            raise RuntimeError(
                f"{title}: a further walk over the data met other operations than the first. Make model and data "
                "deterministic, or give the rows of the first walk more room by memory_budget=."
            )

    def streamed(self, title: str) -> Iterator[Pass]:
        """The passes of all batches, each batch with groups of its own."""
        self._streamed = True
        return self._passes(title, 0)

    def planned(self) -> Iterator[Pass]:
        """The forward passes of the first batch."""
        self._planned = True
        return self._passes("Plan", 0)

    def _reset(self) -> None:
        self._counts = True  # whether this is a first walk, on which data are counted
        self.grouping.restart()
        self.data = dict.fromkeys(self.risk.space.names, 0)
        self.reasons: dict[str, list[str]] = {name: [] for name in self.data}

    def _passes(
        self, title: str, together: int, skip: int = 0, more: bool = False, cuts: Sequence[int] = (), done: Done = None
    ) -> Iterator[Pass]:
        # what is done between two batches runs in the caller's context, so no context is entered here
        with closing(self.risk.data.walk(self.risk.ranks.start)) as batches:
            self._steps = Walk(self.risk, batches, title, "samples" if self.options.fisher_type == "mc" else "")
            met = self.marks.through(self._steps, self._counts, title) if more else iter(self._steps)
            met = met if self._streamed or self._planned else self.division.through(met)
            for place, several in enumerate(gathered(met, cuts, lambda: self.most)):
                if place == len(self.cuts):
                    self.cuts.append(len(several))
                batch = joined_batch(several)
                if self._streamed:
                    self.grouping, self.whole = Grouping(self.risk.space.gathered, self.grouping.joint), {}
                    self._reset()
                if place >= skip:
                    joint = self._joint(batch, several) if len(several) > 1 else None
                    if len(several) > 1 and joint is None:
                        self.apart = self.grouping.again = True  # a new walk, each batch alone
                        return
                    yield from self._batch(place, batch, together, joint)
                elif place in self.forgotten:
                    self._look(place, batch)
                if place == skip - 1 and self._counts:
                    self._steps.loss.resume(*self.progress)
                while self.grouping.again and (self._streamed or self._planned):  # this batch contradicts itself
                    self._reset()
                    yield from self._batch(place, batch, together)
                if self._planned or self.grouping.again:
                    return
                if done is not None and place >= skip:
                    self.progress = self._steps.loss.progress if self._counts else self.progress
                    done(place + 1)

    def _look(self, place: int, batch: Batch) -> None:
        """Prove again what a batch has shown in a run that was killed."""
        tape = record(self.risk, batch.X, batch.size)
        if not close(outline(tape), self.forgotten.pop(place)):
            raise ValueError(
                f"model: the checkpoint is of one with another output or gradient for batch {place}. {REMOVE}"
            )
        self._certify(batch, tape, self._steps.curvature(tape.z.detach(), batch))

    def _joint(self, batch: Batch, several: Sequence[Batch]) -> Joint | None:
        """The pass of several batches, if a proof covers it and some data give what they give alone.

        These stand at the ends of their batches, in the middle of all, and once more at the ends where they are alone:
        a model may treat who comes first or last differently.
        """
        tape = record(self.risk, batch.X, batch.size)
        few, first = SOME // 2, several[0].size
        places = [*range(first, min(first + few, batch.size)), *range(max(first - few, 0), first)]
        places = places if len(places) < batch.size else places[:few]  # not the same data once more, in another order
        alone = self._run(batch, places, taped=True)
        for proof in () if alone is None or tape.taps.data_dependent or tape.taps.pools else self.proofs:
            known = proof.way == "batch" and proof.signature.covers(tape.signature) and tape.fits(proof.layouts)
            known = known and not proof.failed and alone.fits(proof.layouts) and agrees(alone.z, tape, places)
            if known and self._holds(proof, batch):
                tape.layouts = list(proof.layouts)
                return Joint(tape, alone, places)
        return None

    def _batch(self, place: int, batch: Batch, together: int, joint: Joint | None = None) -> Iterator[Pass]:
        """Record, certify and pull one batch."""
        tape = record(self.risk, batch.X, batch.size) if joint is None else joint.tape
        curvature = self._steps.curvature(tape.z.detach(), batch)
        self.options.expect_terms(seen := curvature.terms_per_datum)
        ways, kept = dict.fromkeys(self.risk.space.names, "batch"), tuple[int, ...]()
        if joint is None:
            proved = len(self.proofs)
            ways, kept = self._certify(batch, tape, curvature)
            if self.noted and (not place or len(self.proofs) > proved or self._steps.loss.progress[1] == 1):
                self.learnt[place] = outline(tape)
            if not (place or self.most or self._streamed or self._planned or self.apart or self.division.sizes[0]):
                self.most = joinable(tape, self._budget, curvature.closed_form, ways)
        self.size, self.forward_passes = batch.start + batch.size, self.forward_passes + 1
        for name, way in ways.items() if self._counts else ():
            self.data[name] += 1 if way == "one" else batch.size
        kind, noise = self.options.fisher_type, Noise(self.options.seed, batch.start)
        factor = curvature.factor(kind, self.options.mc_samples, noise)
        cotangents = partial(Cotangents, curvature, factor, kind, noise, most=self.options.rule.most_passes)
        columns = cotangents(batch.size if seen is not None else 1)
        self.signed = self.signed or columns.signed
        # lists: the order of the groups must not depend on how strings are hashed
        batched, mixed, alone = ([n for n, w in ways.items() if w == way] for way in ("batch", "one", "datum"))
        if mixed and self.division.undone():  # they see a batch as one datum, and would a piece
            self.grouping.again = True
            return
        if batched:
            yield from self._pull(tape, batched, columns, (place, 0), together, not mixed, joint)
        if mixed:
            whole = cotangents(1)
            self.signed = self.signed or whole.signed
            self.mingled = self.mingled or (kind == "mc" and batch.size > 1)
            yield from self._pull(tape.as_one(), mixed, whole, (place, 0), together)
        del tape
        for n in range(batch.size if alone and self._streamed else 0):  # what is given cannot be taken back
            single = record(self.risk, cut(batch.X, batch.size, [n], kept), 1)
            self._give_up(self._failed(single, alone, "datum"))
            self.grouping.assign(single, set(alone) - set(self.whole))
        for n in range(batch.size if alone else 0):
            single = record(self.risk, cut(batch.X, batch.size, [n], kept), 1)
            self._give_up(self._failed(single, alone, "datum"))
            yield from self._pull(single, alone, columns.of_datum(n), (place, n), together)
            if self._planned:  # the others take as much
                self.forward_passes += batch.size - 1
                self.backward_passes += len(columns) * (batch.size - 1)
            self.forward_passes += 1
            if self._planned or self.grouping.again:
                return

    def _pull(
        self,
        tape: Tape,
        names: list[str],
        columns: Cotangents,
        place: tuple[int, int],
        together: int,
        last: bool = True,
        joint: Joint | None = None,
    ) -> Iterator[Pass]:
        """One backward pass for each cotangent, as many together as fit; after the ``last`` one the graph is free."""
        uses = self.grouping.assign(tape, {n for n in names if n not in self.whole})
        plain = {n: self.grouping.whole(n, self.whole[n]) for n in names if n in self.whole}
        if self.grouping.again:
            return
        indices = sorted({k for several in uses.values() for k, _ in several})
        keys = {*uses, *(group.key for group in plain.values())}
        groups = {key: group for key, group in self.grouping.groups.items() if key in keys}
        found = Pass(tape, groups, uses, [], [], 0, len(columns), *place)
        if self._planned or not len(columns):  # forward-only has none
            self.backward_passes += len(columns)
            yield found
            return
        one = sum(work_of(tape.uses[k])[0] for k in indices) * tape.z.itemsize
        some = max(1, together // max(one, 1))
        for first in range(0, len(columns), some):
            slopes, totals = [], []
            for k in range(first, min(first + some, len(columns))):
                # whole gradients may come by way of a graph that other passes share, as of a cached parametrization
                free = last and not plain and k == len(columns) - 1
                at_uses, own = tape.gradients(columns[k], indices, list(plain), free)
                self.backward_passes += 1
                slopes.append(dict(zip(indices, at_uses, strict=True)))
                pairs = zip(plain.values(), own, strict=True)
                totals.append({group.key: total.flatten() for group, total in pairs if total is not None})
                if joint is not None and k == 0 and not joint.holds(columns[0], slopes[0]):
                    self.apart = self.grouping.again = True  # a new walk, each batch alone
                    return
            yield replace(found, columns=slopes, totals=totals, first=first)

    def _certify(self, batch: Batch, tape: Tape, curvature: OutputCurvature) -> tuple[dict[str, str], tuple[int, ...]]:
        """The way that each parameter is seen, and which tensors of X all data have in common."""
        names = self.risk.space.names
        if batch.size > 1 and curvature.terms_per_datum is None:
            failed = dict.fromkeys(names, "the number of loss terms is not a multiple of the number of data")
        else:
            failed = self._failed(tape, names, "batch", batch, curvature)
        failed = {**self.whole, **failed}
        ways, kept = dict.fromkeys(names, "batch"), None
        if failed and batch.size > 1:
            kept = self._alone(batch, tape, list(failed))
            way = "one" if kept is None else "datum"
            ways.update(dict.fromkeys(failed, way))
            again = tape.as_one() if kept is None else record(self.risk, cut(batch.X, batch.size, [0], kept), 1)
            self._give_up(self._failed(again, list(failed), way))
        else:
            self._give_up(failed)
        for name in names:
            why = self.whole.get(name) or failed.get(name) or "tapped"
            if why not in self.reasons[name]:
                self.reasons[name].append(why)
        return ways, tuple(kept or ())

    def _give_up(self, failed: dict[str, str]) -> None:
        """Take whole gradients of parameters, in earlier batches too."""
        for name, why in failed.items():
            if name not in self.whole:
                self.whole[name] = why
                self.grouping.again = self.grouping.again or name in self.grouping.of

    def _failed(
        self,
        tape: Tape,
        names: list[str],
        way: str,
        batch: Batch | None = None,
        curvature: OutputCurvature | None = None,
    ) -> dict[str, str]:
        """The parameters that a pass's uses do not explain; the pass gets its layouts."""
        for proof in () if tape.taps.data_dependent else (*self.proofs, *self._earlier):
            known = proof.way == way and proof.signature.covers(tape.signature) and tape.fits(proof.layouts)
            # the same operations may mix the data only now, as behind a gate that depends on values
            some = known and batch is not None and self._some(batch, tape, taped=False) is not None
            if known and (batch is None or (some and self._holds(proof, batch))):
                tape.layouts, failed = list(proof.layouts), proof.failed
                if all(proof is not other for other in self.proofs):
                    self.proofs.append(proof)
                break
        else:
            failed, apart = self._prove(tape, batch, curvature)
            if tape.tested:
                self.proofs.append(Proof(way, tape.signature, list(tape.layouts), failed, apart))
        found = {**self.grouping.refuted, **failed}
        return {name: found[name] for name in names if name in found}

    def _prove(
        self, tape: Tape, batch: Batch | None, curvature: OutputCurvature | None
    ) -> tuple[dict[str, str], bool | None]:
        """What the uses do not explain, and whether the data are known to be kept apart."""
        names = self.risk.space.names
        large = sum(work_of(use)[1] for use in tape.uses) > SMALL and not tape.taps.data_dependent
        some = self._some(batch, tape, taped=True) if batch is not None and large else None
        if batch is not None and isinstance(some, Tape) and some.signature.covers(tape.signature):
            scale = scale_of(some)
            spread = scale.repeat_interleave(len(some.z) // SOME).view(-1, *[1] * (some.z.ndim - 1))
            failed = certify(some, scale, spread.to(some.z).expand_as(some.z), names)
            if some.tested and tape.fits(some.layouts) and keeps_apart(self.risk, batch, some.layouts):
                tape.layouts = some.layouts
                return failed, True
        scale = scale_of(tape)
        if curvature is None or tape.size == 1:
            return certify(tape, torch.ones_like(scale), torch.ones_like(tape.z), names), None
        rows = scale.to(curvature.dtype).repeat_interleave(curvature.num_terms // tape.size)
        spread = curvature.outputs(rows.unsqueeze(1).expand(-1, curvature.width))
        return certify(tape, scale, spread, names), None

    def _holds(self, proof: Proof, batch: Batch) -> bool:
        """Whether a proof holds for other values of the data, such as those of a batch."""
        if proof.apart is None:
            proof.apart = keeps_apart(self.risk, batch, proof.layouts)
        return proof.apart

    def _some(self, batch: Batch, tape: Tape, taped: bool) -> Tape | Tensor | None:
        """What a few data give, if their output is what they have in their batch."""
        if batch.size <= SOME or any(t.ndim == 0 or t.shape[0] != batch.size for t in tensors_of(batch.X)):
            return None
        places = ends(batch.size)
        some = self._run(batch, places, taped=taped)
        return some if agrees(some.z if isinstance(some, Tape) else some, tape, places) else None

    def _alone(self, batch: Batch, tape: Tape, names: list[str]) -> Collection[int] | None:
        """Which tensors of X all data have in common, where a datum alone gives what it gives in its batch.

        That is its output, and its part of the gradients: a model may detach a datum by its place in the batch.
        """
        mine = [k for k, t in enumerate(tensors_of(batch.X)) if t.ndim and t.shape[0] == batch.size]
        if not mine or tape.z.ndim == 0 or tape.z.shape[0] % batch.size:
            return None
        cotangent = tape.random_cotangent()
        expected = tape.gradients(cotangent, (), names)[1]
        # a mask, say, has an axis of the same length by chance
        for kept in [(), *((k,) for k in mine if len(mine) > 1)]:
            totals = [torch.zeros(p.shape, dtype=p.dtype, device=p.device) for p in map(tape.params.__getitem__, names)]
            for n, part in enumerate(cotangent.unflatten(0, (batch.size, -1))):
                single = self._run(batch, [n], kept, taped=True)
                if not agrees(single and single.z, tape, [n]):
                    break
                for total, g in zip(totals, single.gradients(part, (), names)[1], strict=True):
                    total += 0 if g is None else g
            else:
                return kept if all(same(a, b, tape) for a, b in zip(totals, expected, strict=True)) else None
        return None

    def _run(self, batch: Batch, places: Sequence[int], kept: Collection[int] = (), taped: bool = False) -> Any:
        """Some data of a batch alone; ``None`` where the model refuses, as batch norm does of a single datum."""
        try:
            X = cut(batch.X, batch.size, places, kept)
            return record(self.risk, X, len(places)) if taped else self.risk.output(X)
        except torch.OutOfMemoryError:
            raise
        except UNFIT:
            return None
