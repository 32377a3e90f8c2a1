"""Curvature of the cross-entropy over classes in the model's output."""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from curvops.losses.base import ClosedForm, TermLayout, class_layout
from curvops.losses.factor import Factor
from curvops.losses.noise import Noise


class CrossEntropyCurvature(ClosedForm):
    """The sum of -Σ_c t_c w_c log p_c, with p the softmax of z over the classes.

    With the target distribution t (labels, smoothed or soft), the class weights w and ω = Σ_c t_c w_c, a term's output
    Hessian is ω (diag p - p pᵀ). "mean" divides by the sum of the weights of the labels that are not ignored, and by
    the number of terms if the targets are probabilities.
    """

    def __init__(self, z: Tensor, y: Tensor, batch_size: int, **options: Any) -> None:
        super().__init__(z, y, batch_size, **options)
        self._given_weight: Tensor | None = options.get("weight")
        self._ignore_index: int = options.get("ignore_index", -100)
        self._smoothing: float = options.get("label_smoothing", 0.0)
        self._soft = y.is_floating_point()
        self._plain_labels = not self._soft and self._smoothing == 0
        self._expect_fitting()

    @staticmethod
    def check(weight: Tensor | None = None, ignore_index: int = -100, label_smoothing: float = 0.0) -> None:
        if weight is not None and bool((weight < 0).any()):
            raise ValueError(
                f"'CrossEntropyLoss': expected non-negative class weights, got a minimum of {weight.min().item()}."
            )
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"'CrossEntropyLoss': expected a label_smoothing between 0 and 1, got {label_smoothing}.")

    @cached_property
    def count(self) -> float:
        # smoothing does not enter
        if self._soft:
            return float(self.num_terms)
        if self._given_weight is None:
            return float(self._seen.sum())
        return float(self._given_weight.to(self.y.device).double()[self._labels[self._seen]].sum())

    @property
    def layout(self) -> TermLayout:
        return class_layout(self.z.shape)

    def value(self) -> Tensor:
        rows = self.layout.rows(self.z.to(self.dtype)).log_softmax(-1)
        targets = self.weights if self._plain_labels else self._weighted_targets
        if self._plain_labels:  # without a dense target: vocabularies may be large
            rows = rows.gather(1, self._labels)
        # a class without weight contributes nothing, even if its logit is -inf
        return -torch.where(targets != 0, targets * rows, 0).sum()

    def quick_value(self) -> Tensor:
        """From the probabilities: not finite, or inexact, where one is too small."""
        if not self._plain_labels:
            return self.value()
        return -(self.weights * self._probabilities.gather(1, self._labels).log()).sum()

    def gradient(self) -> Tensor:
        """ω p - t w, as rows."""
        scaled = self.weights * self._probabilities
        if self._plain_labels:
            return scaled.scatter_add_(1, self._labels, -self.weights)
        return scaled.sub_(self._weighted_targets)

    def hessian_rows(self, rows: Tensor) -> Tensor:
        # the same for all classes is mapped to zero; without it nothing cancels where a class is sure, as in single precision
        scaled = (rows - rows.gather(1, self._surest)).mul_(self._probabilities)
        return self.weights * (scaled - self._probabilities * scaled.sum(-1, keepdim=True))

    def hessian_root(self, k: int) -> Tensor:
        """√(ω p_k) (e_k - p)."""
        scale = (self.weights * self._probabilities[:, k : k + 1]).sqrt()
        column = -scale * self._probabilities
        column[:, k : k + 1] += scale
        return column

    def _sampled_factor(self, mc_samples: int, noise: Noise) -> Factor:
        """Column m is √(ω/M) (p - e_ŷ), for the m-th sample ŷ of the label."""
        probabilities, weights = self._probabilities, self.weights / mc_samples
        uniform = noise.uniform(self.num_terms, self.terms_per_datum, mc_samples, device=self.z.device)
        labels = sample_classes(probabilities, uniform)

        def column(k: int) -> Tensor:
            scale = weights.sqrt()
            return (scale * probabilities).scatter_add_(1, labels[:, k : k + 1], -scale)

        def product(rows: Tensor) -> Tensor:
            mean = (probabilities * rows).sum(-1, keepdim=True)
            inner = (mean - rows.gather(1, labels)) * weights
            return (probabilities * inner.sum(-1, keepdim=True)).scatter_add(1, labels, -inner)

        return Factor(self.num_terms, self.width, mc_samples, column, product)

    @cached_property
    def weights(self) -> Tensor:
        """The weight ω of each term, `[T, 1]`; zero for ignored terms."""
        if self._soft:
            return self._weighted_targets.sum(-1, keepdim=True)
        if self._given_weight is None:
            return self._seen.to(self.dtype)
        smoothing, weights = self._smoothing, self._class_weights
        return torch.where(self._seen, (1 - smoothing) * weights[self._labels] + smoothing * weights.mean(), 0)

    @cached_property
    def _weighted_targets(self) -> Tensor:
        """The targets t w, `[T, C]`."""
        smoothing, weights = self._smoothing, self._class_weights
        if self._soft:
            rows = self.layout.rows(self.y.detach().to(self.dtype))
            return ((1 - smoothing) * rows + smoothing / self.width) * weights
        floor = (smoothing / self.width * weights).expand(self.num_terms, -1)
        targets = floor.scatter_add(1, self._labels, (1 - smoothing) * weights[self._labels])
        return torch.where(self._seen, targets, 0)

    @cached_property
    def _probabilities(self) -> Tensor:
        return self.layout.rows(self._constant).softmax(-1)

    @cached_property
    def _surest(self) -> Tensor:
        """The class of each term with the largest probability, `[T, 1]`."""
        return self._probabilities.argmax(-1, keepdim=True)

    @cached_property
    def _seen(self) -> Tensor:
        return self.y.reshape(-1, 1) != self._ignore_index

    @cached_property
    def _labels(self) -> Tensor:
        """The labels `[T, 1]`, any valid one where they are ignored."""
        return torch.where(self._seen, self.y.reshape(-1, 1).long(), 0)

    @cached_property
    def _class_weights(self) -> Tensor:
        return (
            self._constant.new_ones(self.width) if self._given_weight is None else self._given_weight.to(self._constant)
        )

    def _expect_fitting(self) -> None:
        z, y, weight = self.z, self.y, self._given_weight
        if z.ndim == 0:
            raise ValueError("'CrossEntropyLoss': expected an output with a class axis, got a scalar.")
        labels = z.shape[:1] + z.shape[2:] if z.ndim > 1 else torch.Size()
        if y.shape != (z.shape if self._soft else labels) or y.dtype == torch.bool or y.is_complex():
            raise ValueError(
                f"'CrossEntropyLoss': for an output of shape {tuple(z.shape)} with {self.width} classes, expected "
                f"integer labels of shape {tuple(labels)} or floating-point probabilities of shape {tuple(z.shape)}, "
                f"got {y.dtype} of shape {tuple(y.shape)}."
            )
        if weight is not None and weight.shape != (self.width,):
            raise ValueError(
                f"'CrossEntropyLoss': expected one weight for each of the {self.width} classes, "
                f"got shape {tuple(weight.shape)}."
            )
        if self._soft and bool((self.weights < 0).any()):
            raise ValueError(
                f"'CrossEntropyLoss': the (weighted) target probabilities of a term sum to {self.weights.min().item()}, "
                "expected a non-negative sum."
            )
        lowest, highest = (0, 0) if self._soft or not y.numel() else map(int, y.aminmax())
        if (lowest < 0 or highest >= self.width) and bool(
            (wrong := ((y < 0) | (y >= self.width)) & (y != self._ignore_index)).any()
        ):
            raise ValueError(
                f"'CrossEntropyLoss': expected labels from 0 to {self.width - 1} or "
                f"ignore_index={self._ignore_index}, got {y[wrong][0].item()}."
            )


def sample_classes(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Sample classes `[T, M]` from probabilities `[T, C]`, normalised or not, and numbers `[T, M]` from (0, 1)."""
    cumulative = probabilities.cumsum(-1)
    heights = uniform.to(cumulative) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, heights).clamp_(max=cumulative.shape[1] - 1)
