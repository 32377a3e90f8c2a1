"""What a sweep over the data gives: backward passes, and by which route each parameter is seen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from curvops.kronecker.groups import Key
from curvops.kronecker.tape import Tape


@dataclass(frozen=True)
class Route:
    """How a parameter is seen: by which pass, through taps or by its whole gradient, and why.

    Attributes:
        units: ``"batch"`` (rows of a batch belong to data), ``"datum"`` (each datum alone) or ``"whole"``
            (the model mixes data, so that a batch is one unit).
        tapped: Whether the taps explain the parameter; otherwise its whole gradient is taken.
        why: The reason, for the account.
    """

    units: str
    tapped: bool
    why: str


@dataclass(frozen=True)
class Captured:
    """What one backward pass gave.

    Attributes:
        tape: The forward pass.
        uses: The uses of each group, as ``(index, role)``.
        slopes: Gradients at the outputs of the uses, by their index.
        leaves: Whole gradients of parameters that are not tapped, by group, ``[1, size]``.
        first: Whether it is the first backward pass of this forward pass.
        route: The units of the forward pass, as in `Route`.
        columns: Number of backward passes of this forward pass.
    """

    tape: Tape
    uses: Mapping[Key, list[tuple[int, str]]]
    slopes: Mapping[int, Tensor | None]
    leaves: Mapping[Key, Tensor]
    first: bool
    route: str
    columns: int
