"""Plots of the loss along eigenvectors or other directions, on a line and on a plane."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from curvops.operators.linear_operator import LinearOperator
from curvops.plots.axes import BLUE, RED, SEQUENTIAL, drawn_on
from curvops.plots.landscape import Landscape
from curvops.space import Vector

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_loss_along(operator: LinearOperator, direction: Vector, *, steps: Any = None, ax: Axes | None = None) -> Axes:
    """Plot the loss L(θ + t v) over t, and the quadratic model of the operator.

    Args:
        operator: The curvature of the quadratic model: a Hessian, GGN, KFAC, … with its ``risk``.
        direction: v in any format, such as ``pairs.vectors[:, -1]``; it is not rescaled.
        steps: t, a tensor or an array ``[N]``. Default: 41 from −1 to 1.
        ax: Axes to draw on. Default: new ones.

    Returns:
        The axes.

    Raises:
        TypeError, ValueError: If an argument is not as described.

    Example:
        >>> import torch
        >>> from curvops import HessianLinearOperator
        >>> model, data = torch.nn.Linear(3, 2), [(torch.rand(5, 3), torch.randint(2, (5,)))]
        >>> hessian = HessianLinearOperator(model, torch.nn.CrossEntropyLoss(), dict(model.named_parameters()), data)
        >>> ax = plot_loss_along(hessian, hessian.eigenpairs(1).vectors[:, 0])
        >>> [line.get_label() for line in ax.lines]
        ['loss', 'quadratic model']
    """
    t = _steps(steps, 41, "plot_loss_along")
    line = Landscape(operator, [direction], "plot_loss_along")
    losses, model = (found(t.unsqueeze(1)).double().cpu() for found in (line.losses, line.model))
    with drawn_on(ax, "plot_loss_along") as ax:
        ax.plot(t, losses, color=BLUE, label="loss")
        ax.plot(t, model, color=RED, ls="--", label="quadratic model")
        ax.set_xlabel("Step along the direction")
        ax.set_ylabel("Loss")
        ax.legend()
        return ax


def plot_loss_plane(
    operator: LinearOperator,
    first: Vector,
    second: Vector,
    *,
    steps: Any = None,
    levels: int = 15,
    ax: Axes | None = None,
) -> Axes:
    """Plot contours of the loss L(θ + s u + t v), filled, and those of the operator's quadratic model, dashed.

    Args:
        operator: As of `plot_loss_along`.
        first: u, along the horizontal axis.
        second: v, along the vertical axis.
        steps: s and t, a tensor or an array ``[N]``, increasing; the loss is evaluated N² times. Default: 21 from −1 to 1.
        levels: Number of contours, at most.
        ax: Axes to draw on. Default: new ones.

    Returns:
        The axes, with a cross at θ. The colour bar has its own, at their side.
    """
    t = _steps(steps, 21, "plot_loss_plane")
    plane = Landscape(operator, [first, second], "plot_loss_plane")
    both = torch.cartesian_prod(t, t)
    # the first direction is horizontal, that is along the columns
    losses, model = (found(both).double().cpu().reshape(len(t), -1).T for found in (plane.losses, plane.model))
    with drawn_on(ax, "plot_loss_plane") as ax:
        filled = ax.contourf(t, t, losses, levels=levels, cmap=SEQUENTIAL)
        ax.contour(t, t, model, levels=filled.levels, colors="0.2", linewidths=0.5, linestyles="--")
        ax.plot(0, 0, "+", color="0.2", ms=5)
        ax.set_xlabel("Step along the first direction")
        ax.set_ylabel("Step along the second")
        ax.figure.colorbar(filled, ax=ax).set_label("Loss")
        return ax


def _steps(steps: Any, count: int, title: str) -> Tensor:
    even = torch.linspace(-1, 1, count, dtype=torch.float64, device="cpu")
    given = steps.detach() if isinstance(steps, Tensor) else even if steps is None else torch.as_tensor(steps.copy())
    found = given.double().cpu()
    if found.ndim != 1 or len(found) < 2:
        raise ValueError(f"{title}: expected at least two steps [N], got shape {tuple(found.shape)}.")
    return found
