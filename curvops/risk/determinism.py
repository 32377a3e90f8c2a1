"""Whether two passes over the data give the same risk and gradient, and if not, why."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.modules.dropout import _DropoutNd

from curvops.risk.data import Batch
from curvops.risk.empirical_risk import EmpiricalRisk
from curvops.risk.tree import tensors_of


@dataclass
class Pass:
    """What one pass over the data saw."""

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
    prints, value, gradient = (
        [],
        torch.tensor(0.0, device=risk.space.device),
        torch.tensor(0.0, device=risk.space.device),
    )
    with closing(risk.batches("Determinism check")) as batches:
        for batch in batches:
            prints.append(_fingerprint(batch))
            part, slope = risk.batch_value_and_gradient(batch)
            assert slope is not None
            value, gradient = value + part, gradient + slope
    return Pass(prints, value, gradient)


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
