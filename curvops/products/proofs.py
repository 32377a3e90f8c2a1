"""Proof that forward mode gives J v, on a few data; it holds for passes that made the same operations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import jvp, linearize

from curvops.products import rules
from curvops.products.account import attempted, relative_difference, tolerance
from curvops.products.batch import Push
from curvops.products.record import Recorder
from curvops.products.reference import OutputLinearization, inner_product, scattered, tangents
from curvops.risk.data import Batch
from curvops.risk.empirical_risk import EmpiricalRisk
from curvops.tree import select, tensors_of


@dataclass(frozen=True)
class Proof:
    """What was found of forward mode: holds, or why it does not, for passes like the recorded one."""

    record: Recorder
    holds: bool
    why: str


def pushed_forward(risk: EmpiricalRisk, batch: Batch, record: Recorder, z: Tensor) -> tuple[Push | None, str]:
    """J v of a batch by forward mode where that takes less and is proved, else ``None``; and why."""
    if risk.space.shards:
        return None, "parameters are cut over processes"
    if not rules.forward_mode_pays(record):
        return None, "about 2.3 gradients, 1.3 inside linearized()"
    proof = proved(risk, batch, record)
    return (lambda v: push_forward(risk, batch, v)[1].to(z.dtype)) if proof.holds else None, proof.why


def push_forward(risk: EmpiricalRisk, batch: Batch, v: Tensor) -> tuple[Tensor, Tensor]:
    """Output and J v of a batch by forward mode, with v in the place of the parameters' tangents; it keeps no graph."""
    primals = {name: p.detach() for name, p in risk.params.items()}
    directions = dict(zip(primals, tangents(v, risk.space), strict=True))
    with torch.no_grad():  # no graph of the model's other parameters
        found = jvp(lambda p: risk.functional(p, batch.X), (primals,), (directions,))
    return found[0], found[1]


def linearized_push(risk: EmpiricalRisk, batch: Batch, push: Push) -> Push | None:
    """J v by a program of its own, in which nothing but the tangents is computed; ``None`` if it is not the same."""
    primals = {name: p.detach() for name, p in risk.params.items()}
    with torch.no_grad():
        program = linearize(lambda p: risk.functional(p, batch.X), primals)[1]

    def run(v: Tensor) -> Tensor:
        with torch.no_grad():
            return program(dict(zip(primals, tangents(v, risk.space), strict=True)))

    v = risk.space.random(torch.Generator().manual_seed(0))
    expected = push(v)
    same = relative_difference(run(v).to(expected.dtype), expected) <= tolerance(expected.dtype)
    return (lambda v: run(v).to(expected.dtype)) if same else None


def proved(risk: EmpiricalRisk, batch: Batch, record: Recorder) -> Proof:
    """The proof that covers a batch's pass, found anew if there is none."""
    for proof in list(risk.proofs):
        if proof.record.covers(record):
            return proof
    found, why = attempted(lambda: _prove(risk, batch))
    proof = found or Proof(record, False, f"forward mode is unsupported here: {why}")
    if not proof.record.covers(record):
        proof = Proof(record, False, "a few data take other operations than the batch")
    risk.proofs.append(proof)
    return proof


def _prove(risk: EmpiricalRisk, batch: Batch) -> Proof:
    """Compare ⟨u, J v⟩ with ⟨Jᵀu, v⟩ for random u and v on the first and last data of a batch."""
    if any(t.ndim == 0 or t.shape[0] != batch.size for t in tensors_of(batch.X)):
        raise ValueError("X cannot be cut into data")
    places = [*range(rules.FEW // 2), *range(batch.size - rules.FEW // 2, batch.size)]
    few = Batch(select(batch.X, batch.size, places), None, rules.FEW, batch.start)
    record = Recorder(rules.FEW)
    z = record.finish(risk.forward(few.X, record))
    v = scattered(torch.empty(risk.space.dim, dtype=risk.space.dtype, device=risk.space.device))
    u = torch.randn(z.shape, generator=torch.Generator().manual_seed(1), device="cpu").to(z)
    pushed = push_forward(risk, few, v)[1]
    pulled = OutputLinearization(z, risk.params, risk.space).pull(u, last=record.fresh)
    wide = torch.promote_types(z.dtype, torch.float32)
    inner, along = torch.sum(u.to(wide) * pushed.to(wide)), inner_product(pulled, v, risk.space.sizes)
    difference = float(abs(inner - along) / (u.norm() * pushed.norm()).clamp(min=torch.finfo(wide).tiny))
    if not difference <= tolerance(z.dtype):
        return Proof(record, False, f"forward mode is not the adjoint of reverse mode ({difference:.1e})")
    return Proof(record, True, f"equal to reverse mode's adjoint within {difference:.1e} on {rules.FEW} data")
