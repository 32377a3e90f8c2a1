"""How a model's output is cut into loss terms."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TermLayout:
    """Correspondence between an output-shaped tensor and its rows, one per loss term.

    Rows are in datum-major order: all terms of the first datum come first.

    Attributes:
        shape: Shape of the model's output, the first axis being the data.
        axis: The axis that a term's vector runs along. `None` makes a term of
            everything behind the first axis.
    """

    shape: torch.Size
    axis: int | None

    @property
    def width(self) -> int:
        """Entries of a term's vector, C."""
        if self.axis is None:
            return math.prod(self.shape[1:])
        return self.shape[self.axis]

    @property
    def num_terms(self) -> int:
        """Number of terms, T."""
        if self.axis is None:
            return math.prod(self.shape[:1])
        axis = self.axis % len(self.shape)
        return math.prod(self.shape[:axis]) * math.prod(self.shape[axis + 1 :])

    def rows(self, u: Tensor) -> Tensor:
        """Bring a tensor from the output's shape into rows `[T, C]`."""
        if self.axis is not None:
            u = u.movedim(self.axis, -1)
        return u.reshape(self.num_terms, self.width)

    def outputs(self, rows: Tensor) -> Tensor:
        """Bring rows `[T, C]` back into the output's shape."""
        if self.axis is None:
            return rows.reshape(self.shape)
        axis = self.axis % len(self.shape)
        others = self.shape[:axis] + self.shape[axis + 1 :]
        return rows.reshape(*others, self.width).movedim(-1, axis)


def entry_layout(shape: torch.Size) -> TermLayout:
    """One term per vector along the last axis; of a one-axis output, one per entry."""
    return TermLayout(shape, -1 if len(shape) > 1 else None)


def class_layout(shape: torch.Size) -> TermLayout:
    """One term per position outside the class axis 1; a lone axis is the classes'."""
    return TermLayout(shape, 1 if len(shape) > 1 else 0)
