"""Block-diagonal operators and Kronecker products from matrices that a user has."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from curvops.lengths import size_of
from curvops.operators.block_diagonal import Placed, StructuredOperator
from curvops.operators.blocks import KroneckerBlock
from curvops.operators.eigen import check_finite
from curvops.operators.places import Places
from curvops.space import TensorSpace

Matrices = Tensor | tuple[Tensor, Tensor]


def block_diagonal(blocks: Mapping[str, Matrices], space: TensorSpace | None = None) -> StructuredOperator:
    """The operator with a symmetric positive semi-definite block for each parameter.

    Args:
        blocks: For each name a matrix ``[n, n]``, the diagonal ``[n]`` of a diagonal one, or a pair (B, A) of such for
            the Kronecker product B ⊗ A, which acts on a row-major weight matrix V as B V A.
        space: The space, whose parameters these are; by default plain vectors of these names.

    Raises:
        TypeError, ValueError: If a matrix is not finite, not symmetric, or of another size or dtype than its parameter.

    Example:
        >>> import torch
        >>> from curvops import block_diagonal
        >>> op = block_diagonal({"weight": (2 * torch.eye(2), torch.ones(3)), "bias": torch.eye(2)})
        >>> op.shape, op.trace(), op.damped(1.0).trace()
        ((8, 8), Estimate(14, exact), Estimate(22, exact))
    """
    pairs = {name: _pair(matrices, f"block of {name!r}") for name, matrices in blocks.items()}
    if space is None:
        sizes = {name: prod(len(factor) for factor in pair) for name, pair in pairs.items()}
        space = TensorSpace({name: pairs[name][0].new_empty(()).expand(size) for name, size in sizes.items()})
    if mismatch := space.mismatch(pairs):
        raise ValueError(f"block_diagonal: expected a block for each parameter{mismatch}.")
    placed = []
    for name, size in zip(space.names, space.sizes, strict=True):
        left, right = pairs[name]
        if len(left) * len(right) != size or {left.dtype, right.dtype} != {space.dtype}:
            raise ValueError(
                f"block of {name!r}: expected {size} rows of {space.dtype}, got {len(left) * len(right)} of {left.dtype}."
            )
        if size:
            places = Places(space.slice(name), space.device)
            placed.append(Placed((name,), places, KroneckerBlock(left[None], right[None])))
    return StructuredOperator(space, placed, "BlockDiagonalOperator")


def kronecker_product(left: Tensor, right: Tensor, space: TensorSpace | None = None) -> StructuredOperator:
    """The Kronecker product of two symmetric positive semi-definite matrices, or diagonals of such, as an operator.

    Args:
        left: B ``[m, m]``, or its diagonal ``[m]``.
        right: A ``[n, n]``, or its diagonal ``[n]``.
        space: A space of one tensor with ``m n`` entries, such as a weight ``[m, n]``; by default a plain vector.

    Raises:
        TypeError, ValueError: If a matrix is not finite, not symmetric, or they do not fit the space.

    Example:
        >>> import torch
        >>> from curvops import kronecker_product
        >>> op = kronecker_product(torch.tensor([1.0, 2.0]), torch.eye(3))
        >>> op.inverse() @ torch.ones(6)
        tensor([1.0000, 1.0000, 1.0000, 0.5000, 0.5000, 0.5000])
    """
    (name,) = ["vector"] if space is None else space.names if len(space.names) == 1 else [""]
    if not name:
        raise ValueError(f"kronecker_product: expected a space of one tensor, got {space!r}. See block_diagonal().")
    operator = block_diagonal({name: (left, right)}, space)
    operator._name = "KroneckerProduct"
    return operator


def _pair(matrices: Matrices, what: str) -> tuple[Tensor, Tensor]:
    """Two factors; the second of a single matrix is a one."""
    left, right = matrices if isinstance(matrices, tuple) else (matrices, matrices.new_ones(1, 1))
    for factor in (left, right):
        if not factor.is_floating_point() or factor.ndim not in (1, 2) or len(factor) != factor.shape[-1]:
            raise TypeError(
                f"{what}: expected a real floating-point matrix [n, n] or a diagonal [n], got {factor.dtype} of shape "
                f"{tuple(factor.shape)}."
            )
        check_finite(factor, what)
        bound = torch.finfo(factor.dtype).eps ** 0.5 * float(size_of(factor))
        if factor.ndim == 2 and not ((factor - factor.T).abs() <= bound).all():
            raise ValueError(f"{what}: expected a symmetric matrix, got one that differs from its transpose.")
    # copies: the caller may change the tensors, and eigendecompositions that are kept would not change with them
    return left.detach().clone(), right.detach().clone()
