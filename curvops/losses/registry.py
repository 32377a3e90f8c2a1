"""From a loss function to the object that is asked for its curvature, batch by batch."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvops.losses.additivity import LossWalk
from curvops.losses.autodiff import AutodiffCurvature
from curvops.losses.base import ClosedForm, OutputCurvature
from curvops.losses.cross_entropy import CrossEntropyCurvature
from curvops.losses.entries import BinaryCrossEntropyCurvature, SquaredErrorCurvature
from curvops.losses.scalar import ScalarLoss, is_untouched

# function, module, what has its formulas, and the options that these take
_CLOSED_FORMS: tuple[tuple[Any, type[nn.Module], type[ClosedForm], tuple[str, ...]], ...] = (
    (F.cross_entropy, nn.CrossEntropyLoss, CrossEntropyCurvature, ("weight", "ignore_index", "label_smoothing")),
    (F.binary_cross_entropy_with_logits, nn.BCEWithLogitsLoss, BinaryCrossEntropyCurvature, ("weight", "pos_weight")),
    (F.mse_loss, nn.MSELoss, SquaredErrorCurvature, ("weight",)),
)


def output_loss(loss_func: Callable[..., Any], reduction: str | None = None) -> "OutputLoss":
    """Find the curvature of a loss function in the model's output.

    Cross-entropy, binary cross-entropy of logits and squared error have closed forms, as modules, as functions of
    `torch.nn.functional`, and as `functools.partial` of these with keywords. Any other loss that is twice
    differentiable in the output is differentiated; see `curvops.losses.autodiff`.

    Args:
        loss_func: Maps (output, target) to a scalar.
        reduction: "mean" or "sum". Needed for a function that does not tell; must agree with a module's own.

    Raises:
        ValueError: If the reduction is missing, not "mean" or "sum", or contradicts the loss function's, or an option
            is not supported.
        TypeError: If the loss function cannot be called with two arguments.

    Example:
        >>> import torch
        >>> z, y = torch.tensor([[0.0], [5.0]]), torch.zeros(2, 1)
        >>> walk = output_loss(nn.HuberLoss(delta=2.0)).walk()
        >>> walk.curvature(z, y, batch_size=2).hessian_product(torch.ones(2, 1))
        tensor([[1.],
                [0.]])
        >>> walk.constant()
        0.5
    """
    return OutputLoss(ScalarLoss(loss_func, reduction))


class OutputLoss:
    """A loss function, asked as it is at that moment: nothing of it is copied. Made by `output_loss`.

    A module with a `reduction`, or a function with this keyword, is evaluated with "sum", and what its "mean" divides
    by is the ratio of the two. Of any other function, "mean" means the mean over data.
    """

    def __init__(self, loss: ScalarLoss) -> None:
        self._loss = loss
        loss.reduction()
        if closed := self._closed_form():
            closed[0].check(**closed[1])

    @property
    def name(self) -> str:
        """What the function is called, or the class of the module."""
        return self._loss.name

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that it holds, such as class weights, by name."""
        return self._loss.tensors

    @property
    def description(self) -> str:
        """What it is, in words that are the same in another process."""
        return self._loss.description

    @property
    def reduction(self) -> str:
        """ "mean" or "sum", over the whole data set."""
        return self._loss.reduction()[0]

    @property
    def psd(self) -> bool:
        """Whether the output Hessian is positive semi-definite by construction."""
        return self._closed_form() is not None or self._loss.convex

    def walk(self) -> LossWalk:
        """Begin one pass over the data."""
        return LossWalk(self._loss, self.curvature)

    def expect_sum(self, z: Tensor, y: Any, batch_size: int) -> None:
        """A ValueError where a batch's loss is seen not to be the sum of its data's losses; known sums are not asked."""
        if not self._loss.known:
            self.walk().curvature(z, y, batch_size)

    def curvature(self, z: Tensor, y: Any, batch_size: int, checked: bool = True) -> OutputCurvature:
        """The loss of one batch of data, with targets y, at the model's output z, which may carry a graph.

        Where `checked`, formulas are compared with the loss itself, which no transform of `torch.func` allows. What
        does not fit raises a ValueError.
        """
        closed = self._closed_form()
        if closed and y is None:
            raise TypeError(f"data: {self.name!r} takes targets, and y is None. Pass batches (X, y).")
        if closed and isinstance(y, Tensor) and not y.requires_grad:
            found = closed[0](z, y, batch_size, **closed[1])
            if not checked or self._agrees(found):
                return found
        return AutodiffCurvature(z, y, batch_size, self._loss)

    def _closed_form(self) -> tuple[type[ClosedForm], dict[str, Any]] | None:
        """The formulas of exactly this loss, and its options."""
        own = self._loss.function
        for function, module, kind, names in _CLOSED_FORMS:
            if own is function or (type(own) is module and is_untouched(own)):
                return kind, {name: option for name in names if (option := self._loss.option(name)) is not None}
        return None

    def _agrees(self, found: ClosedForm) -> bool:
        """Whether formulas give the loss's own value and gradient on their batch, which hooks of all modules may alter."""
        reduction, averaging = self._loss.reduction()
        count = found.count if reduction == "mean" else 1.0
        if count == 0 or not found.z.numel():
            return True  # PyTorch's mean of nothing is not a number
        with torch.enable_grad():
            z = found.z.detach().to(found.dtype).requires_grad_()
            own = self._loss.evaluate(z, found.y, averaging)
            if not own.requires_grad:
                return False
            (slope,) = torch.autograd.grad(own, z, materialize_grads=True)
        eps = torch.finfo(found.dtype).eps
        with torch.no_grad():
            rows = found.rows(slope)
            difference = found.gradient().sub_(rows, alpha=count)
            difference.abs_()
            # numbers leave the device together
            numbers = torch.stack([own, found.quick_value(), *rows.aminmax(), difference.max()]).tolist()
            target, value, low, high, largest = (count * numbers[0], *numbers[1:])
            if math.isnan(largest):
                largest = float(difference.nan_to_num_(0.0).max())
            if largest > eps**0.5 * count * max(-low, high) + 10 * eps:
                return False

            def differ(value: float) -> bool:
                return abs(target - value) > eps**0.5 * (abs(target) + abs(value)) + eps * found.num_terms

            return not (differ(value) or math.isnan(value)) or not differ(float(found.value()))
