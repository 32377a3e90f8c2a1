"""The linear operator: one interface, validated in one place."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from curvops.memory import check_fits
from curvops.space import TensorSpace, Vector

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator as SciPyLinearOperator


class LinearOperator(ABC):
    """A real linear map between two spaces of named tensors, known by its products.

    Subclasses give `_apply` (products with columns in the flat format), and `_adjoint` unless they are
    symmetric. `@` takes a vector in any format of `TensorSpace` and answers in the same format.

    Args:
        domain: Space of the vectors that the operator takes.
        codomain: Space of the vectors that it gives; the domain if not given.
        symmetric: Whether the operator equals its adjoint.
        psd: Whether it is symmetric and positive semi-definite.

    Example:
        >>> import torch
        >>> from curvops import GGNLinearOperator
        >>> model = torch.nn.Linear(3, 2)
        >>> data = [(torch.rand(5, 3), torch.rand(5, 2))]
        >>> ggn = GGNLinearOperator(model, torch.nn.MSELoss(), dict(model.named_parameters()), data)
        >>> ggn.shape, (ggn @ torch.ones(8)).shape, (2 * ggn + ggn).psd
        ((8, 8), torch.Size([8]), True)
    """

    def __init__(
        self, domain: TensorSpace, codomain: TensorSpace | None = None, *, symmetric: bool = False, psd: bool = False
    ) -> None:
        self.domain = domain
        self.codomain = domain if codomain is None else codomain
        self.symmetric = symmetric or psd
        self.psd = psd

    # A NumPy array on the left must not try to multiply entry by entry
    __array_ufunc__ = None

    @property
    def name(self) -> str:
        """What the operator is called in messages and progress bars."""
        return type(self).__name__

    @property
    def shape(self) -> tuple[int, int]:
        """Number of rows and columns."""
        return self.codomain.dim, self.domain.dim

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the vectors."""
        return self.domain.dtype

    @property
    def device(self) -> torch.device:
        """Device of the vectors."""
        return self.domain.device

    def __repr__(self) -> str:
        return f"<{self.name} {self.shape[0]} × {self.shape[1]}, {self.dtype}, {self.device}>"

    @abstractmethod
    def _apply(self, columns: Tensor) -> Tensor:
        """Product with columns: ``[domain.dim, K]`` to ``[codomain.dim, K]``."""

    def _adjoint(self) -> LinearOperator:
        """The adjoint; subclasses that are not symmetric give it."""
        return self

    def _dense(self) -> Tensor:
        """The matrix, ``[codomain.dim, domain.dim]``; subclasses may know a faster way."""
        return self._apply(torch.eye(self.domain.dim, dtype=self.dtype, device=self.device))

    def __matmul__(self, other: Any) -> Any:
        """Product with a vector in any format, or composition with another operator."""
        from curvops.operators.algebra import ProductOperator

        if isinstance(other, LinearOperator):
            return ProductOperator(self, other)
        columns, form = self.domain.to_columns(other, f"'{self.name} @ v'")
        with torch.inference_mode(False):
            # the caller's tensor may carry a graph, and autograd keeps no inference tensors
            columns = columns.detach().clone() if columns.is_inference() else columns.detach()
            result = self._apply(columns) if columns.shape[1] else self._no_columns()
        return self.codomain.from_columns(result, form)

    def __rmatmul__(self, other: Vector) -> Any:
        """Product from the left: ``vᵀ A`` for ``[D]``, rows ``[K, D]``, a list or a dict."""
        adjoint = self.adjoint()
        if isinstance(other, Tensor) and other.ndim == 2:
            return (adjoint @ other.T).T
        return adjoint @ other

    def adjoint(self) -> LinearOperator:
        """The adjoint operator; for a symmetric one itself."""
        return self if self.symmetric else self._adjoint()

    @property
    def T(self) -> LinearOperator:
        """The adjoint (real operators: the transpose)."""
        return self.adjoint()

    @property
    def H(self) -> LinearOperator:
        """The adjoint."""
        return self.adjoint()

    def __add__(self, other: Any) -> LinearOperator:
        from curvops.operators.algebra import SumOperator

        return SumOperator(self, other) if isinstance(other, LinearOperator) else NotImplemented

    def __sub__(self, other: Any) -> LinearOperator:
        return self + (-1.0) * other if isinstance(other, LinearOperator) else NotImplemented

    def __mul__(self, scalar: Any) -> LinearOperator:
        from curvops.operators.algebra import ScaledOperator, as_scalar

        factor = as_scalar(scalar)
        return NotImplemented if factor is None else ScaledOperator(self, factor)

    __rmul__ = __mul__

    def __truediv__(self, scalar: Any) -> LinearOperator:
        from curvops.operators.algebra import ScaledOperator, as_scalar

        factor = as_scalar(scalar)
        return NotImplemented if factor is None else ScaledOperator(self, 1.0 / factor)

    def __neg__(self) -> LinearOperator:
        return -1.0 * self

    def to_dense(self) -> Tensor:
        """The matrix ``[rows, columns]``.

        Raises:
            MemoryError: If it does not fit; the message gives the size.
        """
        rows, columns = self.shape
        check_fits(rows, columns, self.dtype, self.device, f"{self.name}.to_dense()")
        with torch.inference_mode(False):
            return self._dense()

    def to_scipy(self, dtype: Any = None) -> SciPyLinearOperator:
        """The operator for SciPy's sparse solvers (needs ``scipy``), taking and giving NumPy arrays.

        Args:
            dtype: NumPy dtype of the arrays; the operator's own if not given.
        """
        from curvops.operators.scipy import to_scipy

        return to_scipy(self, dtype)

    def _no_columns(self) -> Tensor:
        return torch.zeros(self.codomain.dim, 0, dtype=self.codomain.dtype, device=self.codomain.device)
