"""Which row belongs to which datum: candidate layouts, and rows arranged datum by datum."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """How the axes of rows hold the data.

    Attributes:
        axis: The axis that holds them; ``None`` if all rows belong to one unit.
        order: ``"only"`` if the axis holds nothing else, ``"major"`` if the rows of a datum follow each
            other along it, ``"minor"`` if the data do.
    """

    axis: int | None
    order: str = "only"

    def fits(self, lead: tuple[int, ...], units: int) -> bool:
        """Whether rows with these axes can be arranged this way."""
        if self.axis is None:
            return units == 1
        if self.axis >= len(lead):
            return False
        return lead[self.axis] == units if self.order == "only" else lead[self.axis] % units == 0

    def arrange(self, rows: Tensor, tail: int, units: int) -> Tensor:
        """``[*rows, *tail]`` to ``[units, positions, *tail]``, ``tail`` being the number of trailing axes."""
        rest = rows.shape[rows.ndim - tail :]
        if self.axis is None:
            return rows.reshape(1, -1, *rest)
        if self.order == "only":
            rows = rows.movedim(self.axis, 0)
        elif self.order == "major":
            rows = rows.unflatten(self.axis, (units, -1)).movedim(self.axis, 0)
        else:
            rows = rows.unflatten(self.axis, (-1, units)).movedim(self.axis + 1, 0)
        lead = rows.shape[1 : rows.ndim - tail].numel()
        return rows.reshape(units, lead, *rest)


ONE_UNIT = Layout(None)


def candidates(lead: tuple[int, ...], units: int) -> list[Layout]:
    """Layouts that rows with these axes may have, the most usual first."""
    if units == 1:
        return [ONE_UNIT]
    exact = [Layout(k) for k, size in enumerate(lead) if size == units]
    mixed = [
        Layout(k, order)
        for order in ("major", "minor")
        for k, size in enumerate(lead)
        if size > units and size % units == 0
    ]
    return exact + mixed
