"""The page that the benchmarks write: each replaces its own section with what it printed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

TITLE = "# Benchmarks"
NAME = "benchmarks.md"


class Section:
    """Prints a benchmark's lines, and keeps them for the page, where its title finds its place."""

    def __init__(self, title: str, about: str, conditions: str = "") -> None:
        self.title = title
        self.lines: list[str] = []
        self.say(f"## {title}", "", about, "", "; ".join(filter(None, (machine(), conditions, command()))) + ".")

    def say(self, *lines: object) -> None:
        """Print lines."""
        for line in map(str, lines):
            print(line, flush=True)
            self.lines += line.split("\n")

    def table(self, header: Iterable[str]) -> None:
        """Print a table's head."""
        titles = list(header)
        self.say("", row(titles), row("---" for _ in titles))

    def row(self, cells: Iterable[object]) -> None:
        """Print a row of the table that was begun."""
        self.say(row(cells))

    def write(self, path: Path | None) -> None:
        """Put the section onto the page, if there is one: a file, or a folder that holds it."""
        if path is None:
            return
        path = page(path)
        before = path.read_text().split("\n## ") if path.exists() else [TITLE + "\n"]
        ours = "\n".join(self.lines).strip().removeprefix("## ") + "\n"
        places = [k for k, text in enumerate(before) if k and text.split("\n")[0] == self.title]
        if places:
            before[places[0]] = ours
        else:
            before.append(ours)
        text = "\n## ".join(part.rstrip("\n") + "\n" for part in before)
        partial = path.with_name(path.name + ".part")
        partial.write_text(text)
        partial.replace(path)


def command() -> str:
    """The benchmark that runs, as a reader would call it; nothing where it is imported by something else."""
    script = Path(sys.argv[0])
    return f"`python benchmarks/{script.name}`" if script.resolve().parent == Path(__file__).resolve().parent else ""


def page(path: Path) -> Path:
    """The page itself, where its folder is given."""
    return path / NAME if path.is_dir() else path


def row(cells: Iterable[object]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def machine() -> str:
    """What every figure depends on."""
    threads, cpus = torch.get_num_threads(), os.cpu_count()
    return f"PyTorch {torch.__version__}, {threads} thread{'s' * (threads != 1)} on {cpus} CPUs"
