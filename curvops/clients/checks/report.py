"""What a check found, as a table."""

from __future__ import annotations

from dataclasses import dataclass

from curvops.display import card, table

HEADER = ("operator", "compared with", "difference", "allowed", "verdict", "seconds", "")
OK, FAILED, NOT_JUDGED = "ok", "FAILED", "not judged"


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        operator: What was asked.
        against: What it was compared with.
        difference: How far apart they are; ``None`` where nothing was measured. A relative error, or what ``against`` says.
        allowed: How far apart they may be.
        verdict: ``"ok"``, ``"FAILED"`` or ``"not judged"``.
        why: What went wrong, why there is no verdict, or how much was seen.
        seconds: Time that it took.
    """

    operator: str
    against: str
    difference: float | None
    allowed: float | None
    verdict: str
    why: str
    seconds: float


@dataclass(frozen=True)
class Report:
    """The rows of a check, and remarks; it prints as a table.

    Attributes:
        title: What was looked at.
        rows: One for each comparison.
        notes: What a user should know before they trust a matrix of this model.
    """

    title: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing failed. Rows without a verdict do not count."""
        return all(row.verdict != FAILED for row in self.rows)

    def __str__(self) -> str:
        cells = [HEADER, *map(self._cells, self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
        return "\n".join([self.title, *lines, self._total(), *self.notes])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = [self._cells(row) for row in self.rows]
        return card(
            self.title, more=table(HEADER, rows) + table((), [(note,) for note in (self._total(), *self.notes)])
        )

    def _cells(self, row: Row) -> tuple[str, ...]:
        numbers = ("" if n is None else f"{n:.1e}" for n in (row.difference, row.allowed))
        return (row.operator, row.against, *numbers, row.verdict, f"{row.seconds:.1f}", row.why)

    def _total(self) -> str:
        count = {verdict: sum(row.verdict == verdict for row in self.rows) for verdict in (OK, FAILED, NOT_JUDGED)}
        total = ", ".join(f"{number} {verdict}" for verdict, number in count.items())
        return f"{total}; {sum(row.seconds for row in self.rows):.1f} s"
