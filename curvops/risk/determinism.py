"""Whether two passes over the data give the same risk and gradient, and if not, why."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm

from curvops.aten import NORMS_OF_BATCHES, scripted
from curvops.lengths import PART
from curvops.risk.data import Batch
from curvops.risk.empirical_risk import EmpiricalRisk
from curvops.space import describe
from curvops.substitutions import gradients
from curvops.tree import strided, tensors_of


class NotFiniteWarning(RuntimeWarning):
    """The loss or its gradient is infinite or no number."""


@dataclass
class Pass:
    """What one pass over the data saw."""

    fingerprints: list[tuple[float, ...]]  # of each batch
    value: Tensor  # the sum of the loss terms
    gradient: Tensor  # of this sum, ``[D]``
    linear: list[bool]  # whether the loss of each batch is linear in the output
    finite: int = 0  # batches whose loss is finite, up to the first that is not
    graph: bool = False  # whether the loss of any batch carries a graph to one of the parameters


def check_deterministic(risk: EmpiricalRisk) -> None:
    """Walk the data twice and compare data, risk and gradient; warn of what makes curvature meaningless.

    Raises:
        RuntimeError: If they differ; the message says whether the loader or the model is the cause.
    """
    with risk.ranks.together():
        # one random state around both passes: putting it back in between would make dropout look deterministic
        with risk.evaluation():
            first, second = _walk(risk), _walk(risk)
        if first.fingerprints != second.fingerprints:
            raise RuntimeError(_loader_message(first, second))
        tolerance = torch.finfo(risk.space.dtype).eps ** 0.5
        if not _close(first.value, second.value, tolerance) or not _close(first.gradient, second.gradient, tolerance):
            raise RuntimeError(_model_message(risk))
        # a share whose data do not reach the parameters is no reason while another's do
        first.graph = bool(risk.ranks.meet("Determinism check: graphs", count=float(first.graph))[1])
        for remark, category in _remarks(risk, first):
            warnings.warn(remark, category, stacklevel=3)
        risk.ranks.meet("Determinism check: end")  # each process checks its own share


def _walk(risk: EmpiricalRisk) -> Pass:
    zero = torch.zeros(1 + risk.space.dim, dtype=risk.space.sum_dtype, device=risk.space.device)
    seen = Pass([], zero[0], zero[1:], [])
    with risk.walk("Determinism check") as walk:
        for batch in walk:
            seen.fingerprints.append(fingerprint(batch))
            curvature = walk.curvature(risk.run(batch), batch)
            value = curvature.value()
            seen.value += 0 if batch.silent else value.detach()
            if torch.isfinite(seen.value):
                seen.finite = len(seen.linear) + 1
            seen.linear.append(curvature.linear)
            if value.requires_grad:
                # part of the graph may be the caller's, as of a cached parametrization
                slopes = gradients(value, list(risk.params.values()), retain_graph=True, allow_unused=True)
                seen.graph |= any(slope is not None for slope in slopes)
                risk.space.join(slopes, seen.gradient)
        walk.join()
        _ = walk.constant
    return seen


def _remarks(risk: EmpiricalRisk, seen: Pass) -> Iterator[tuple[str, type[RuntimeWarning]]]:
    """What a user should know before they trust a matrix of this risk."""
    if not torch.isfinite(seen.value) or not torch.isfinite(seen.gradient).all():
        where = f", from batch {seen.finite} on (counted from 0)" if seen.finite < len(seen.linear) else ""
        yield (
            f"data: the loss ({float(seen.value):g}) or its gradient is not finite{where}. "
            "Are there NaNs or infinities in data or parameters? Curvature will not be finite either.",
            NotFiniteWarning,
        )
    elif seen.linear and all(seen.linear):
        yield (
            "loss: it is linear in the model's output (a negative log-likelihood of log-probabilities, a model that returns its "
            "own loss, an absolute error), so the GGN and its relatives are zero. Let a classifier return logits and the loss be "
            "CrossEntropyLoss; for regression, HuberLoss is curved near zero.",
            RuntimeWarning,
        )
    if seen.linear and not seen.graph:
        yield (
            "model: its output carries no graph to the parameters, so all curvature is zero. Does it run under torch.no_grad, or "
            "detach what it computes or take it through NumPy? Or does it use none of these parameters, as a function that takes those "
            "of another copy of the model?",
            RuntimeWarning,
        )
    hooked = [name for name, p in risk.params.items() if _altered(p)]
    if hooked:
        yield (
            f"params: gradient hooks of {describe(hooked)} alter gradients, so products with curvature are altered too, and may not "
            "be symmetric. Remove them, or leave these parameters out.",
            RuntimeWarning,
        )
    single = sum(size == 1 for size, *_ in seen.fingerprints)
    unseen = scripted(risk.model.modules()) & NORMS_OF_BATCHES if single and risk.space.device.type == "cpu" else ()
    if unseen:
        yield (
            f"model: there are batches of one datum ({single}), of which PyTorch's own derivatives of {', '.join(sorted(unseen))} may be wrong on "
            "the CPU, and what TorchScript runs is not replaced. Pass batches of two data or more, or the module as it was before "
            "torch.jit.",
            RuntimeWarning,
        )
    norms = [m for m in risk.model.training_modules if isinstance(m, _NormBase) and not isinstance(m, _InstanceNorm)]
    if norms:
        yield (
            f"model: batch norm in train mode ({len(norms)} modules) mixes the data of a batch, so curvature depends on how the data "
            "is cut into batches. Call model.eval(), or pass all data in one batch.",
            RuntimeWarning,
        )


def _altered(p: Tensor) -> bool:
    """Whether a hook of a parameter changes the gradients that it sees."""
    for hook in list((p._backward_hooks or {}).values()):
        slope = torch.ones_like(p)
        found = hook(slope)
        if not torch.equal(slope if found is None else found, torch.ones_like(p)):
            return True
    return False


def fingerprint(batch: Batch) -> tuple[float, ...]:
    """Numbers that change with the values of a batch and with their order."""
    prints = []
    for tensor in (part for whole in tensors_of((batch.X, batch.y)) for part in strided(whole)):
        real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        prints.append(_fingerprint(real.detach().flatten()))
    return (batch.size, *prints)


def _fingerprint(flat: Tensor) -> float:
    found = []
    for k, part in enumerate(flat.split(PART)):
        begin = 1 + k * PART
        ramp = torch.arange(begin, begin + part.numel(), device=flat.device, dtype=torch.float64)
        # infinities cancel to what equals nothing, not even itself
        finite = part.to(torch.float64).nan_to_num(posinf=1.0, neginf=-1.0)
        found.append((finite * torch.cos(ramp)).sum().nan_to_num())
    return float(torch.stack(found).sum())


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    if not torch.isfinite(a).all() and not torch.isfinite(b).all():
        return True  # a diverged model is deterministic; the operator's own numbers will show it
    return not a.numel() or bool((a - b).abs().max() <= tolerance * a.abs().max())


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
    cause = (
        "the model or the loss draws random numbers, keeps a state between calls, or uses operations that are not "
        "deterministic. (Let random numbers be part of X. Drawn with a seed in forward() they are the same for each batch, and the "
        "matrix depends on the batches)"
    )
    if dropout:
        cause = f"the model has dropout in train mode ({len(dropout)} modules, the first {dropout[0]})"
    elif any(getattr(m, "dropout", 0) for m in training if isinstance(getattr(m, "dropout", 0), float)):
        cause = "the model has dropout in train mode"
    return (
        f"model: two passes over the same data give different risks or gradients; {cause}. "
        "Call model.eval(), or pass check_deterministic=False to accept products that vary with the state of the random generators."
    )
