"""The linear operator: one interface, validated in one place."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from numbers import Real
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor, is_legacy_batchedtensor
from torch.autograd.forward_ad import unpack_dual

from curvops.context import own_precision
from curvops.display import card, heat_map
from curvops.memory import check_fits
from curvops.operators.autograd import Product
from curvops.operators.damping import Damping, numbers
from curvops.operators.quantities import Quantities
from curvops.operators.views import as_scalar, scipy_view
from curvops.space import TensorSpace, describe

SomeOperator = TypeVar("SomeOperator", bound="LinearOperator")
_SMALL = 1024  # rows and columns up to which a matrix at hand is drawn


class Algebra(Protocol):
    """What operators are combined by; `curvops.operators` gives it, so that the interface need not know the classes."""

    def add(self, first: LinearOperator, second: LinearOperator) -> LinearOperator:
        """A + B."""

    def scale(self, factor: float, operator: LinearOperator) -> LinearOperator:
        """c A, where A has no way of its own."""

    def multiply(self, left: LinearOperator, right: LinearOperator) -> LinearOperator:
        """A B."""

    def transpose(self, operator: LinearOperator) -> LinearOperator:
        """Aᵀ, of an operator that is not symmetric."""

    def shift(self, operator: LinearOperator, damping: Mapping[str, float]) -> LinearOperator:
        """A + diag(δ), where A has no way of its own."""

    def invert(self, operator: LinearOperator, damping: Damping, options: Mapping[str, Any]) -> LinearOperator:
        """(A + δI)⁻¹, where A has no way of its own."""

    def restrict(self, operator: LinearOperator, rows: TensorSpace, columns: TensorSpace) -> LinearOperator:
        """Rows and columns of A, where A has no way of its own."""


class Source:
    """One for each matrix, by which operators know that they are parts of the same one."""

    def __init__(self, symmetric: bool) -> None:
        self.symmetric = symmetric


class LinearOperator(Quantities):
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

    algebra: ClassVar[Algebra]
    __array_ufunc__ = None  # a NumPy array on the left must not try to multiply entry by entry
    _parts: tuple[LinearOperator, ...] = ()  # what this one is made of
    _name = ""  # what it is called, if not after its class
    _transposed = False  # whether it is part of its source's transpose

    def __init__(
        self, domain: TensorSpace, codomain: TensorSpace | None = None, *, symmetric: bool = False, psd: bool = False
    ) -> None:
        self.domain, self.codomain = domain, domain if codomain is None else codomain
        self.symmetric, self.psd = symmetric or psd, psd
        self.shape, self.dtype, self.device = (self.codomain.dim, domain.dim), domain.dtype, domain.device
        self._source = Source(self.symmetric)  # of which this has the rows and columns of its spaces

    @property
    def name(self) -> str:
        """What the operator is called in messages and progress bars."""
        return self._name or type(self).__name__

    @property
    def _at_hand(self) -> bool:
        """Whether its matrix follows from tensors that it holds, without model, data and iteration."""
        return bool(self._parts) and all(part._at_hand for part in self._parts)

    def __repr__(self) -> str:
        return f"<{self.name} {self.shape[0]} × {self.shape[1]}, {self.dtype}, {self.device}>"

    def _repr_html_(self) -> str:
        """What a notebook shows; nothing is computed but a small matrix that is at hand."""
        small = self._at_hand and 0 < max(self.shape) <= _SMALL and self.device.type != "meta"
        return card(self.name, self._facts(), picture=heat_map(self.to_dense()) if small else "")

    def _facts(self) -> list[tuple[str, str]]:
        """What is known without any work, in words."""
        structure = "symmetric, positive semi-definite" if self.psd else "symmetric" if self.symmetric else "none known"
        shape = f"{self.shape[0]:,} × {self.shape[1]:,}"
        names = f"{len(self.domain.names)}: {describe(self.domain.names)}"
        return [
            ("shape", shape),
            ("structure", structure),
            ("entries", f"{self.dtype}, {self.device}"),
            ("tensors", names),
        ]

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

    def _in_step(self) -> AbstractContextManager[None]:
        """Processes that share data or columns learn here what fails in one of them before it comes to the product."""
        return _entered(part._in_step() for part in self._parts)

    def _scaled(self, factor: float) -> LinearOperator:
        """``factor`` times the operator; subclasses may keep their structure."""
        return self.algebra.scale(factor, self)

    def _shifted(self, damping: Mapping[str, float]) -> LinearOperator:
        """The square operator plus a number ≥ 0 for each parameter, on the diagonal; subclasses may keep their structure."""
        return self.algebra.shift(self, damping)

    def _restricted(self, rows: TensorSpace, columns: TensorSpace) -> LinearOperator:
        """The rows and columns of some parameters, as an operator from ``columns`` to ``rows``.

        Both are subspaces, of the codomain and of the domain. Here vectors are padded with zeros and the products'
        rows selected; subclasses override it where they can compute less.
        """
        return self.algebra.restrict(self, rows, columns)

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
        with _entered(part.linearized() for part in self._parts):
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
            return self.algebra.multiply(self, other)
        return self._multiplied(other, f"'{self.name} @ v'")

    def _multiplied(self, vector: Any, context: str, leading: bool = False) -> Any:
        with self._in_step():
            columns, form = self.domain.to_columns(vector, context, leading)
            wrapped = is_functorch_wrapped_tensor(columns) or is_legacy_batchedtensor(columns)
            if wrapped or unpack_dual(columns).tangent is not None:
                raise TypeError(
                    f"{context}: expected a plain tensor, got one inside a transform (vmap, grad, jvp, …, or forward mode). In "
                    "place of vmap, pass the vectors together as columns [D, K], or multiply in a loop within 'with "
                    "op.linearized():'; in place of grad, use torch.autograd.grad; a product's tangent is op @ tangent."
                )
        if columns.requires_grad and torch.is_grad_enabled():
            return self.codomain.from_columns(Product.apply(columns, self), form)  # type: ignore[no-untyped-call]
        return self.codomain.from_columns(self._product(columns), form)

    def _product(self, columns: Tensor) -> Tensor:
        if not columns.shape[1]:
            return torch.zeros(self.codomain.dim, 0, dtype=self.codomain.dtype, device=self.codomain.device)
        with own_precision(self.device), torch.inference_mode(False):
            # the caller's tensor may carry a graph, and autograd keeps no inference tensors
            return self._apply(columns.detach().clone() if columns.is_inference() else columns.detach())

    def __rmatmul__(self, other: Any) -> Any:
        """Products from the left: ``vᵀ A`` for ``[D]``, rows ``[K, D]``, or lists and dicts of tensors ``[K, *shape]``."""
        return self.adjoint()._multiplied(other, f"'v @ {self.name}'", leading=True)

    def __getitem__(self, key: Any) -> LinearOperator:
        """The block of some parameters: ``op["layer1.*"]``, or rows and columns ``op["a.*", "b.*"]``.

        Args:
            key: A name or a pattern (``*``, ``?``, ``[…]`` as in file names), a list of such, or a pair of both for the
                rows and the columns. Parameters keep their order. For single entries see `SubmatrixLinearOperator`.

        Raises:
            KeyError: If a pattern matches no name; the message gives names that are near.

        Example:
            >>> import torch
            >>> from curvops import HessianLinearOperator
            >>> model, data = torch.nn.Linear(3, 2), [(torch.rand(5, 3), torch.rand(5, 2))]
            >>> hessian = HessianLinearOperator(model, torch.nn.MSELoss(), dict(model.named_parameters()), data)
            >>> hessian["bias"].shape, hessian["bias", "w*"].shape
            ((2, 2), (2, 6))
        """
        pair = key if isinstance(key, tuple) else (key, key)
        if len(pair) != 2 or not all(map(_are_patterns, pair)):
            raise TypeError(
                f"{self.name}[…]: expected names or patterns such as 'layer1.*', a list of them, or a pair for rows and "
                f"columns, got {key!r}. For entries by number use SubmatrixLinearOperator(op, rows, columns)."
            )
        if [] in pair:
            raise ValueError(f"{self.name}[…]: expected at least one name or pattern, got an empty list.")
        found: list[TensorSpace] = []
        for space, pattern in zip((self.codomain, self.domain), pair, strict=True):
            try:
                found.append(space.subspace(space.match(pattern)))
            except KeyError as error:
                if isinstance(key, tuple) or self.domain == self.codomain:
                    raise
                rows, columns = (key, self.domain.names[0]) if found else (self.codomain.names[0], key)
                raise KeyError(
                    f"{error.args[0]} Its rows and columns have other names: op[{rows!r}, {columns!r}]."
                ) from None
        part = self._restricted(*found)
        part._source, part._transposed = self._source, self._transposed
        return part

    __iter__ = None  # there is nothing to walk over

    @property
    def matvec(self) -> Any:
        """What SciPy looks for; it cannot read PyTorch's dtypes, so that this is an error which says what to pass."""
        raise TypeError(
            f"{self.name}: SciPy takes op.to_scipy(), within 'with op.linearized():' where it takes many products."
        )

    def __array__(self, *_: Any, **__: Any) -> Any:
        """What NumPy looks for; no matrix is computed unasked, so that this is an error which says what to pass."""
        raise TypeError(
            f"{self.name}: an operator is no array. NumPy takes its matrix, op.to_dense().numpy(), and SciPy's solvers op.to_scipy()."
        )

    def damped(self, damping: Damping) -> LinearOperator:
        """The square operator plus ``damping`` times the identity; what has structure keeps it.

        Args:
            damping: δ ≥ 0, or one for each parameter by name.

        Raises:
            TypeError: If a damping is no number (for derivatives with respect to it see ``logdet(damping)``).
            ValueError: If the operator is not square, a damping is negative, or names do not fit.

        Example:
            >>> import torch
            >>> from curvops import IdentityOperator, TensorSpace
            >>> IdentityOperator(TensorSpace.flat(3)).damped(0.5) @ torch.ones(3)
            tensor([1.5000, 1.5000, 1.5000])
        """
        if self.domain != self.codomain:
            raise ValueError(f"{self.name}.damped(): expected a square operator, got {self!r}.")
        return self._shifted(numbers(damping, self.domain))

    def inverse(self, damping: Damping = 0.0, **options: Any) -> LinearOperator:
        """(A + δI)⁻¹ of the square operator A, as an operator.

        What has structure gives a matrix of the same structure, and may have kinds of damping (see there). Else this is an
        `InverseOperator`, each of whose products is a solution as of `solve`, by the solver that it would take.

        Args:
            damping: δ ≥ 0, or one for each parameter by name.
            options: Without structure ``solver``, ``strict`` and the solver's: see `InverseOperator`.

        Raises:
            TypeError, ValueError: If the operator is not square, or an argument is not as described.

        Example:
            >>> import torch
            >>> from curvops import OuterProductOperator
            >>> both = OuterProductOperator(torch.ones(2)) + OuterProductOperator(torch.tensor([1.0, -1.0]))
            >>> both.inverse(2.0) @ torch.ones(2)  # both is 2 I
            tensor([0.2500, 0.2500])
        """
        return self.algebra.invert(self, damping, options)

    def adjoint(self) -> LinearOperator:
        """The adjoint operator; for a symmetric one itself."""
        return self if self.symmetric else self.algebra.transpose(self)

    @property
    def T(self) -> LinearOperator:
        """The adjoint (real operators: the transpose)."""
        return self.adjoint()

    H = T

    def __add__(self, other: Any) -> LinearOperator:
        if isinstance(other, LinearOperator):
            return self.algebra.add(self, other)
        if isinstance(other, Real) or (isinstance(other, Tensor) and other.numel() == 1):
            raise TypeError(
                f"{self.name} + {other}: a number is no operator. For A + δ I write op.damped({other}), "
                "for a multiple of the identity op + c * IdentityOperator(op.domain)."
            )
        return NotImplemented

    def __radd__(self, other: Any) -> LinearOperator:
        return self if isinstance(other, Real) and other == 0 else self + other  # where `sum` begins

    def __sub__(self, other: Any) -> LinearOperator:
        return self + (-1.0) * other if isinstance(other, LinearOperator) else NotImplemented

    def __mul__(self, scalar: Any) -> LinearOperator:
        factor = as_scalar(scalar)
        return NotImplemented if factor is None else self._scaled(factor)

    __rmul__ = __mul__

    def __truediv__(self, scalar: Any) -> LinearOperator:
        factor = as_scalar(scalar)
        return NotImplemented if factor is None else self * (1.0 / factor)

    def __neg__(self) -> LinearOperator:
        return -1.0 * self

    def to_dense(self) -> Tensor:
        """The matrix ``[rows, columns]``.

        Raises:
            MemoryError: If it does not fit; the message gives the size.
        """
        if self.domain.shards or self.codomain.shards:
            raise TypeError(
                f"{self.name}.to_dense(): the parameters are cut over processes, and so is what is multiplied. Take GatheredOperator(op), whose "
                "vectors each process has whole."
            )
        with self._in_step():
            check_fits(*self.shape, self.dtype, self.device, f"{self.name}.to_dense()")
        with own_precision(self.device), torch.inference_mode(False):
            return self._dense()

    def to_scipy(self, dtype: Any = None) -> Any:
        """A ``scipy.sparse.linalg.LinearOperator`` (needs ``scipy``), on NumPy arrays of a dtype, by default its own.

        A solver takes many products: call it within ``with op.linearized():``. Given the operator itself, SciPy's solvers
        are told to take this view, but for `eigsh` and `tfqmr`: they begin with "Cannot interpret 'torch.float32' as a data type".
        """
        return scipy_view(self, dtype)


@contextmanager
def _entered(contexts: Iterable[AbstractContextManager[Any]]) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


def _are_patterns(key: Any) -> bool:
    return isinstance(key, str) or (isinstance(key, list) and all(isinstance(each, str) for each in key))
