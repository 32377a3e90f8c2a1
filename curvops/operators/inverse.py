"""The inverse of an operator, each of whose products is a solution of linear equations."""

from __future__ import annotations

import warnings
from inspect import signature
from typing import Any, cast

from torch import Tensor

from curvops.operators.damping import numbers
from curvops.operators.linear_operator import LinearOperator
from curvops.solvers import SOLVERS


class InverseOperator(LinearOperator):
    """A⁻¹, or (A + δI)⁻¹, by a solver; by ``"lsmr"`` the pseudo-inverse (AᵀA + δI)⁻¹Aᵀ of any A.

    A product is as exact, and as linear, as the solver's tolerance says.

    Args:
        operator: A.
        solver: ``"cg"`` (A + δI positive definite), ``"minres"`` (symmetric), ``"lsmr"`` (any) or ``"neumann"``.
        strict: Raise where the solver does not converge, and not only warn.
        **options: The solver's, such as ``damping``, ``tolerance``, ``preconditioner``: see its help.

    Raises:
        TypeError, ValueError: If there is no such solver or option.
        RuntimeError: By a product, if the solver does not converge; the message says what helps.

    Example:
        >>> import torch
        >>> from curvops import GGNLinearOperator
        >>> from curvops.operators.inverse import InverseOperator
        >>> model, data = torch.nn.Linear(3, 2).double(), [(torch.rand(5, 3).double(), torch.rand(5, 2).double())]
        >>> ggn = GGNLinearOperator(model, torch.nn.MSELoss(), dict(model.named_parameters()), data)
        >>> inverse = InverseOperator(ggn, damping=0.1)
        >>> v = torch.ones(8).double()
        >>> torch.allclose(ggn @ (inverse @ v) + 0.1 * (inverse @ v), v, atol=1e-5)
        True
    """

    _at_hand = False  # a product is a solution by iteration

    def __init__(self, operator: LinearOperator, solver: str = "cg", *, strict: bool = True, **options: Any) -> None:
        if not isinstance(operator, LinearOperator):
            raise TypeError(
                f"InverseOperator: expected a LinearOperator, got {type(operator).__name__}. Call the solver, which takes "
                "any matrix, or torch.linalg.inv."
            )
        if solver not in SOLVERS:
            raise ValueError(f"solver: expected one of {', '.join(map(repr, SOLVERS))}, got {solver!r}.")
        if unknown := options.keys() - (signature(SOLVERS[solver]).parameters.keys() - {"matrix", "b", "x0"}):
            raise TypeError(f"{solver}: unknown options {', '.join(sorted(unknown))}. See help({solver}).")
        if isinstance(damping := options.get("damping"), Tensor):
            numbers(damping, operator.domain)  # of which a solution would lose the gradient
        symmetric = operator.symmetric and (solver != "neumann" or _symmetric(options.get("preconditioner")))
        psd = operator.psd and symmetric
        super().__init__(operator.codomain, operator.domain, symmetric=symmetric, psd=psd)
        self.operator, self.solver, self.strict, self.options = operator, solver, strict, options
        self._parts, self._name = (operator,), f"{operator.name}^-1"

    def _apply(self, columns: Tensor) -> Tensor:
        solution = SOLVERS[self.solver](self.operator, columns, **self.options)
        if not solution.converged:
            worst = float(solution.residual.max())
            message = f"{self.name}: {self.solver} did not converge, residual {worst:.1e}: {solution.reason}."
            if self.strict:
                raise RuntimeError(f"{message} To take what it found, with a warning, pass strict=False.")
            warnings.warn(message, stacklevel=2)
        return cast(Tensor, solution.x)

    def _apply_adjoint(self, columns: Tensor) -> Tensor:
        return self.adjoint()._apply(columns)

    def adjoint(self) -> LinearOperator:
        if self.symmetric:
            return self
        options, preconditioner = dict(self.options), self.options.get("preconditioner")
        if preconditioner is not None and getattr(preconditioner, "ndim", 2) == 2:
            options["preconditioner"] = preconditioner.T
        return InverseOperator(self.operator.adjoint(), self.solver, strict=self.strict, **options)


def _symmetric(preconditioner: Any) -> bool:
    diagonal = preconditioner is None or getattr(preconditioner, "ndim", 2) == 1
    return diagonal or getattr(preconditioner, "symmetric", False)
