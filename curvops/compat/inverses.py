"""Inverses by solvers under the peer's names and arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from curvops.operators.inverse import InverseOperator
from curvops.operators.linear_operator import LinearOperator


class CGInverseLinearOperator(InverseOperator):
    """A⁻¹ by conjugate gradients; A is taken as positive definite, whatever it declares.

    Args:
        A: The operator.
        tolerance: Largest relative residual; what does not reach it is a warning.
        max_iter: Most iterations.
        preconditioner: A function of columns ``[D, K]``, such as ``operator.__matmul__``.
        ignored: What only the peer's solver has (``eps``, ``stop_updating_after``, …).
    """

    def __init__(
        self,
        A: LinearOperator,
        *,
        tolerance: float = 1e-6,
        max_iter: int | None = None,
        preconditioner: Callable[[Tensor], Tensor] | None = None,
        **ignored: Any,
    ) -> None:
        operator = A if A.psd else Declared(A, A._apply)
        known = None if preconditioner is None else Declared(A, preconditioner)
        options = {"tolerance": tolerance, "max_iterations": max_iter, "preconditioner": known}
        super().__init__(operator, "cg", strict=False, **options)

    def set_cg_hyperparameters(
        self, x0: Any = None, maxiter: int | None = None, M: Any = None, *ignored: Any, tol: float = 1e-5, **named: Any
    ) -> None:
        """Set SciPy's options anew: iterations, preconditioner and tolerance."""

        def precondition(columns: Tensor) -> Tensor:
            return torch.as_tensor(M @ columns, device=columns.device)

        known = None if M is None else Declared(self.operator, precondition)
        self.options = {"tolerance": tol, "max_iterations": maxiter, "preconditioner": known}


class LSMRInverseLinearOperator(InverseOperator):
    """A⁻¹ by LSMR, with SciPy's options; (AᵀA + damp² I)⁻¹ Aᵀ where there is a damping."""

    def __init__(self, A: LinearOperator, **options: Any) -> None:
        super().__init__(A, "lsmr", strict=False)
        self.set_lsmr_hyperparameters(**options)

    def set_lsmr_hyperparameters(
        self, damp: float = 0.0, atol: float = 1e-6, btol: float = 1e-6, *, maxiter: int | None = None, **ignored: Any
    ) -> None:
        """Set SciPy's options anew; a tolerance of zero is some roundoffs."""
        tolerance = max(atol, btol, 100 * torch.finfo(self.dtype).eps)
        self.options = {"damping": damp**2, "tolerance": tolerance, "max_iterations": maxiter}


class NeumannInverseLinearOperator(InverseOperator):
    """A⁻¹ by a truncated Neumann series.

    Args:
        A: The operator.
        num_terms: Terms beyond the first.
        scale: A number between 0 and 2 over A's largest eigenvalue.
        check_nan: Raise a ValueError where the series diverges, and not only warn.
        preconditioner: A function of columns ``[D, K]``.
    """

    def __init__(
        self,
        A: LinearOperator,
        num_terms: int = 100,
        scale: float = 1.0,
        check_nan: bool = True,
        preconditioner: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        known = None if preconditioner is None else Declared(A, preconditioner)
        super().__init__(A, "neumann", strict=check_nan, preconditioner=known)
        self.set_neumann_hyperparameters(num_terms, scale, check_nan)

    def set_neumann_hyperparameters(self, num_terms: int = 100, scale: float = 1.0, check_nan: bool = True) -> None:
        """Set the series anew."""
        self.options |= {"num_terms": num_terms + 1, "scale": scale}
        self.strict = check_nan

    def _apply(self, columns: Tensor) -> Tensor:
        try:
            return super()._apply(columns)
        except RuntimeError as error:
            raise ValueError(str(error)) from error


class Declared(LinearOperator):
    """A function of columns on an operator's space, taken as symmetric and positive definite."""

    def __init__(self, like: LinearOperator, product: Callable[[Tensor], Tensor]) -> None:
        super().__init__(like.domain, like.codomain, psd=True)
        self._apply_to, self._parts, self._name = product, (like,), like.name

    def _apply(self, columns: Tensor) -> Tensor:
        return self._apply_to(columns)
