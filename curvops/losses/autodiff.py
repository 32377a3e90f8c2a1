"""Curvature of any twice differentiable loss in the model's output, by autodiff."""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from curvops.losses.base import OutputCurvature, OutputLoss, compute_dtype
from curvops.losses.factor import Factor, StackedFactor
from curvops.losses.facts import is_convex, output_weights, term_layout
from curvops.losses.layout import TermLayout
from curvops.losses.noise import Noise
from curvops.losses.probes import couples_terms, is_additive
from curvops.losses.scalar import ScalarLoss

# how PyTorch says that there is no second derivative
_ONCE_DIFFERENTIABLE = ("not implemented", "once_differentiable", "double backward")


class AutodiffLoss(OutputLoss):
    """A loss without a closed form.

    A module with a `reduction`, or a function with this keyword, is evaluated with
    "sum", and the denominator of its "mean" is the ratio of the two. Of any other
    function, "mean" means the mean over data.

    Args:
        loss: The module or function.
        reduction: "mean" or "sum".
        averaging: What a switchable loss calls its mean: "mean" or "batchmean".

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from curvops.losses import output_loss
        >>> loss = output_loss(nn.HuberLoss(delta=2.0))
        >>> z, y = torch.tensor([[0.0], [5.0]]), torch.zeros(2, 1)
        >>> loss.count(y, batch_size=2, z=z)
        2.0
        >>> loss.at(z, y, batch_size=2).hessian_product(torch.ones(2, 1))
        tensor([[1.],
                [0.]])
    """

    def __init__(self, loss: ScalarLoss, reduction: str, averaging: str) -> None:
        self.reduction = reduction
        self.psd = is_convex(loss)
        self.needs_output_to_count = loss.switchable and reduction == "mean"
        self._loss = loss
        self._averaging = averaging

    def count(self, y: Any, batch_size: int, z: Tensor | None = None) -> float:
        """Divide the loss with "sum" by that with "mean"; see `OutputLoss.count`.

        Raises:
            ValueError: If z is missing, or the two are not proportional.
        """
        if not self.needs_output_to_count:
            return float(batch_size)
        if z is None:
            raise ValueError(f"{self._loss.name!r}: 'count' needs the model's output. Pass z.")
        z = z.detach().double()
        # where the loss vanishes (a perfect fit) the ratio is sought at other outputs
        elsewhere = Noise(0, 0).uniform(z.numel(), 1, 1, device=z.device).reshape(z.shape)
        for output in (z, elsewhere):
            total, mean = self._both(output, y)
            if total != 0 and mean != 0 and torch.isfinite(total / mean):
                return float(total / mean)
            if total == 0 and mean.isnan():
                return 0.0  # every target is ignored
        raise ValueError(
            f"{self._loss.name!r}: its sum {float(total)} and mean {float(mean)} over a batch do not tell what it "
            "divides by. Pass a function with reduction='sum'."
        )

    def at(self, z: Tensor, y: Any, batch_size: int) -> "AutodiffCurvature":
        """Look at one batch; see `OutputLoss.at`.

        Raises:
            ValueError: If the loss is not additive over data, or has weights with a
                batch axis.
        """
        output_weights(self._loss, z.detach(), y)
        if not is_additive(self._total, z.detach().to(compute_dtype(z)), y, batch_size):
            raise ValueError(
                f"{self._loss.name!r} with reduction={self.reduction!r}: the loss of a batch is not the "
                f"{'sum' if self._loss.switchable else self.reduction} of the losses of its data. It mixes data, or "
                "divides by something else than their number (class weights, ignored targets). Pass a function "
                "that sums over data, with reduction='sum', and scale it yourself."
            )
        return AutodiffCurvature(z, y, batch_size, self._loss, self._total)

    def _total(self, z: Tensor, y: Any, batch_size: float) -> Tensor:
        """The sum of the loss over data."""
        value = self._loss.evaluate(z, y, "sum")
        return value * batch_size if self.reduction == "mean" and not self._loss.switchable else value

    def _both(self, z: Tensor, y: Any) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return self._loss.evaluate(z, y, "sum"), self._loss.evaluate(z, y, self._averaging)


class AutodiffCurvature(OutputCurvature):
    """The sum of a loss over data, differentiated twice where asked.

    A term is a vector along the last axis of the output (for `nn.NLLLoss` along axis
    1; of a one-axis output an entry), if the output Hessian does not couple these.
    Otherwise it is a whole datum.
    """

    closed_form = False

    def __init__(
        self, z: Tensor, y: Any, batch_size: int, loss: ScalarLoss, total: Callable[[Tensor, Any, float], Tensor]
    ) -> None:
        super().__init__(z, y, batch_size)
        self.psd = is_convex(loss)
        self._loss = loss
        self._total = total

    @cached_property
    def layout(self) -> TermLayout:
        """The terms, found by probing the output Hessian."""
        fine, whole = term_layout(self._loss, self.z), TermLayout(self.z.shape, None)
        for layout in (fine, whole):
            counts = layout is fine or (self.z.ndim > 0 and self.z.shape[0] == self.batch_size)
            if counts and not couples_terms(self._hessian_product, layout, self.dtype, self.z.device):
                return layout
        raise ValueError(
            f"{self._loss.name!r}: its output Hessian couples the data of a batch (output of shape "
            f"{tuple(self.z.shape)}, {self.batch_size} data), so it has no factor per loss term. Products with the "
            "Hessian and the GGN still work."
        )

    def value(self) -> Tensor:
        """Compute the sum of the loss over data."""
        return self._total(self.z.to(self.dtype), self.y, self.batch_size)

    def gradient(self) -> Tensor:
        """Differentiate `value`, as rows."""
        return self.layout.rows(self._graph[1].detach())

    def _hessian_product(self, u: Tensor) -> Tensor:
        if not self._twice_differentiable:
            raise NotImplementedError(self._no_second_derivative)
        return self._second_backward(self._graph[0], u)

    def _exact_factor(self) -> Factor:
        return StackedFactor(self._root.to(self.dtype))

    def _sampled_factor(self, mc_samples: int, noise: Noise) -> Factor:
        signs = noise.signs(self.num_terms, self.terms_per_datum, mc_samples, self.width, device=self.z.device)
        return StackedFactor((self._root @ signs.mT / mc_samples**0.5).to(self.dtype))

    def _empirical_factor(self) -> Factor:
        gradient = self.gradient()
        weights = output_weights(self._loss, self._constant, self.y)
        if weights is not None:
            rows = self.layout.rows(weights.expand(self.z.shape))
            gradient = torch.where(rows > 0, gradient * torch.where(rows > 0, rows, 1).rsqrt(), 0)
        return StackedFactor(gradient.unsqueeze(-1))

    @cached_property
    def _graph(self) -> tuple[Tensor, Tensor, Tensor]:
        """The output as a leaf, the loss's gradient in it with its graph, and the cotangent of the loss, 1."""
        with torch.enable_grad():
            z = self._constant.clone().requires_grad_()
            value = self._total(z, self.y, self.batch_size)
            if not value.requires_grad:
                raise ValueError(f"{self._loss.name!r}: the loss does not depend differentiably on the output.")
            one = torch.ones_like(value).requires_grad_()
            (gradient,) = torch.autograd.grad(value, z, one, create_graph=True, materialize_grads=True)
        return z, gradient, one

    def _second_backward(self, source: Tensor, u: Tensor) -> Tensor:
        """Differentiate the gradient along u in the output or the cotangent."""
        try:
            (product,) = torch.autograd.grad(
                self._graph[1], source, u, retain_graph=True, create_graph=u.requires_grad, materialize_grads=True
            )
        except RuntimeError as error:
            if not any(reason in str(error) for reason in _ONCE_DIFFERENTIABLE):
                raise
            raise NotImplementedError(self._no_second_derivative) from error
        return product

    @cached_property
    def _twice_differentiable(self) -> bool:
        """Whether the gradient's graph is whole.

        A function whose backward is hidden from autograd (`once_differentiable`) would silently pass as linear.
        But every gradient is linear in the cotangent, unless its graph is cut.
        """
        _, gradient, one = self._graph
        gradient = gradient.detach()
        echo, expected = self._second_backward(one, gradient), gradient.square().sum()
        return not bool((echo - expected).abs() > torch.finfo(self.dtype).eps ** 0.5 * expected)

    @property
    def _no_second_derivative(self) -> str:
        return f"{self._loss.name!r} cannot be differentiated twice in PyTorch. Write it in plain operations."

    @cached_property
    def _root(self) -> Tensor:
        """The symmetric root of each term's output Hessian, `[T, C, C]` in float64.

        Unlike a basis of eigenvectors it is unique, so that sampled factors do not
        depend on how the data is cut.
        """
        shape = (self.num_terms, self.width)
        hessian = torch.empty(*shape, self.width, dtype=torch.float64, device=self.z.device)
        for k in range(self.width):
            unit = torch.zeros(shape, dtype=self.dtype, device=self.z.device)
            unit[:, k] = 1
            hessian[..., k] = self.layout.rows(self._hessian_product(self.layout.outputs(unit)))
        values, vectors = torch.linalg.eigh((hessian + hessian.mT) / 2)
        self._expect_convex(values)
        root: Tensor = (vectors * values.clamp(min=0).sqrt().unsqueeze(-2)) @ vectors.mT
        return root

    def _expect_convex(self, values: Tensor) -> None:
        if not values.numel():
            return
        scale = torch.maximum(values.abs().max(), self._graph[1].detach().abs().max().double())
        if values.min() < -10 * self.width * torch.finfo(self.dtype).eps * scale:
            raise ValueError(
                f"{self._loss.name!r} is not convex in the output (its output Hessian has the eigenvalue "
                f"{values.min().item():.3g}), so it has no factor: 'type-2' and 'mc' do not exist. Products with the "
                "Hessian and the GGN still work; for a Fisher or a Kronecker approximation use 'empirical'."
            )
