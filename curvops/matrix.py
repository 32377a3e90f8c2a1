"""What estimators, eigensolvers and linear solvers ask of a matrix: a shape, a dtype, a device, and products.

They know nothing else, so that they serve anybody's operators: ours, plain tensors, SciPy's and NumPy's.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from curvops.context import callers_precision, own_precision
from curvops.extras import extra


@runtime_checkable
class Matrix(Protocol):
    """Anything with a shape and products with columns ``[D, K]``: a `LinearOperator`, a tensor, a SciPy operator.

    Read where they are there: ``dtype``, ``device``, ``adjoint()`` or ``mT`` or ``T`` (products from the left),
    ``symmetric`` and ``psd`` (what is declared false is refused where it must be true), ``linearized()`` (a context
    that makes many products cheaper), ``domain`` (vectors as lists and dicts of tensors), ``name``.
    """

    @property
    def shape(self) -> Any:
        """Rows and columns."""

    def __matmul__(self, columns: Any, /) -> Any:
        """Products with columns."""


class Given(NamedTuple):
    """Columns ``[D, K]`` of a vector that a user gave, and what gives an answer back in the same format."""

    columns: Tensor
    answer: Callable[[Tensor], Any]


class Products:
    """Counted products with a matrix, for the time of a context in which many are taken.

    The context is without the caller's autocast; products of what is no plain tensor are with it, for they may run a model.

    Args:
        matrix: See `Matrix`.
        title: What is computed, for errors and the progress bar.
        square: Refuse a matrix that is not square.
        symmetric: Refuse a matrix that declares itself not symmetric.
        progressbar: Show a bar that counts products (needs ``tqdm``).

    Attributes:
        count: Products so far, one a column.

    Raises:
        TypeError, ValueError: If it is no such matrix.

    Example:
        >>> import torch
        >>> with Products(torch.eye(3), "trace") as products:
        ...     columns = products(torch.ones(3, 2))
        >>> products.count
        2
    """

    def __init__(
        self, matrix: Any, title: str, *, square: bool = True, symmetric: bool = False, progressbar: bool = False
    ) -> None:
        self.matrix, self.title, self._progressbar = matrix, title, progressbar
        shape = getattr(matrix, "shape", None)
        if shape is None or not hasattr(matrix, "__matmul__"):
            raise TypeError(f"{title}: expected a matrix with 'shape' and '@', got {type(matrix).__name__}.")
        if len(shape) != 2 or (square and shape[0] != shape[1]):
            wanted = "a square matrix" if square else "a matrix"
            raise ValueError(f"{title}: expected {wanted}, got shape {tuple(shape)}.")
        if symmetric and getattr(matrix, "symmetric", None) is False:
            raise ValueError(
                f"{title}: expected a symmetric matrix, got {self.name}, which is not. Solve equations with such a matrix "
                "by lsmr; for its singular values use the symmetric AᵀA."
            )
        self.shape = (int(shape[0]), int(shape[1]))
        dtype = getattr(matrix, "dtype", None)
        self._torch = isinstance(dtype, torch.dtype)  # else products are asked for with NumPy's arrays
        if isinstance(dtype, torch.dtype):
            self.dtype = dtype
        else:
            self.dtype = torch.get_default_dtype() if dtype is None else _of_numpy(dtype)
        if not self.dtype.is_floating_point:
            raise TypeError(f"{title}: expected a real floating-point matrix, got {self.dtype}.")
        self.device = torch.device(getattr(matrix, "device", "cpu") if self._torch else "cpu")
        self.count = 0
        self._bar: Any = None
        self._stack = ExitStack()

    @property
    def name(self) -> str:
        """What the matrix is called."""
        return str(getattr(self.matrix, "name", None) or type(self.matrix).__name__)  # a tensor's name is None

    def __enter__(self) -> Products:
        self._stack.enter_context(own_precision(self.device))
        if hasattr(self.matrix, "linearized"):
            self._stack.enter_context(self.matrix.linearized())
        if self._progressbar:
            bar = extra("tqdm", "progressbar=True").tqdm(desc=self.title, unit=" products")
            self._bar = self._stack.enter_context(bar)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __call__(self, columns: Tensor) -> Tensor:
        """A times columns ``[D, K]``."""
        return self._product(self.matrix, columns)

    def adjoint(self, columns: Tensor) -> Tensor:
        """Aᵀ times columns."""
        matrix = self.matrix
        if hasattr(matrix, "adjoint") and not isinstance(matrix, Tensor):
            return self._product(matrix.adjoint(), columns)
        if not hasattr(matrix, "mT") and not hasattr(matrix, "T"):
            raise TypeError(f"{self.title}: expected a matrix with 'adjoint()', 'mT' or 'T', {self.name} has none.")
        return self._product(matrix.mT if hasattr(matrix, "mT") else matrix.T, columns)

    def _product(self, matrix: Any, columns: Tensor) -> Tensor:
        self.count += columns.shape[1]
        if isinstance(dtype := getattr(matrix, "dtype", None), torch.dtype):
            columns = columns.to(dtype)  # the adjoint may take vectors of another one
        with torch.no_grad(), nullcontext() if isinstance(matrix, Tensor) else callers_precision():
            found = matrix @ columns if self._torch else torch.as_tensor(matrix @ columns.numpy(), device="cpu")
        if self._bar is not None:
            self._bar.update(columns.shape[1])
        return found.to(self.device, self.dtype)

    def given(self, vector: Any, left: bool = False) -> Given:
        """A user's vector as columns: a tensor ``[D]`` or ``[D, K]``, or any format of the matrix's own.

        Args:
            vector: The vector.
            left: Whether it is one that the matrix gives (a right-hand side), and not one that it takes. The answer
                is of the other kind; the two are the same where the matrix is square.
        """
        spaces = getattr(self.matrix, "codomain", None), getattr(self.matrix, "domain", None)
        own, other = spaces if left else spaces[::-1]
        if own is not None and other is not None and hasattr(own, "to_columns"):
            columns, form = own.to_columns(vector, f"'{self.title}'")
            return Given(columns.detach(), lambda found: other.from_columns(found, form))
        if not isinstance(vector, Tensor):
            raise TypeError(f"{self.title}: expected a tensor, got {type(vector).__name__}.")
        size = self.shape[0] if left else self.shape[1]
        if vector.ndim not in (1, 2) or len(vector) != size:
            raise ValueError(f"{self.title}: expected shape ({size},) or ({size}, K), got {tuple(vector.shape)}.")
        if vector.dtype != self.dtype or vector.device != self.device:
            silent = (
                ""
                if getattr(self.matrix, "dtype", None) is not None
                else f" {self.name} says no dtype: give it a `dtype`."
            )
            raise TypeError(
                f"{self.title}: expected {self.dtype} on {self.device}, got {vector.dtype} on {vector.device}.{silent}"
            )
        if vector.layout != torch.strided:
            raise TypeError(
                f"{self.title}: expected a dense vector, got one of layout {vector.layout}: pass v.to_dense()."
            )
        single = vector.ndim == 1
        columns = vector.detach().unsqueeze(1) if single else vector.detach()
        return Given(columns, lambda found: found.squeeze(1) if single else found)


def normal(shape: tuple[int, ...], generator: torch.Generator, like: Products) -> Tensor:
    """Standard normal numbers of a CPU generator, the same on any device and (but for rounding) in any dtype."""
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(like.device, like.dtype)


def signs(shape: tuple[int, ...], generator: torch.Generator, like: Products) -> Tensor:
    """Independent random signs ±1 (Rademacher), the same on any device and in any dtype."""
    return (torch.randint(2, shape, generator=generator, device="cpu") * 2 - 1).to(like.device, like.dtype)


def seeded(seed: int) -> torch.Generator:
    """A CPU generator of its own, so that the global random state stays as it is."""
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed: expected an integer, got {seed!r}.")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed: expected an integer of 64 bits, got {seed}.")
    return torch.Generator().manual_seed(seed)


def _of_numpy(dtype: Any) -> torch.dtype:
    np = extra("numpy", "a matrix of NumPy's or SciPy's")
    return torch.from_numpy(np.empty(0, np.dtype(dtype))).dtype
