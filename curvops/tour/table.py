"""The table that a tour prints: what each matrix took, and what is seen at once."""

from __future__ import annotations

from collections.abc import Mapping

from curvops.estimators.estimate import with_error
from curvops.tour.coarse_files import CoarseFile, matrices_of
from curvops.tour.files import MatrixFile
from curvops.tour.meter import Cost

TRACE_WIDTH = 24  # of a trace with its error


def table(
    file: MatrixFile | CoarseFile,
    refused: Mapping[str, str],
    check: Cost | None,
    drawing: Mapping[str, float] | None = None,
) -> str:
    """Seconds, memory, trace, and distance to the Hessian of each matrix; why others are missing.

    Of matrices that are too large, the trace ± its standard error (or "exact"), the Frobenius norm, and the products that
    they took. Last the seconds of all matrices together, the check for determinism not among them, and those of what was
    drawn of them, by its name.
    """
    coarse = isinstance(file, CoarseFile)
    memory = "GPU tensors" if str(file.settings.get("device", "")).startswith("cuda") else "process"
    last = f"{'norm':>13}{'products':>10}" if coarse else f"{'off Hessian':>13}"
    trace = f"{'trace':>{TRACE_WIDTH if coarse else 11}}"
    lines = [f"{'matrix':<26}{'seconds':>9}{f'peak MB ({memory})':>24}{trace}{last}"]
    if check is not None:
        lines.append(f"{'(determinism check)':<26}{_cells(check)}")
    for title in matrices_of(file):
        cells = _of_blocks(file, title) if isinstance(file, CoarseFile) else _of_matrix(file, title)
        lines.append(f"{title:<26}{_cells(file.costs.get(title, Cost()))}{cells}")
    lines += [f"{title:<25} not computed: {reason}" for title, reason in refused.items()]
    sums = {"all matrices": sum(cost.seconds for cost in file.costs.values()), **(drawing or {})}
    return "\n".join([*lines, *(f"{name:<26}{seconds:>9.3f}" for name, seconds in sums.items())])


def _of_matrix(file: MatrixFile, title: str) -> str:
    matrix, hessian = file.matrices[title], file.matrices.get("Hessian")
    off = ""
    if hessian is not None and (size := float(hessian.norm())):
        off = f"{float((matrix - hessian).norm()) / size:.1%}"
    return f"{float(matrix.trace()):>11.4g}{off:>13}"


def _of_blocks(file: CoarseFile, title: str) -> str:
    norm, trace = float(file.norms[title].norm()), float(file.traces[title].sum())
    # each group has products of its own, so that the errors are independent
    error = float(file.trace_errors[title].norm()) if title in file.trace_errors else None
    shown = f"{trace:.4g} ± unknown" if error is None else with_error(trace, error) if error else f"{trace:.4g}, exact"
    return f"{shown:>{TRACE_WIDTH}}{norm:>13.4g}{file.products.get(title, 0):>10}"


def _cells(cost: Cost) -> str:
    peak = "unknown" if cost.peak_bytes is None else f"{cost.peak_bytes / 1e6:.1f}"
    return f"{cost.seconds:>9.3f}{peak:>24}"
