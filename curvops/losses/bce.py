"""Curvature of the binary cross-entropy of logits in the model's output."""

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from curvops.losses.base import ClosedForm, TermLayout, entry_layout
from curvops.losses.factor import DiagonalFactor, Factor, StackedFactor
from curvops.losses.mse import expect_same_shape
from curvops.losses.noise import Noise


class BinaryCrossEntropyCurvature(ClosedForm):
    """The sum of ω ((1 - y) z + (1 + (π - 1) y) log(1 + exp(-z))); "mean" divides by the number of entries.

    Here ω is the weight and π the pos_weight, neither negative nor with a batch axis. The
    output Hessian is diagonal, with entries ω σ (1 - σ) (1 + (π - 1) y), where σ is the
    sigmoid of z.
    """

    def __init__(
        self,
        z: Tensor,
        y: Tensor,
        batch_size: int,
        weight: Tensor | None = None,
        pos_weight: Tensor | None = None,
    ) -> None:
        self.check(weight=weight, pos_weight=pos_weight)
        expect_same_shape("BCEWithLogitsLoss", z, y)
        expect_no_batch_axis("BCEWithLogitsLoss", "weight", weight, y)
        expect_no_batch_axis("BCEWithLogitsLoss", "pos_weight", pos_weight, y)
        if pos_weight is not None and bool(((y < 0) | (y > 1)).any()):
            raise ValueError(
                "'BCEWithLogitsLoss': with pos_weight, expected targets between 0 and "
                f"1, got values from {y.min().item()} to {y.max().item()}."
            )
        super().__init__(z, y, batch_size)
        one = torch.ones((), dtype=self.dtype, device=z.device)
        self._targets = y.to(self.dtype)
        self._weight = one if weight is None else weight.to(one)
        self._slope = one
        if pos_weight is not None:
            self._slope = 1 + (pos_weight.to(one) - 1) * self._targets

    @staticmethod
    def check(**options: Tensor | None) -> None:
        for name, option in options.items():
            if option is not None and bool((option < 0).any()):
                raise ValueError(
                    f"'BCEWithLogitsLoss': expected a non-negative {name}, got a minimum of {option.min().item()}."
                )

    @cached_property
    def count(self) -> float:
        return float(self.y.numel())

    @property
    def layout(self) -> TermLayout:
        return entry_layout(self.z.shape)

    def value(self) -> Tensor:
        z = self.z.to(self.dtype)
        terms = (1 - self._targets) * z - self._slope * F.logsigmoid(z)
        return (self._weight * terms).sum()

    def gradient(self) -> Tensor:
        return self.layout.rows(self._weight * self._unweighted_gradient)

    def _hessian_product(self, u: Tensor) -> Tensor:
        return self._curvature * u

    def _exact_factor(self) -> Factor:
        return DiagonalFactor(self.layout.rows(self._curvature))

    def _sampled_factor(self, mc_samples: int, noise: Noise) -> Factor:
        uniform = noise.uniform(self.num_terms, self.terms_per_datum, mc_samples, self.width, device=self.z.device)
        scale = (self._weight * self._slope / mc_samples).sqrt()
        rows = self.layout.rows(scale.expand(self.z.shape)).unsqueeze(-1)
        probability = self.layout.rows(self._sigmoid).unsqueeze(-1)
        answers = (uniform.mT < probability).to(self.dtype)
        return StackedFactor(rows * (probability - answers))

    def _empirical_factor(self) -> Factor:
        gradient = self._weight.sqrt() * self._unweighted_gradient
        return StackedFactor(self.layout.rows(gradient).unsqueeze(-1))

    @cached_property
    def _sigmoid(self) -> Tensor:
        return self._constant.sigmoid()

    @cached_property
    def _unweighted_gradient(self) -> Tensor:
        return (1 - self._targets) - self._slope * (-self._constant).sigmoid()

    @cached_property
    def _curvature(self) -> Tensor:
        # σ(-z), not 1 - σ(z), which rounds to zero for large z
        variance = self._sigmoid * (-self._constant).sigmoid()
        return self._weight * self._slope * variance


def expect_no_batch_axis(loss: str, option: str, weight: Tensor | None, y: Tensor) -> None:
    """Reject a weight of entries that could not follow ragged batches."""
    if weight is None:
        return
    shape, target = tuple(weight.shape), tuple(y.shape)
    if len(shape) == len(target) > 0 and shape[0] != 1:
        raise ValueError(
            f"'{loss}': the {option} of shape {shape} has a batch axis (the targets have shape {target}), so it "
            "cannot follow a data set that is cut into batches. Pass one without it, or a loss that reads each "
            "datum's weight from its target."
        )
    tail = target[len(target) - len(shape) :]
    if len(shape) > len(target) or any(size not in (1, full) for size, full in zip(shape, tail, strict=True)):
        raise ValueError(
            f"'{loss}': expected a {option} that broadcasts to the targets' shape {target}, got shape {shape}."
        )
