"""`curvops kfac`: Kronecker factors, saved for later use."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from curvops.cli import processes
from curvops.cli.failures import Failure
from curvops.cli.matrices import operator_of, options
from curvops.cli.problem import load_problem
from curvops.cli.results import expect_same, problem_settings
from curvops.cli.session import Session, json_text
from curvops.files import digest, replace_atomically
from curvops.tour.files import output_folder


def run(
    session: Session, *, target: str, ekfac: bool, fisher_type: str, approximation: str, output: str, fresh: bool,
    seed: int, memory: int | None, **given: Any,
) -> None:  # fmt: skip
    """Compute, save and explain; what is there with the same settings is shown only."""
    problem = load_problem(target, seed=seed, **given)
    name = "ekfac" if ekfac else "kfac"
    own = options(name, seed=seed, fisher_type=fisher_type, memory=memory) | {"kfac_approx": approximation}
    asked = {"matrix": name, "fisher_type": fisher_type, "approximation": approximation, "seed": seed}
    settings = {**asked, **problem_settings(problem)}
    folder = session.path(output)
    path = folder / f"{name}.safetensors"
    beside = path.with_suffix(".json")  # what the file itself does not say
    document = None if fresh else _kept(path, beside, settings)
    if document is None:
        with output_folder(folder, 0, (path.name, beside.name)):
            problem.risk.progressbar = sys.stderr.isatty()
            start = time.perf_counter()
            operator = operator_of(name, problem, **own)
            seconds = time.perf_counter() - start
            explanation = operator.explain()
            document = {
                "problem": problem.target, "file": str(path), "seconds": seconds, "shape": list(operator.shape),
                "trace": float(operator.trace()), "bytes": explanation.memory, "explanation": str(explanation),
                "rows": [asdict(row) for row in explanation.rows], "settings": settings,
            }  # fmt: skip
            if not processes.is_first():
                return

            def write(partial: Path) -> None:
                operator.save(partial)
                document["sha256"] = digest(partial)  # of this run's file, whatever another one puts in its place

            replace_atomically(path, write)
            text = json_text(document)
            replace_atomically(beside, lambda partial: partial.write_text(text, encoding="utf-8"))
    else:
        session.note(f"'{path}' is there, and is not computed again")
    session.kept.append(path)
    session.say(document["explanation"])
    session.say(f"trace {document['trace']:.6g}; {document['seconds']:.1f} s; {path}")
    session.answer(document)


def _kept(path: Path, beside: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        document = json.loads(beside.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise Failure(
            f"'{path}' is there, but '{beside}', which says what it is, is not; --fresh computes it anew"
        ) from None
    expect_same(path, document.get("settings"), settings)
    if document.get("sha256") != digest(path):
        raise Failure(
            f"'{path}' was edited or cut since it was written, or another run replaced it: it is not what '{beside}' describes; --fresh computes it anew"
        )
    found: dict[str, Any] = document
    return found
