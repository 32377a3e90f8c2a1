"""A forward pass on tape: the model's output, the uses of the parameters on the way, and whose their rows are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from curvops.kronecker.rules import RULES
from curvops.kronecker.signature import LEAF, Signature, of_nested
from curvops.kronecker.taps import Taps
from curvops.kronecker.uses import Use, VectorUse, View
from curvops.risk.empirical_risk import EmpiricalRisk
from curvops.sharding import gathered
from curvops.tree import nodes_of, tensors_of


@dataclass(frozen=True)
class Layout:
    """How the axes of rows hold the data: along which (``None`` if all are seen as one datum's), and in which order.

    The order is ``"only"`` if the axis holds nothing else, ``"major"`` if the rows of a datum follow each other along it,
    ``"minor"`` if the data do.
    """

    axis: int | None
    order: str = "only"

    def fits(self, lead: Sequence[int], size: int) -> bool:
        """Whether rows with these axes can be arranged this way."""
        if self.axis is None:
            return size == 1
        if self.axis >= len(lead):
            return False
        return lead[self.axis] == size if self.order == "only" else lead[self.axis] % size == 0

    def arrange(self, rows: Tensor, tail: int, size: int) -> Tensor:
        """``[*rows, *tail]`` to ``[data, positions, *tail]``, ``tail`` being the number of trailing axes."""
        rest = rows.shape[rows.ndim - tail :]
        if self.axis is None:
            return rows.reshape(1, -1, *rest)
        if self.order == "only":
            rows = rows.movedim(self.axis, 0) if self.axis else rows
        elif self.order == "major":
            rows = rows.unflatten(self.axis, (size, -1)).movedim(self.axis, 0)
        else:
            rows = rows.unflatten(self.axis, (-1, size)).movedim(self.axis + 1, 0)
        lead = rows.shape[1 : rows.ndim - tail]
        return rows if len(lead) == 1 else rows.reshape(size, lead.numel(), *rest)


TOGETHER = Layout(None)


@dataclass
class Tape:
    """One forward pass."""

    z: Tensor  # the output, carrying the graph
    params: Mapping[str, Tensor]
    taps: Taps
    uses: Sequence[Use]
    signature: Signature
    size: int  # number of data that rows are attributed to; 1 where a batch that mixes its data is seen as one
    precision: torch.dtype  # the lowest that the model computes in
    layouts: list[Layout | None]  # of each use's rows; `None` where they could not be attributed
    tested: bool = True  # whether a certificate met all that enters the graph with a gradient that is not zero

    def gradients(
        self, cotangent: Tensor, uses: Sequence[int], names: Sequence[str] = (), last: bool = False
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Gradients at the outputs of some uses, and in some parameters, for one cotangent of the output.

        After the ``last`` one the graph's memory is free.
        """
        targets: Any = [self.uses[k].edge for k in uses] + [self.params[n] for n in names]
        if not targets or not self.z.requires_grad:
            return [None] * len(uses), [None] * len(names)
        found = self.taps.gradients(
            self.z, targets, cotangent.to(self.z.dtype).view_as(self.z), retain_graph=not last, allow_unused=True
        )
        return list(found[: len(uses)]), [g if g is None else gathered(g) for g in found[len(uses) :]]

    def reached(self) -> set[str]:
        """The parameters that the graph leads to."""
        nodes: Iterable[Any] = nodes_of(self.z)
        leaves = {id(node.variable) for node in nodes if node.name() == LEAF}
        return {name for name, p in self.params.items() if id(p) in leaves}

    def random_cotangent(self) -> Tensor:
        """The same for each pass with such an output."""
        dtype, generator = torch.promote_types(self.z.dtype, torch.float32), torch.Generator().manual_seed(0)
        return torch.empty_like(self.z, dtype=dtype, device="cpu").normal_(generator=generator).to(self.z)

    def fits(self, layouts: Sequence[Layout | None]) -> bool:
        """Whether the rows can be arranged in these ways."""
        return len(layouts) == len(self.uses) and all(
            layout is None or layout.fits(use.lead, self.size) for layout, use in zip(layouts, self.uses, strict=True)
        )

    def as_one(self) -> Tape:
        """The same pass, all of its rows seen as one datum's."""
        return replace(self, size=1, layouts=[TOGETHER] * len(self.uses))


def record(risk: EmpiricalRisk, X: Any, size: int, conducting: bool = False) -> Tape:
    """Run the model under the taps.

    Raises:
        NotImplementedError: If X has nested tensors, or the model makes some: rows belong to no datum by their place.
    """
    if any(t.is_nested for t in tensors_of(X)):
        raise of_nested("data: Kronecker operators take no nested tensors.")
    taps = Taps(risk.params, RULES, size, conducting)
    z = risk.forward(X, taps)
    uses, precision = taps.uses, taps.precision or z.dtype
    layouts: list[Layout | None] = [TOGETHER if size == 1 else None] * len(uses)
    return Tape(z, risk.params, taps, uses, taps.signature(z), size, precision, layouts)


def views(use: Use) -> list[View]:
    """The parameters of a use."""
    if isinstance(use, VectorUse):
        return [use.vector]
    return [view for view in (use.weight, use.bias) if view is not None]
