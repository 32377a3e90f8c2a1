"""Each loss's curvature in the model's output: the only definition of it."""

from curvops.losses.additivity import LossWalk
from curvops.losses.base import OutputCurvature
from curvops.losses.factor import Factor
from curvops.losses.noise import Noise
from curvops.losses.registry import OutputLoss, output_loss

__all__ = ["Factor", "LossWalk", "Noise", "OutputCurvature", "OutputLoss", "output_loss"]
