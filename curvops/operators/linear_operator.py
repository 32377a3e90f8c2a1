"""The linear operator: one interface, validated in one place, and sums, multiples, products and adjoints of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, reduce
from numbers import Real
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor, is_legacy_batchedtensor
from torch.autograd.forward_ad import unpack_dual

from curvops.extras import extra
from curvops.memory import check_fits
from curvops.space import TensorSpace, Vector

SomeOperator = TypeVar("SomeOperator", bound="LinearOperator")


class LinearOperator(ABC):
    """A real linear map between two spaces of named tensors, known by its products.

    Subclasses give `_apply` (products with columns in the flat format), and `_apply_adjoint` unless they are
    symmetric. `@` takes a vector in any format of `TensorSpace` and answers in the same format.

    Args:
        domain: Space of the vectors that the operator takes.
        codomain: Space of the vectors that it gives; the domain if not given.
        symmetric: Whether the operator equals its adjoint.
        psd: Whether it is symmetric and positive semi-definite.

    Example:
        >>> import torch
        >>> from curvops import GGNLinearOperator
        >>> model, data = torch.nn.Linear(3, 2), [(torch.rand(5, 3), torch.rand(5, 2))]
        >>> ggn = GGNLinearOperator(model, torch.nn.MSELoss(), dict(model.named_parameters()), data)
        >>> ggn.shape, (ggn @ torch.ones(8)).shape, (2 * ggn + ggn).psd
        ((8, 8), torch.Size([8]), True)
    """

    __array_ufunc__ = None  # a NumPy array on the left must not try to multiply entry by entry
    _parts: tuple[LinearOperator, ...] = ()  # what this one is made of
    _name = ""  # what it is called, if not after its class

    def __init__(
        self, domain: TensorSpace, codomain: TensorSpace | None = None, *, symmetric: bool = False, psd: bool = False
    ) -> None:
        self.domain, self.codomain = domain, domain if codomain is None else codomain
        self.symmetric, self.psd = symmetric or psd, psd
        self.shape, self.dtype, self.device = (self.codomain.dim, domain.dim), domain.dtype, domain.device

    @property
    def name(self) -> str:
        """What the operator is called in messages and progress bars."""
        return self._name or type(self).__name__

    def __repr__(self) -> str:
        return f"<{self.name} {self.shape[0]} × {self.shape[1]}, {self.dtype}, {self.device}>"

    @abstractmethod
    def _apply(self, columns: Tensor) -> Tensor:
        """Product with columns: ``[domain.dim, K]`` to ``[codomain.dim, K]``."""

    def _apply_adjoint(self, columns: Tensor) -> Tensor:
        """Product of the adjoint with columns: ``[codomain.dim, K]`` to ``[domain.dim, K]``."""
        if self.symmetric:
            return self._apply(columns)
        raise NotImplementedError(f"{self.name}: it is not symmetric, and gives no products with its adjoint.")

    def _dense(self) -> Tensor:
        """The matrix, ``[codomain.dim, domain.dim]``; subclasses may know a faster way."""
        return self._apply(torch.eye(self.domain.dim, dtype=self.dtype, device=self.device))

    def _leaves(self) -> Iterable[Tensor]:
        """Tensors of the caller's that the operator depends on."""
        return (tensor for part in self._parts for tensor in part._leaves())

    @contextmanager
    def linearized(self: SomeOperator) -> Iterator[SomeOperator]:
        """A context for many products, which yields the operator itself.

        Within it an operator over data may keep the graphs of its batches, as far as its memory budget allows, which
        makes further products cheaper; sums, multiples, products and adjoints do what their parts do. Whoever takes
        many opens it: ``with op.linearized(): eigsh(op.to_scipy())``. Until it ends, model, loss and data must stay.

        Example:
            >>> import torch
            >>> from curvops import HessianLinearOperator
            >>> model, data = torch.nn.Linear(3, 2), [(torch.rand(5, 3), torch.rand(5, 2))]
            >>> hessian = HessianLinearOperator(model, torch.nn.MSELoss(), dict(model.named_parameters()), data)
            >>> with hessian.linearized():
            ...     columns = [hessian @ v for v in torch.eye(8)]
        """
        with ExitStack() as stack:
            for part in self._parts:
                stack.enter_context(part.linearized())
            yield self

    def __matmul__(self, other: Any) -> Any:
        """Product with a vector in any format, or composition with another operator.

        The product is differentiable in the vector, any number of times, by products with the adjoint. The operator
        is a constant of it: nothing flows to the model's parameters, and they must not change before ``backward()``.

        Raises:
            TypeError: If the vector is of no known format, of another dtype, or inside a transform of ``torch.func``.
            ValueError: If lengths, shapes, names or devices do not fit.
        """
        if isinstance(other, LinearOperator):
            return ProductOperator(self, other)
        context = f"'{self.name} @ v'"
        columns, form = self.domain.to_columns(other, context)
        wrapped = is_functorch_wrapped_tensor(columns) or is_legacy_batchedtensor(columns)
        if wrapped or unpack_dual(columns).tangent is not None:
            raise TypeError(
                f"{context}: expected a plain tensor, got one inside a transform (vmap, grad, jvp, …, or forward mode). In "
                "place of vmap, pass the vectors together as columns [D, K], or multiply in a loop within 'with "
                "op.linearized():'; in place of grad, use torch.autograd.grad; a product's tangent is op @ tangent."
            )
        if columns.requires_grad and torch.is_grad_enabled():
            return self.codomain.from_columns(_Product.apply(columns, self), form)  # type: ignore[no-untyped-call]
        return self.codomain.from_columns(self._product(columns), form)

    def _product(self, columns: Tensor) -> Tensor:
        if not columns.shape[1]:
            return torch.zeros(self.codomain.dim, 0, dtype=self.codomain.dtype, device=self.codomain.device)
        with torch.inference_mode(False):
            # the caller's tensor may carry a graph, and autograd keeps no inference tensors
            return self._apply(columns.detach().clone() if columns.is_inference() else columns.detach())

    def __rmatmul__(self, other: Vector) -> Any:
        """Product from the left: ``vᵀ A`` for ``[D]``, rows ``[K, D]``, a list or a dict."""
        if isinstance(other, Tensor) and other.ndim == 2:
            return (self.adjoint() @ other.T).T
        return self.adjoint() @ other

    def adjoint(self) -> LinearOperator:
        """The adjoint operator; for a symmetric one itself."""
        return self if self.symmetric else AdjointOperator(self)

    @property
    def T(self) -> LinearOperator:
        """The adjoint (real operators: the transpose)."""
        return self.adjoint()

    H = T

    def __add__(self, other: Any) -> LinearOperator:
        return SumOperator((1.0, self), (1.0, other)) if isinstance(other, LinearOperator) else NotImplemented

    def __sub__(self, other: Any) -> LinearOperator:
        return self + (-1.0) * other if isinstance(other, LinearOperator) else NotImplemented

    def __mul__(self, scalar: Any) -> LinearOperator:
        factor = _as_scalar(scalar)
        return NotImplemented if factor is None else SumOperator((factor, self))

    __rmul__ = __mul__

    def __truediv__(self, scalar: Any) -> LinearOperator:
        factor = _as_scalar(scalar)
        return NotImplemented if factor is None else self * (1.0 / factor)

    def __neg__(self) -> LinearOperator:
        return -1.0 * self

    def to_dense(self) -> Tensor:
        """The matrix ``[rows, columns]``.

        Raises:
            MemoryError: If it does not fit; the message gives the size.
        """
        check_fits(*self.shape, self.dtype, self.device, f"{self.name}.to_dense()")
        with torch.inference_mode(False):
            return self._dense()

    def to_scipy(self, dtype: Any = None) -> Any:
        """A ``scipy.sparse.linalg.LinearOperator`` (needs ``scipy``), on NumPy arrays of a dtype, by default its own.

        A solver takes many products: call it within ``with op.linearized():``.
        """
        np, linalg = extra("numpy", "to_scipy()"), extra("scipy.sparse.linalg", "to_scipy()")
        own = torch.promote_types(self.dtype, torch.float32)  # NumPy has no bfloat16
        numpy_dtype = np.dtype(dtype if dtype is not None else torch.empty(0, dtype=own).numpy().dtype)

        def product(operator: LinearOperator, array: Any) -> Any:
            vector = torch.from_numpy(np.array(array)).to(operator.device, operator.dtype)
            return (operator @ vector).to("cpu", own).numpy().astype(numpy_dtype)

        forward, backward = partial(product, self), partial(product, self.adjoint())
        return linalg.LinearOperator(
            self.shape, matvec=forward, rmatvec=backward, matmat=forward, rmatmat=backward, dtype=numpy_dtype
        )


class SumOperator(LinearOperator):
    """Numbers times operators, summed."""

    def __init__(self, *terms: tuple[float, LinearOperator]) -> None:
        _, first = terms[0]
        for _, other in terms[1:]:
            if (first.domain, first.codomain) != (other.domain, other.codomain):
                raise ValueError(
                    f"A + B: expected operators between the same spaces, got {first!r} on {first.domain} and {other!r} on {other.domain}."
                )
        symmetric = all(a.symmetric for _, a in terms)
        psd = all(a.psd and scalar >= 0 for scalar, a in terms)
        name = " + ".join(a.name if scalar == 1 else f"{scalar:g} · {a.name}" for scalar, a in terms)
        super().__init__(first.domain, first.codomain, symmetric=symmetric, psd=psd)
        self._name = name if len(terms) == 1 else f"({name})"
        self._scalars, self._parts = zip(*terms, strict=True)

    def _summed(self, products: Iterable[Tensor]) -> Tensor:
        terms = zip(self._scalars, products, strict=True)
        return reduce(torch.add, (product if scalar == 1 else scalar * product for scalar, product in terms))

    def _apply(self, columns: Tensor) -> Tensor:
        return self._summed(part._apply(columns) for part in self._parts)

    def _apply_adjoint(self, columns: Tensor) -> Tensor:
        return self._summed(part._apply_adjoint(columns) for part in self._parts)

    def _dense(self) -> Tensor:
        return self._summed(part._dense() for part in self._parts)


class ProductOperator(LinearOperator):
    """A after B."""

    def __init__(self, left: LinearOperator, right: LinearOperator) -> None:
        if left.domain != right.codomain:
            raise ValueError(
                f"A @ B: expected B to give what A takes, got A = {left!r} on {left.domain} and B = {right!r} into {right.codomain}."
            )
        super().__init__(right.domain, left.codomain)
        self.left, self.right = self._parts = left, right
        self._name = f"({left.name} @ {right.name})"

    def _apply(self, columns: Tensor) -> Tensor:
        return self.left._apply(self.right._apply(columns))

    def _apply_adjoint(self, columns: Tensor) -> Tensor:
        return self.right._apply_adjoint(self.left._apply_adjoint(columns))

    def _dense(self) -> Tensor:
        return self.left._apply(self.right._dense())


class AdjointOperator(LinearOperator):
    """Aᵀ."""

    def __init__(self, operator: LinearOperator) -> None:
        super().__init__(operator.codomain, operator.domain)
        self.operator, self._parts, self._name = operator, (operator,), f"{operator.name}.T"

    def _apply(self, columns: Tensor) -> Tensor:
        return self.operator._apply_adjoint(columns)

    def _apply_adjoint(self, columns: Tensor) -> Tensor:
        return self.operator._apply(columns)

    def adjoint(self) -> LinearOperator:
        return self.operator

    def _dense(self) -> Tensor:
        return self.operator._dense().T


class _Product(torch.autograd.Function):
    """A product whose derivative is a product with the adjoint."""

    @staticmethod
    def forward(ctx: Any, columns: Tensor, operator: LinearOperator) -> Tensor:
        ctx.operator = operator
        # so that autograd refuses a backward pass once one of them has changed: it would take another matrix
        ctx.save_for_backward(*(tensor for tensor in operator._leaves() if not tensor.is_inference()))
        return operator._product(columns)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, None]:
        _ = ctx.saved_tensors
        return ctx.operator.adjoint() @ gradient, None


def _as_scalar(value: Any) -> float | None:
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        if value.requires_grad:
            raise TypeError(
                "s * A: the operator's multiple is a number without a gradient. Take s * (A @ v), or s.detach()."
            )
        return float(value)
    return float(value) if isinstance(value, Real) else None
