"""Whether two passes over the data give the same risk and gradient, and if not, why."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.modules.dropout import _DropoutNd

from curvops.risk.data import Batch
from curvops.risk.empirical_risk import EmpiricalRisk
from curvops.tree import tensors_of

CHUNK, PROJECTIONS = 2**16, 8  # entries of a gradient that are projected together, and onto how many numbers


@dataclass
class Pass:
    """What one pass over the data saw.

    Attributes:
        fingerprints: Of each batch.
        value: The sum of the loss terms.
        gradient: Random projections of their gradient, piece by piece, so that it never has to be held as a whole.
    """

    fingerprints: list[tuple[float, ...]]
    value: Tensor
    gradient: Tensor


def check_deterministic(risk: EmpiricalRisk) -> None:
    """Walk the data twice and compare data, risk and gradient.

    Raises:
        RuntimeError: If they differ; the message says whether the loader or the model is the cause.
    """
    # one random state around both passes: putting it back in between would make dropout look deterministic
    with risk.evaluation():
        first, second = _walk(risk), _walk(risk)
    risk.check_size(sum(int(prints[0]) for prints in first.fingerprints))
    if first.fingerprints != second.fingerprints:
        raise RuntimeError(_loader_message(first, second))
    tolerance = torch.finfo(risk.space.dtype).eps ** 0.5
    if not _close(first.value, second.value, tolerance) or not _close(first.gradient, second.gradient, tolerance):
        raise RuntimeError(_model_message(risk))


def _walk(risk: EmpiricalRisk) -> Pass:
    zero = torch.tensor(0.0, device=risk.space.device)
    seen = Pass([], zero, zero)
    shape, generator = (min(CHUNK, max(risk.space.dim, 1)), PROJECTIONS), torch.Generator().manual_seed(0)
    directions = torch.randn(shape, generator=generator).to(risk.space.device, risk.space.sum_dtype)
    with closing(risk.batches("Determinism check")) as batches:
        for batch in batches:
            seen.fingerprints.append(_fingerprint(batch))
            leaves = risk.model.leaves()
            value = risk.output_curvature(risk.forward(leaves, batch.X), batch).value()
            seen.value = seen.value + value.detach()
            seen.gradient = seen.gradient + _projected_gradient(value, list(leaves.values()), directions)
    return seen


def _projected_gradient(value: Tensor, leaves: Sequence[Tensor], directions: Tensor) -> Tensor:
    """Projections ``[pieces, PROJECTIONS]`` of the gradient, each part of which is dropped once it is projected."""
    sizes = [-(-max(leaf.numel(), 1) // len(directions)) for leaf in leaves]
    found = torch.zeros(sum(sizes), directions.shape[1], dtype=directions.dtype, device=directions.device)

    def project(rows: Tensor, leaf: Tensor) -> None:
        if leaf.grad is not None:
            for row, part in zip(rows, leaf.grad.flatten().split(len(directions)), strict=True):
                row.copy_(part.to(directions.dtype) @ directions[: len(part)])
        leaf.grad = None

    if value.requires_grad:
        for leaf, rows in zip(leaves, found.split(sizes), strict=True):
            leaf.register_post_accumulate_grad_hook(partial(project, rows))
        torch.autograd.backward(value, inputs=leaves)
    return found


def _fingerprint(batch: Batch) -> tuple[float, ...]:
    """Numbers that change with the values of a batch and with their order."""
    prints = []
    for tensor in tensors_of((batch.X, batch.y)):
        real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        flat = real.detach().flatten().to(torch.float64)
        ramp = torch.arange(1, flat.numel() + 1, device=flat.device, dtype=torch.float64)
        prints.append(float((flat.nan_to_num() * torch.cos(ramp)).sum()))
    return (batch.size, *prints)


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    if not torch.isfinite(a).all() and not torch.isfinite(b).all():
        return True  # a diverged model is deterministic; the operator's own numbers will show it
    scale = float(a.abs().max()) if a.numel() else 0.0
    return bool((a - b).abs().max() <= tolerance * scale) if a.numel() else True


def _loader_message(first: Pass, second: Pass) -> str:
    same_data = sorted(first.fingerprints) == sorted(second.fingerprints)
    how = "the same batches in another order" if same_data else "other batches"
    return (
        f"data: a second pass yields {how}. The loader shuffles (shuffle=True) or changes the data at each pass "
        "(random augmentation, sampling), so the curvature would change from product to product. Pass a DataLoader with "
        "shuffle=False and fixed transforms, or [(X, y) for X, y in loader]."
    )


def _model_message(risk: EmpiricalRisk) -> str:
    training = risk.model.training_modules
    dropout = [m for m in training if isinstance(m, _DropoutNd) and m.p > 0]
    if dropout:
        cause = f"the model has dropout in train mode ({len(dropout)} modules, the first {dropout[0]})"
    elif any(getattr(m, "dropout", 0) for m in training if isinstance(getattr(m, "dropout", 0), float)):
        cause = "the model has dropout in train mode"
    else:
        cause = "the model or the loss draws random numbers, keeps a state between calls, or uses operations that are not deterministic"
    return (
        f"model: two passes over the same data give different risks or gradients; {cause}. "
        "Call model.eval(), or pass check_deterministic=False to accept products that vary."
    )
