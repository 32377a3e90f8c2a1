"""All operators on the user's own model, against definitions and finite differences."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from typing_extensions import Unpack

from curvops.clients.checks import approximations, products
from curvops.clients.checks.approximations import SCALE
from curvops.clients.checks.caller import same, state_of
from curvops.clients.checks.problem import Problem, problem_of
from curvops.clients.checks.products import Outcome
from curvops.clients.checks.report import FAILED, NOT_JUDGED, OK, Report, Row
from curvops.clients.checks.twin import NotJudged
from curvops.context import quietly
from curvops.kronecker.kfac import KFACLinearOperator
from curvops.kronecker.kfoc import KFOCLinearOperator
from curvops.matrix import seeded
from curvops.products.account import reason
from curvops.products.ggn import EFLinearOperator, GGNLinearOperator
from curvops.products.hessian import HessianLinearOperator
from curvops.risk.empirical_risk import EmpiricalRisk, ProblemOptions
from curvops.risk.model import ModelFunction

Comparison = tuple[str, str, Callable[[Problem], Outcome]]
ITSELF = "itself: transpose, columns, linearized(), to_dense()"
CHECKS: tuple[Comparison, ...] = (
    ("gradient", "central differences of the loss", products.gradient),
    ("Hessian", "central differences of the gradient", products.hessian),
    ("Hessian", ITSELF, products.consistent(HessianLinearOperator)),
    ("GGN", "Jᵀ, by central differences of output and loss", products.ggn),
    ("GGN", ITSELF, products.consistent(GGNLinearOperator)),
    ("EF", "the loss terms' gradients, by central differences", products.empirical),
    ("EF", ITSELF, products.consistent(EFLinearOperator)),
    ("Jacobian", "central differences of the output", products.jacobian),
    ("transposed Jacobian", "the Jacobian: ⟨Jᵀu, v⟩ = ⟨u, Jv⟩", products.adjoint),
    ("GGN, Monte Carlo", "the GGN, in standard errors", approximations.monte_carlo),
    ("GGNDiagonal", "squared rows Sᵀ J", approximations.diagonal),
    ("EKFAC, type-2", "the GGN's trace by parameter", approximations.traces),
    (
        "KFAC, type-2",
        f"the GGN's trace by parameter: psd, factor ≤ {SCALE:g}",
        approximations.scaled(KFACLinearOperator),
    ),
    (
        "KFOC, type-2",
        f"the GGN's trace by parameter: psd, factor ≤ {SCALE:g}",
        approximations.scaled(KFOCLinearOperator),
    ),
    ("KFAC, Monte Carlo", "type-2 KFAC, in standard errors", approximations.monte_carlo_kfac),
)


def check(
    model_func: Module | ModelFunction,
    loss_func: Callable[[Any, Any], Tensor],
    params: Mapping[str, Tensor],
    data: Iterable[tuple[Any, Any]],
    *,
    seed: int = 0,
    **options: Unpack[ProblemOptions],
) -> Report:
    """Compare all operators with their definitions on a few data of your own model.

    The references are PyTorch's own loss, first-order gradients and central differences of the model in double precision.
    Where these cannot tell (a kink such as ReLU's is near, a model is tied to its precision, a matrix would take long)
    the row has no verdict and says why. What is computed follows from counts, never from a clock: four data of the
    first batches, two where there are more than a million parameters, and the whole first batch if the model cannot take
    fewer.

    Args:
        model_func: Module called as ``model(X)``, or a function ``(params, X)``.
        loss_func: Loss ``(output, y)``: a module, or a function together with ``reduction``.
        params: Parameters by name, any subset of the module's.
        data: Iterable of ``(X, y)`` that can be walked again.
        seed: Seed of the random vectors and samples.
        options: ``reduction``, ``progressbar``, ``num_data`` and ``batch_size_fn``, as of `HessianLinearOperator`.

    Returns:
        A table that prints. ``report.ok`` says whether nothing failed, ``report.rows`` are its rows.

    Raises:
        TypeError, ValueError: If an argument does not fit; the message says which and how.
        Exception: What the model or the loss raises on the first batch.

    Example:
        >>> import torch
        >>> import curvops
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> data = [(torch.rand(5, 3), torch.randint(2, (5,)))]
        >>> report = curvops.check(model, torch.nn.CrossEntropyLoss(), dict(model.named_parameters()), data)
        >>> report.ok
        True
        >>> [row.verdict for row in report.rows if row.operator == "Hessian"]
        ['ok', 'ok']
    """
    seeded(seed)
    risk = EmpiricalRisk(model_func, loss_func, params, data, **options)
    before = state_of(risk)
    problem = problem_of(risk, loss_func, seed)
    notes: list[str] = []
    first: tuple[Comparison, ...] = (
        ("model and data", "a second pass", partial(products.deterministic, remarks=notes, data=risk.data)),
        ("risk", "PyTorch's loss of all data in one batch", products.value),
    )
    rows = [_row(comparison, problem) for comparison in first]
    if all(row.verdict != FAILED for row in rows):
        rows += [_row(comparison, problem) for comparison in CHECKS]
    else:
        notes.append("Nothing else was computed: it would have no meaning.")
    after = state_of(risk)
    own = "parameters, gradients, buffers, modes, random state"
    rows.append(_row((own, "what they were before", lambda _: _unchanged(before, after)), problem))
    count, batches = problem.size, len(problem.batches)
    title = f"{count} data in {batches} batch{'es' * (batches > 1)}, {risk.space.dim:,} parameters, {risk.space.dtype}"
    return Report(title, tuple(rows), tuple(notes))


def _row(comparison: Comparison, problem: Problem) -> Row:
    operator, against, judge = comparison
    start = time.perf_counter()
    found = Outcome(None)
    try:
        with problem.risk.evaluation(), quietly():
            found = judge(problem)
        fits = found.difference is None or found.allowed is None or found.difference <= found.allowed
        verdict, why = OK if fits else FAILED, found.why
    except NotJudged as unknown:
        verdict, why = NOT_JUDGED, str(unknown)
    except torch.OutOfMemoryError as error:
        verdict, why = NOT_JUDGED, reason(error)
    except Exception as error:  # whatever an operator raises on this model is what the table is for
        verdict, why = FAILED, reason(error)
    return Row(operator, against, found.difference, found.allowed, verdict, why, time.perf_counter() - start)


def _unchanged(before: Mapping[str, Any], after: Mapping[str, Any]) -> Outcome:
    if changed := [what for what in before if not same(before[what], after.get(what))]:
        raise RuntimeError(f"changed: {', '.join(changed)}")
    return Outcome(None)
