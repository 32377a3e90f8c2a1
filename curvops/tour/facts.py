"""What is to be said of a problem beside its matrices: its risk, the constant c, conventions."""

from __future__ import annotations

from typing import Any

from curvops.risk.empirical_risk import EmpiricalRisk
from curvops.tour.identity import identity

CONVENTIONS = (
    "Hessian: second derivatives of L = c Σ ℓ. All others: c Σ Jᵀ S Sᵀ J over the loss terms, where S Sᵀ is the loss's "
    "Hessian in the output (Gauss-Newton; its expectation, sampled, for Monte Carlo), or the outer product of its gradient "
    "(empirical Fisher). Rows in the order of the parameters, each flattened row by row."
)


def facts(risk: EmpiricalRisk) -> dict[str, Any]:
    """Return what a reader wants to know of a problem, and what tells it from any other, in a form that JSON can hold.

    The loss, its reduction and the constant c; numbers of data and of loss terms and the width of a term (classes); and
    the `identity`.

    Example:
        >>> from curvops.tour.setups import tiny
        >>> found = facts(tiny().risk())
        >>> found["loss"], found["reduction"], found["num_data"], found["loss_terms"], found["width"]
        ('CrossEntropyLoss', 'mean', 3, 3, 2)
    """
    terms = width = 0
    with risk.walk("Facts") as walk:
        for batch in walk:
            curvature = walk.curvature(risk.output(batch.X), batch)
            terms, width = terms + curvature.num_terms, max(width, curvature.width)
        walk.join()
        constant, number = walk.constant, walk.size
        shares = risk.ranks.gather((terms, width))
    return {
        "loss": risk.loss.name,
        "reduction": risk.loss.reduction,
        "c": float(constant),
        "num_data": number,
        "loss_terms": sum(terms for terms, _ in shares),
        "width": max(width for _, width in shares),
        "conventions": CONVENTIONS,
        **identity(risk),
    }
