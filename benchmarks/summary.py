"""How many times as fast as curvlinops we are, from docs/benchmarks.md: one row for each kind of work.

Usage: python benchmarks/summary.py [--page docs/benchmarks.md] [--write README.md]
With --write, the table between the marks of a file is replaced.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

MARKS = "<!-- benchmarks -->", "<!-- /benchmarks -->"


def summary(page: str) -> str:
    """Table of work × model with the ratios peer / ours."""
    section = page.split("## Products and factors")[1].split("\n## ")[0]
    ratios: dict[str, dict[str, str]] = {}
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 7 and re.fullmatch(r"[\d.]+", cells[2]):
            ratios.setdefault(cells[1], {})[cells[0]] = cells[4] if cells[4] != "—" else "peer fails"
    models = list(dict.fromkeys(model for row in ratios.values() for model in row))
    lines = [f"| curvlinops' time / ours | {' | '.join(models)} |", "| --- |" + " --- |" * len(models)]
    for work, row in ratios.items():
        lines.append(f"| {work} | {' | '.join(row.get(model, '') for model in models)} |")
    setting = next(line for line in section.splitlines() if line.startswith("PyTorch"))
    return "\n".join([setting, "", *lines])


def main() -> None:
    """Print the table, and put it where it is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--page", type=Path, default=Path("docs/benchmarks.md"))
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    table = summary(options.page.read_text())
    print(table)
    if options.write:
        text = options.write.read_text()
        before, after = text.split(MARKS[0])[0], text.split(MARKS[1])[1]
        options.write.write_text(f"{before}{MARKS[0]}\n{table}\n{MARKS[1]}{after}")


if __name__ == "__main__":
    main()
