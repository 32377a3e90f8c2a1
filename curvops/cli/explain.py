"""`curvops explain`: how each matrix would be computed, and what it would cost."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from curvops.cli.matrices import KRONECKER, OPERATORS, options
from curvops.cli.problem import Batches, Problem, load_problem
from curvops.cli.session import Session


def run(
    session: Session, *, target: str, matrices: list[str], fisher_type: str, seed: int, memory: int | None, **given: Any
) -> None:
    """Print what the operators say of themselves, after one product with one batch."""
    problem = load_problem(target, seed=seed, **given)
    document: dict[str, Any] = {"problem": problem.target, "matrices": {}}
    for name in matrices:
        own = {**problem.options, **options(name, seed=seed, fisher_type=fisher_type, memory=memory)}
        text, about = (_planned if name in KRONECKER else _tried)(name, problem, own)
        session.say(f"{name}: {text}\n")
        document["matrices"][name] = {"explanation": text, **about}
    session.answer(document)


def _planned(name: str, problem: Problem, own: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    plan = OPERATORS[name].plan(*problem.arguments, **own)
    about = {"bytes": plan.memory, "rows": [asdict(row) for row in plan.rows], "notes": list(plan.notes)}
    return str(plan), about


def _tried(name: str, problem: Problem, own: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    model, loss, params, data = problem.arguments
    own.pop("num_data", None)  # that of all batches
    operator = OPERATORS[name](model, loss, params, Batches(data, None, 1), **own)
    operator @ operator.domain.join([None] * len(params))
    rows = {work: {"choice": choice, "why": why} for work, (choice, why) in operator.account.rows.items()}
    return str(operator.explain()), {"shape": list(operator.shape), "rows": rows}
