"""A judge that knows no rule of second order: central differences of first-order autodiff.

It looks at a few data in double precision, and gives a verdict only where the differences at several
steps agree with each other (near kinks such as ReLU's they do not), and from both sides.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode, resolve_name

from curvops.aten import NORMS_OF_BATCHES, scripted
from curvops.context import UNFIT, quietly
from curvops.losses import OutputCurvature
from curvops.products.account import attempted
from curvops.products.movable import Leaves, Movable, Run, movable
from curvops.products.reference import GradientLinearization, OutputLinearization
from curvops.risk.data import Batch
from curvops.risk.empirical_risk import EmpiricalRisk
from curvops.risk.model import floating_to
from curvops.space import TensorSpace
from curvops.substitutions import gradients
from curvops.tree import map_tensors, nodes_of, select, tensors_of

STEPS = (1e-4, 1e-5, 1e-6)
STEADY = 1e-4  # relative difference between steps up to which they agree
WRONG = 1e-3  # relative error from which a derivative is called wrong
DATA = 4  # data that are looked at
LARGEST = 10_000_000  # parameters up to which a copy in double precision is cheap
SMALL = 100_000  # parameters up to which it does not matter that a verdict takes about sixteen gradients of these data


@dataclass(frozen=True)
class Verdict:
    """Relative error of a product against central differences; ``None``, and why, where there is no verdict."""

    error: float | None
    why: str = "central differences disagree, as they do at a kink such as ReLU's, and near one"

    @property
    def wrong(self) -> bool:
        """Whether the product is certainly wrong."""
        return self.error is not None and not self.error <= WRONG  # nor is one that is no number right

    @property
    def account(self) -> tuple[str, str]:
        """What `explain()` says."""
        if self.error is None:
            return "no verdict", self.why
        return "wrong" if self.wrong else "right", f"within {self.error:.1e} of central differences on a few data"


def compare(product: Tensor, at: Callable[[float], Tensor]) -> Verdict:
    """Verdict on a directional derivative at 0 of ``at``, a function of the step: as few steps as agree."""
    product, slopes, sums = product.detach(), list[Tensor](), list[Tensor]()
    for step in STEPS:
        right, left = at(step).detach(), at(-step).detach()
        slopes.append((right - left) / (2 * step))
        sums.append(right + left)
        scale = max(float(slope.norm()) for slope in slopes)
        if not math.isfinite(scale):
            return Verdict(None)
        if len(slopes) > 1 and float((slopes[-1] - slopes[-2]).norm()) <= STEADY * scale:
            error = min(float((product - slope).norm()) for slope in slopes[-2:])
            verdict = Verdict(error / scale if scale > 1e-12 else error)
            steps = STEPS[len(slopes) - 2], step
            # a derivative that lies between those of both sides is no farther from their mean than they are from each other
            kink = verdict.wrong and at_kink(at(0.0).detach(), (sums[-2], sums[-1]), steps, error)
            return Verdict(None) if kink else verdict
    return Verdict(None)


def at_kink(middle: Tensor, sums: tuple[Tensor, Tensor], steps: tuple[float, float], least: float) -> bool:
    """Whether the derivatives from both sides differ, and by as much for the narrower one of two steps.

    Exactly at a kink, as of ReLU where biases and inputs are zero, central differences agree: they are the mean of both.

    Args:
        middle: The function's value.
        sums: Of its values at plus and minus each step.
        steps: The wider and the narrower one.
        least: A difference that counts.
    """
    far, near = (float((both - 2 * middle).norm()) / step for both, step in zip(sums, steps, strict=True))
    return near > max(0.5 * far, least)


def judge_hessian(risk: EmpiricalRisk) -> Verdict:
    """Judge the Hessian's product on a random vector; warn if it is wrong."""
    problem = _double_problem(risk)
    if isinstance(problem, Verdict):
        return _without(problem, risk)
    model, batch, space, theta, v = problem

    def value(run: Run) -> tuple[Tensor, OutputCurvature]:
        z = run()
        return z, risk.loss.curvature(z, batch.y, batch.size)

    def slopes(step: float) -> Tensor:
        with model.at(theta + step * v) as (leaves, run):
            found = value(run)[1].value()
            if not found.requires_grad:
                return v * 0
            return space.join(gradients(found, list(leaves.values()), allow_unused=True))

    def product(leaves: Leaves, run: Run) -> Tensor:
        return space.join(GradientLinearization.of_loss(*value(run), leaves, space).parts(v))

    with risk.evaluation(), model.at(theta) as (leaves, run):
        found, why = attempted(lambda: product(leaves, run))
        verdict = compare(found, slopes) if found is not None else Verdict(None, f"it is an error here: {why}")
        if verdict.wrong:
            _warn("Hessian", verdict, run, risk)
    return _without(verdict, risk)


def judge_jacobian(risk: EmpiricalRisk) -> Verdict:
    """Judge the products of the model's Jacobian and its adjoint with random vectors; warn if one is wrong."""
    problem = _double_problem(risk)
    if isinstance(problem, Verdict):
        return problem
    model, _, space, theta, v = problem

    def both(step: float) -> Tensor:
        with torch.no_grad(), model.at(theta + step * v) as (_, run):
            z = run()
        return torch.cat([z.flatten(), (u * z).sum().expand(1) * scale])

    with risk.evaluation(), model.at(theta) as (leaves, run):
        jacobian = OutputLinearization(run(), leaves, space)
        z = jacobian.z.detach()
        u = torch.randn(z.shape, generator=torch.Generator().manual_seed(1), dtype=z.dtype, device="cpu").to(z.device)
        # ⟨Jᵀ u, v⟩ beside J v: a hook on the graph may change one and not the other
        scale = z.norm() / u.norm()
        along = torch.dot(space.join(jacobian.pull(u)), v).expand(1) * scale
        pushed, why = attempted(lambda: jacobian.push(v).flatten())
        found = None if pushed is None else torch.cat([pushed, along])
        verdict = compare(found, both) if found is not None else Verdict(None, f"it is an error here: {why}")
        if verdict.wrong:
            _warn("Jacobian", verdict, run, risk)
    return verdict


def _double_problem(risk: EmpiricalRisk) -> tuple[Movable, Batch, TensorSpace, Tensor, Tensor] | Verdict:
    """The model at a few data in double precision, these, the parameters' space, they, and a random direction.

    Or why there is no verdict.
    """
    long = Verdict(None, "central differences would take long")
    if risk.space.shards:
        return Verdict(None, "parameters are cut over processes")
    if risk.space.dim > LARGEST:
        return long
    with risk.evaluation(), closing(risk.data.walk()) as batches:
        batch = next(batches, None)
    if batch is None:
        return Verdict(None, "this process has no data")
    # about a gradient of the whole batch, where it has many data; one datum says nothing of several to a norm in TorchScript
    cut = all(t.ndim and t.shape[0] == batch.size for t in tensors_of((batch.X, batch.y)))
    least = min(batch.size, 2 if scripted(risk.model.modules()) & NORMS_OF_BATCHES else 1)
    few = max(least, min(DATA, batch.size // 8)) if cut else batch.size
    if risk.space.dim > SMALL and 4 * few > batch.size:
        return long
    X, y = (select(part, batch.size, slice(0, few)) for part in (batch.X, batch.y))
    double = [map_tensors(lambda t: floating_to(t, torch.float64), part) for part in (X, y)]
    small = Batch(double[0], double[1], few, batch.start)
    try:
        with risk.evaluation(), quietly():
            params = {name: p.detach().double() for name, p in risk.params.items()}
            space = TensorSpace(params)
            theta = space.join(params.values())
            found = movable(risk, X, small.X, space)
            if found is None:
                return Verdict(
                    None, "the model reaches its parameters in ways that neither stand-ins nor a copy of it do"
                )
            model, slope = found
            with torch.no_grad(), model.at(theta) as (_, run):
                z = run()
                risk.loss.curvature(z, small.y, few).value()
    except torch.OutOfMemoryError:
        raise
    except UNFIT:
        return Verdict(None, "the model is tied to its own precision or batch size")
    with risk.evaluation():
        v = space.random(torch.Generator().manual_seed(0))
        return model, small, space, theta, v * ~_constants(model, theta, z, v * _partly_zero(slope, space))


def _constants(model: Movable, theta: Tensor, z: Tensor, v: Tensor) -> Tensor:
    """Entries of v that are constants to autodiff, but not to the model: the padding's row of an embedding.

    Along v, which autodiff says the output does not depend on, it changes as much forwards as backwards. At a kink it
    does not, and nothing is left out: the steps of the differences will not agree.
    """
    if not v.any():
        return v != 0
    ends = []
    with torch.no_grad():
        for step in (STEPS[0], -STEPS[0]):
            with model.at(theta + step * v) as (_, run):
                ends.append(run())
    forwards, backwards = ends[0] - z, z - ends[1]
    smooth = (forwards - backwards).norm() <= 0.1 * forwards.norm()
    return (v != 0) & (smooth & (forwards.norm() > 0))


def _partly_zero(slope: Tensor, space: TensorSpace) -> Tensor:
    """Entries without a gradient, of parameters that have one elsewhere."""
    return torch.cat([((part == 0) & (part != 0).any()).flatten() for part in space.split(slope)])


def _warn(what: str, verdict: Verdict, run: Callable[[], Tensor], risk: EmpiricalRisk) -> None:
    names, unseen = suspects(run), sorted(scripted(risk.model.modules()))
    where = f"The operations to blame: {', '.join(names)}." if names else "No single operation could be named."
    if unseen and not names:
        where = f"TorchScript runs {', '.join(unseen)}, and they are only replaced in the module as it was before torch.jit."
    warnings.warn(
        f"{what}: PyTorch's second-order derivative differs from central differences by {verdict.error:.1e} (relative) on "
        f"this model. {where} Replace these operations by plain ones, or expect wrong products. (Parts that are detached on purpose are "
        "constants to autodiff; the differences move them.)",
        RuntimeWarning,
        stacklevel=5,
    )


def _without(verdict: Verdict, risk: EmpiricalRisk) -> Verdict:
    """The verdict; where there is none, warn of what is known to be wrong and cannot be replaced."""
    if verdict.error is None and "_weight_norm" in scripted(risk.model.modules()):
        warnings.warn(
            "Hessian: TorchScript runs _weight_norm, whose second derivative in PyTorch is wrong, and which is only replaced in the "
            "module as it was before torch.jit. Pass that one, or expect wrong products.",
            RuntimeWarning,
            stacklevel=5,
        )
    return verdict


class _Recorder(TorchFunctionMode):
    """Keeps one call of each operation that takes and gives floating-point tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple[Any, list[Any], dict[str, Any]]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kept = map_tensors(lambda t: t.detach().clone(), [list(args), kwargs])
        out = func(*args, **kwargs)
        if isinstance(out, Tensor) and out.requires_grad:
            name = resolve_name(func) or getattr(func, "__name__", str(func))
            self.calls.setdefault(name, (func, *kept))
        return out


def suspects(run: Callable[[], Tensor]) -> list[str]:
    """Names of the operations of a computation whose own second derivative central differences refute.

    A function mode does not see the model's own `torch.autograd.Function`s; if there are some and nothing else
    is refuted, they are what is left.
    """
    with _Recorder() as recorder:
        out = run()
    own = {
        type(node).__name__.removesuffix("Backward") for node in nodes_of(out) if isinstance(node, BackwardCFunction)
    }
    return [name for name, call in recorder.calls.items() if _is_wrong(*call)] or sorted(own)


def _moved(params: dict[str, Tensor], space: TensorSpace, v: Tensor, step: float) -> dict[str, Tensor]:
    """Leaves at θ + step · v."""
    flat = space.join(params.values()) + step * v
    return {name: t.detach().requires_grad_() for name, t in zip(params, space.split(flat), strict=True)}


def _is_wrong(func: Any, args: list[Any], kwargs: dict[str, Any]) -> bool:
    inputs = {str(k): t for k, t in enumerate(tensors_of((args, kwargs))) if t.is_floating_point()}
    if not inputs:
        return False
    space = TensorSpace(inputs)
    v = space.random(torch.Generator().manual_seed(0))

    def scalar(xs: dict[str, Tensor]) -> Tensor:
        values = iter(xs.values())
        given, named = map_tensors(lambda t: next(values).clone() if t.is_floating_point() else t, [args, kwargs])
        out: Tensor = func(*given, **named)
        ramp = torch.arange(1, out.numel() + 1, device=out.device, dtype=out.dtype)
        return (out.flatten() * ramp.cos()).tanh().sum()  # any smooth scalar of the output

    def slopes(step: float) -> Tensor:
        xs = _moved(inputs, space, v, step)
        return space.join(gradients(scalar(xs), list(xs.values()), allow_unused=True))

    try:
        leaves = _moved(inputs, space, v, 0.0)
        return compare(space.join(GradientLinearization(scalar(leaves), leaves, space).parts(v)), slopes).wrong
    except UNFIT:
        return False  # cannot be differentiated on its own, so nothing is said of it
