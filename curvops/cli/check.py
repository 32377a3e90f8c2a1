"""`curvops check`: all operators against their definitions."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from curvops.cli.problem import load_problem
from curvops.cli.session import Session
from curvops.clients.check import check


def run(session: Session, *, target: str, seed: int, **given: Any) -> bool:
    """Print the table; whether nothing failed."""
    problem = load_problem(target, seed=seed, **given)
    report = check(*problem.arguments, seed=seed, **problem.options)
    session.say(str(report))
    rows = [asdict(row) for row in report.rows]
    session.answer(
        {"problem": problem.target, "ok": report.ok, "title": report.title, "rows": rows, "notes": list(report.notes)}
    )
    return report.ok
