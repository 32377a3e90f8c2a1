"""Linear solvers for any matrix with products."""

from collections.abc import Callable

from curvops.solvers.cg import cg
from curvops.solvers.lsmr import lsmr
from curvops.solvers.minres import minres
from curvops.solvers.neumann import neumann
from curvops.solvers.solution import Solution

SOLVERS: dict[str, Callable[..., Solution]] = {"cg": cg, "minres": minres, "lsmr": lsmr, "neumann": neumann}

__all__ = ["SOLVERS", "Solution", "cg", "lsmr", "minres", "neumann"]
