"""A judge that knows no rule of second order: central differences of first-order autodiff.

It looks at a few data in double precision, and gives a verdict only where the differences at several
steps agree with each other (at kinks such as ReLU's they do not).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode, resolve_name

from curvops.context import UNFIT, quietly
from curvops.losses import OutputCurvature
from curvops.products.account import relative_difference, tolerance
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
    why: str = "central differences disagree, as they do near a kink such as ReLU's"

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
    product, slopes = product.detach(), list[Tensor]()
    for step in STEPS:
        slopes.append(((at(step) - at(-step)) / (2 * step)).detach())
        scale = max(float(slope.norm()) for slope in slopes)
        if not torch.isfinite(torch.tensor(scale)):
            return Verdict(None)
        if len(slopes) > 1 and float((slopes[-1] - slopes[-2]).norm()) <= STEADY * scale:
            error = min(float((product - slope).norm()) for slope in slopes[-2:])
            return Verdict(error / scale if scale > 1e-12 else error)
    return Verdict(None)


def judge_hessian(risk: EmpiricalRisk) -> Verdict:
    """Judge the Hessian's product on a random vector; warn if it is wrong."""
    problem = _double_problem(risk)
    if isinstance(problem, Verdict):
        return problem
    params, batch, space, v = problem

    def value(leaves: dict[str, Tensor]) -> tuple[Tensor, OutputCurvature]:
        z = risk.functional(leaves, batch.X)
        return z, risk.loss.curvature(z, batch.y, batch.size)

    def slopes(step: float) -> Tensor:
        leaves = _moved(params, space, v, step)
        with risk.model.standing_in(leaves, torch.float64):  # also for what is run again in the backward pass
            found = value(leaves)[1].value()
            return (
                space.join(gradients(found, list(leaves.values()), allow_unused=True)) if found.requires_grad else v * 0
            )

    with risk.evaluation():
        leaves = _moved(params, space, v, 0.0)
    with risk.evaluation(), risk.model.standing_in(leaves, torch.float64):
        linear = GradientLinearization.of_loss(*value(leaves), leaves, space)
        verdict = compare(space.join(linear.parts(v)), slopes)
        if verdict.wrong:
            _warn("Hessian", verdict, lambda: risk.functional(leaves, batch.X))
    return verdict


def judge_jacobian(risk: EmpiricalRisk) -> Verdict:
    """Judge the products of the model's Jacobian and its adjoint with random vectors; warn if one is wrong."""
    problem = _double_problem(risk)
    if isinstance(problem, Verdict):
        return problem
    params, batch, space, v = problem

    def both(step: float) -> Tensor:
        moved = _moved(params, space, v, step)
        with torch.no_grad(), risk.model.standing_in(moved, torch.float64):
            z = risk.functional(moved, batch.X)
        return torch.cat([z.flatten(), (u * z).sum().expand(1) * scale])

    with risk.evaluation():
        leaves = _moved(params, space, v, 0.0)
    with risk.evaluation(), risk.model.standing_in(leaves, torch.float64):
        jacobian = OutputLinearization(risk.functional(leaves, batch.X), leaves, space)
        z = jacobian.z.detach()
        u = torch.randn(z.shape, generator=torch.Generator().manual_seed(1), dtype=z.dtype).to(z.device)
        # ⟨Jᵀ u, v⟩ beside J v: a hook on the graph may change one and not the other
        scale = z.norm() / u.norm()
        along = torch.dot(space.join(jacobian.pull(u)), v).expand(1) * scale
        verdict = compare(torch.cat([jacobian.push(v).flatten(), along]), both)
        if verdict.wrong:
            _warn("Jacobian", verdict, lambda: risk.functional(leaves, batch.X))
    return verdict


def _double_problem(risk: EmpiricalRisk) -> tuple[dict[str, Tensor], Batch, TensorSpace, Tensor] | Verdict:
    """Parameters and a few data in double precision, their space, and a random direction; or why there is no verdict."""
    long = Verdict(None, "central differences would take long")
    if risk.space.shards:
        return Verdict(None, "parameters are cut over processes")
    if risk.space.dim > LARGEST:
        return long
    with risk.evaluation(), closing(risk.data.walk()) as batches:
        batch = next(batches, None)
    if batch is None:
        return Verdict(None, "this process has no data")
    # about a gradient of the whole batch, where it has many data
    cut = all(t.ndim and t.shape[0] == batch.size for t in tensors_of((batch.X, batch.y)))
    few = max(1, min(DATA, batch.size // 8)) if cut else batch.size
    if risk.space.dim > SMALL and 4 * few > batch.size:
        return long
    X, y = (select(part, batch.size, slice(0, few)) for part in (batch.X, batch.y))
    double = [map_tensors(lambda t: floating_to(t, torch.float64), part) for part in (X, y)]
    small = Batch(double[0], double[1], few, batch.start)
    try:
        with risk.evaluation(), quietly():
            params = {name: p.detach().double() for name, p in risk.params.items()}
            slope = _reached(risk, X)
            if slope is None:
                return Verdict(None, "the model reaches its parameters in ways that no stand-in does")
            with torch.no_grad(), risk.model.standing_in(params, torch.float64):
                z = risk.functional(params, small.X)
                risk.loss.curvature(z, small.y, few).value()
    except torch.OutOfMemoryError:
        raise
    except UNFIT:
        return Verdict(None, "the model is tied to its own precision or batch size")
    space = TensorSpace(params)
    with risk.evaluation():
        v = space.random(torch.Generator().manual_seed(0))
        return params, small, space, v * ~_constants(risk, params, space, small.X, z, v * _partly_zero(slope, space))


def _constants(
    risk: EmpiricalRisk, params: dict[str, Tensor], space: TensorSpace, X: Any, z: Tensor, v: Tensor
) -> Tensor:
    """Entries of v that are constants to autodiff, but not to the model: the padding's row of an embedding.

    Along v, which autodiff says the output does not depend on, it changes as much forwards as backwards. At a kink it
    does not, and nothing is left out: the steps of the differences will not agree.
    """
    if not v.any():
        return v != 0
    ends = []
    with torch.no_grad():
        for step in (STEPS[0], -STEPS[0]):
            moved = _moved(params, space, v, step)
            with risk.model.standing_in(moved, torch.float64):
                ends.append(risk.functional(moved, X))
    forwards, backwards = ends[0] - z, z - ends[1]
    smooth = (forwards - backwards).norm() <= 0.1 * forwards.norm()
    return (v != 0) & (smooth & (forwards.norm() > 0))


def _partly_zero(slope: Tensor, space: TensorSpace) -> Tensor:
    """Entries without a gradient, of parameters that have one elsewhere."""
    return torch.cat([((part == 0) & (part != 0).any()).flatten() for part in space.split(slope)])


def _reached(risk: EmpiricalRisk, X: Any) -> Tensor | None:
    """Jᵀu for a random u, if stand-ins reach whatever the parameters do: the judge moves them, not the caller's parameters."""
    leaves = {name: p.detach().requires_grad_() for name, p in risk.params.items()}
    found = []
    for z, inputs in ((risk.forward(X), risk.params), (risk.functional(leaves, X), leaves)):
        u = torch.randn(z.shape, generator=torch.Generator().manual_seed(2)).to(z)
        mode = risk.model.standing_in(inputs)
        with mode:
            parts = (
                gradients(z, list(inputs.values()), u, retain_graph=True, allow_unused=True)
                if z.requires_grad
                else [None] * len(inputs)
            )
        found.append(risk.space.join(parts))
    return found[0] if relative_difference(found[1], found[0]) <= tolerance(risk.space.dtype) else None


def _moved(params: dict[str, Tensor], space: TensorSpace, v: Tensor, step: float) -> dict[str, Tensor]:
    """Leaves at θ + step · v."""
    flat = space.join(params.values()) + step * v
    return {name: t.detach().requires_grad_() for name, t in zip(params, space.split(flat), strict=True)}


def _warn(what: str, verdict: Verdict, run: Callable[[], Tensor]) -> None:
    names = suspects(run)
    where = f"The operations to blame: {', '.join(names)}." if names else "No single operation could be named."
    warnings.warn(
        f"{what}: PyTorch's second-order derivative differs from central differences by {verdict.error:.1e} (relative) on "
        f"this model. {where} Replace these operations by plain ones, or expect wrong products.",
        RuntimeWarning,
        stacklevel=5,
    )


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
