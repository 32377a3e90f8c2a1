"""Curvature of losses that are sums over the output's entries: squared error, and binary cross-entropy of logits."""

from abc import abstractmethod
from functools import cached_property
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from curvops.losses.base import ClosedForm, TermLayout, entry_layout
from curvops.losses.factor import Factor, stacked
from curvops.losses.noise import Noise


class EntryCurvature(ClosedForm):
    """A loss with a target for each entry and a diagonal output Hessian; "mean" divides by the number of entries."""

    name: str

    def __init__(self, z: Tensor, y: Tensor, batch_size: int, **options: Tensor) -> None:
        super().__init__(z, y, batch_size, **options)
        if z.shape != y.shape:  # which PyTorch would broadcast
            raise ValueError(
                f"'{self.name}': expected targets of the output's shape {tuple(z.shape)}, got {tuple(y.shape)}. "
                "Reshape one of them: broadcasting is almost always a mistake here."
            )
        self._targets = y.to(self.dtype)

    @property
    def count(self) -> float:
        return float(self.y.numel())

    @property
    def layout(self) -> TermLayout:
        return entry_layout(self.z.shape)

    def hessian_rows(self, rows: Tensor) -> Tensor:
        return self._diagonal * rows

    def hessian_root(self, k: int) -> Tensor:
        column = self._constant.new_zeros(self.num_terms, self.width)
        column[:, k] = self._diagonal.expand_as(column)[:, k].sqrt()
        return column

    @property
    @abstractmethod
    def _diagonal(self) -> Tensor:
        """The diagonal of the output Hessian, in rows."""


class SquaredErrorCurvature(EntryCurvature):
    """The sum of (z - y)², whose output Hessian is 2 I: as a likelihood a normal distribution of variance 1/2 around z."""

    name = "MSELoss"

    @staticmethod
    def check(**options: Any) -> None:
        if options:
            raise ValueError(
                "loss_func: the weight of 'mse_loss' has a batch axis, so it cannot follow a data set that is "
                "cut into batches. Pass a loss that reads each datum's weight from its target."
            )

    def value(self) -> Tensor:
        return (self.z.to(self.dtype) - self._targets).square().sum()

    def gradient(self) -> Tensor:
        return self.layout.rows(2 * (self._constant - self._targets))

    @property
    def _diagonal(self) -> Tensor:
        return self._constant.new_tensor(2.0)

    def _sampled_factor(self, mc_samples: int, noise: Noise) -> Factor:
        normal = noise.normal(self.num_terms, self.terms_per_datum, mc_samples, self.width, device=self.z.device)
        return stacked((2 / mc_samples) ** 0.5 * normal.mT.to(self.dtype))


class BinaryCrossEntropyCurvature(EntryCurvature):
    """The sum of ω ((1 - y) z + (1 + (π - 1) y) log(1 + exp(-z))).

    Here ω is the weight and π the pos_weight, neither negative nor with a batch axis. The diagonal of the output
    Hessian is ω σ (1 - σ) (1 + (π - 1) y), where σ is the sigmoid of z.
    """

    name = "BCEWithLogitsLoss"

    def __init__(self, z: Tensor, y: Tensor, batch_size: int, **options: Tensor) -> None:
        super().__init__(z, y, batch_size, **options)
        if not y.is_floating_point():
            raise ValueError(
                f"'{self.name}': expected floating-point targets, got {y.dtype}. Pass y.to(torch.float32)."
            )
        for option, weights in options.items():
            expect_no_batch_axis(self.name, option, weights, y)
        self._weight = options["weight"].to(self._targets) if "weight" in options else self._targets.new_ones(())
        self._factor = self._targets.new_ones(())
        if "pos_weight" in options:
            if bool(((y < 0) | (y > 1)).any()):
                raise ValueError(
                    "'BCEWithLogitsLoss': with pos_weight, expected targets between 0 and "
                    f"1, got values from {y.min().item()} to {y.max().item()}."
                )
            self._factor = 1 + (options["pos_weight"].to(self._targets) - 1) * self._targets

    @staticmethod
    def check(**options: Any) -> None:
        for name, option in options.items():
            if bool((option < 0).any()):
                raise ValueError(
                    f"'BCEWithLogitsLoss': expected a non-negative {name}, got a minimum of {option.min().item()}."
                )

    @cached_property
    def weights(self) -> Tensor:
        return self._spread(self._weight)

    def value(self) -> Tensor:
        z = self.z.to(self.dtype)
        return (self._weight * ((1 - self._targets) * z - self._factor * F.logsigmoid(z))).sum()

    def gradient(self) -> Tensor:
        slope = (1 - self._targets) - self._factor * (-self._constant).sigmoid()
        return self.layout.rows(self._weight * slope)

    @cached_property
    def _diagonal(self) -> Tensor:
        # σ(-z), not 1 - σ(z), which rounds to zero for large z
        variance = self._constant.sigmoid() * (-self._constant).sigmoid()
        return self.layout.rows(self._weight * self._factor * variance)

    def _sampled_factor(self, mc_samples: int, noise: Noise) -> Factor:
        uniform = noise.uniform(self.num_terms, self.terms_per_datum, mc_samples, self.width, device=self.z.device)
        scale = self._spread(self._weight * self._factor / mc_samples).sqrt()
        probability = self.layout.rows(self._constant.sigmoid()).unsqueeze(-1)
        answers = (uniform.mT < probability).to(self.dtype)
        return stacked(scale.unsqueeze(-1) * (probability - answers))

    def _spread(self, weights: Tensor) -> Tensor:
        """Weights that broadcast to the output, as rows."""
        return self.layout.rows(weights.expand(self.z.shape))


def expect_no_batch_axis(loss: str, option: str, weight: Tensor, y: Tensor) -> None:
    """Reject a weight of entries that could not follow ragged batches."""
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
