"""Curvature of the squared error in the model's output."""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from curvops.losses.base import ClosedForm, TermLayout, entry_layout
from curvops.losses.factor import DiagonalFactor, Factor, StackedFactor
from curvops.losses.noise import Noise


class SquaredErrorCurvature(ClosedForm):
    """The sum of (z - y)², whose output Hessian is 2 I; "mean" divides by the number of entries.

    As a likelihood it is a normal distribution of variance 1/2 around z.
    """

    def __init__(self, z: Tensor, y: Tensor, batch_size: int, **options: Any) -> None:
        self.check(**options)
        expect_same_shape("MSELoss", z, y)
        super().__init__(z, y, batch_size)

    @staticmethod
    def check(**options: Any) -> None:
        if options:
            raise ValueError(
                "'output_loss': the weight of 'mse_loss' has a batch axis, so it cannot follow a data set that is "
                "cut into batches. Pass a loss that reads each datum's weight from its target."
            )

    @cached_property
    def count(self) -> float:
        return float(self.y.numel())

    @property
    def layout(self) -> TermLayout:
        return entry_layout(self.z.shape)

    def value(self) -> Tensor:
        return (self.z.to(self.dtype) - self.y.to(self.dtype)).square().sum()

    def gradient(self) -> Tensor:
        return self.layout.rows(2 * (self._constant - self.y.to(self.dtype)))

    def _hessian_product(self, u: Tensor) -> Tensor:
        return 2 * u

    def _exact_factor(self) -> Factor:
        two = torch.full((1, 1), 2.0, dtype=self.dtype, device=self.z.device)
        return DiagonalFactor(two.expand(self.num_terms, self.width))

    def _sampled_factor(self, mc_samples: int, noise: Noise) -> Factor:
        normal = noise.normal(self.num_terms, self.terms_per_datum, mc_samples, self.width, device=self.z.device)
        return StackedFactor((2 / mc_samples) ** 0.5 * normal.mT.to(self.dtype))

    def _empirical_factor(self) -> Factor:
        return StackedFactor(self.gradient().unsqueeze(-1))


def expect_same_shape(name: str, z: Tensor, y: Tensor) -> None:
    """Reject what PyTorch would broadcast."""
    if z.shape != y.shape:
        raise ValueError(
            f"'{name}': expected targets of the output's shape {tuple(z.shape)}, got {tuple(y.shape)}. "
            "Reshape one of them: broadcasting is almost always a mistake here."
        )
