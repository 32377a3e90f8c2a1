"""What works, in a few lines: the table of docs/support.md counted by operator.

Usage: python tests/kronecker/coverage.py [--write README.md]
With --write, the table between the marks of a file is replaced.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "support.md"
MARKS = "<!-- coverage -->", "<!-- /coverage -->"
KINDS = {"Kronecker": "Kronecker", "eigen": "eigenbasis", "dense": "dense", "diagonal": "diagonal", "zero": "zero"}


def summary(page: str) -> str:
    """Table of operator × layers that work, kinds of blocks, and how near they are to the GGN's."""
    titles, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"
    ]
    lines = [
        "| operator | layers | blocks of their parameters | exact | with the exact trace |",
        "| --- |" + " --- |" * 4,
    ]
    for operator, *cells in list(zip(titles, *rows, strict=True))[1:]:
        layers = f"{sum(cell != 'WRONG' for cell in cells)} of {len(cells)}"
        if set(cells) <= {"exact", "WRONG"}:
            lines.append(f"| {operator} | {layers} | the whole matrix | {_share(cells)} | |")
            continue
        blocks = [block.split(": ", 1)[1] for cell in cells for block in cell.split("<br>")]
        kinds = Counter(KINDS[re.sub(r"^\d+ × ", "", block).split()[0]] for block in blocks)
        told = ", ".join(f"{number} {kind}" for kind, number in kinds.most_common())
        traces = sum("*exact*" in block or "*trace*" in block for block in blocks)
        lines.append(f"| {operator} | {layers} | {told} | {_share(blocks)} | {traces} of {len(blocks)} |")
    return "\n".join(lines)


def _share(cells: list[str]) -> str:
    return f"{sum('exact' in cell for cell in cells)} of {len(cells)}"


def main() -> None:
    """Print the table, and put it where it is asked for."""
    table = summary(PAGE.read_text(encoding="utf-8"))
    print(table)
    if sys.argv[1:2] == ["--write"]:
        target = Path(sys.argv[2])
        text = target.read_text(encoding="utf-8")
        before, after = text.split(MARKS[0])[0], text.split(MARKS[1])[1]
        target.write_text(f"{before}{MARKS[0]}\n{table}\n{MARKS[1]}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
