"""Diagonal operators and multiples of the identity."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from curvops.operators.block_diagonal import Placed, StructuredOperator
from curvops.operators.blocks import EigenBlock
from curvops.operators.linear_operator import LinearOperator
from curvops.operators.places import Places
from curvops.space import TensorSpace, Vector


class DiagonalOperator(StructuredOperator):
    """diag(d); sums, products, powers and inverses of such are diagonal too.

    Args:
        diagonal: d, as a flat tensor, a list or a dict in the format of the space.
        space: The space; by default plain vectors of d's length, or the dict's own names.

    Raises:
        TypeError, ValueError: If the diagonal does not fit the space.

    Example:
        >>> import torch
        >>> from curvops import DiagonalOperator
        >>> d = DiagonalOperator(torch.tensor([1.0, 2.0]))
        >>> (d @ d + d).diagonal(), d.inverse().trace()
        (Estimate(2 entries, exact), Estimate(1.5, exact))
    """

    def __init__(self, diagonal: Vector, space: TensorSpace | None = None) -> None:
        space = space_of(diagonal) if space is None else space
        columns, form = space.to_columns(diagonal, "DiagonalOperator")
        if form.columns:
            raise ValueError("DiagonalOperator: expected one vector, got several as columns.")
        values = columns.detach().squeeze(1).clone()  # the caller may change the tensor
        super().__init__(space, _diagonal_blocks(values, space), "DiagonalOperator", psd=bool((values >= 0).all()))


class IdentityOperator(StructuredOperator):
    """A multiple of the identity.

    Args:
        space: The space, such as ``op.domain``, or ``TensorSpace.flat(D)`` for plain vectors.
        factor: The multiple.

    Example:
        >>> import torch
        >>> from curvops import IdentityOperator, TensorSpace
        >>> eye = IdentityOperator(TensorSpace.flat(3))
        >>> (2 * eye + eye).trace(), (2 * eye).inverse() @ torch.ones(3)
        (Estimate(9, exact), tensor([0.5000, 0.5000, 0.5000]))
    """

    def __init__(self, space: TensorSpace, factor: float = 1.0) -> None:
        values = torch.full((), factor, dtype=space.dtype, device=space.device).expand(space.dim)
        name = "I" if factor == 1 else f"{factor:g} · I"
        super().__init__(space, _diagonal_blocks(values, space), name, psd=factor >= 0)
        self.factor = factor

    def _scaled(self, factor: float) -> LinearOperator:
        return IdentityOperator(self.domain, factor * self.factor)

    def _shifted(self, damping: Mapping[str, float]) -> LinearOperator:
        shifts = set(damping.values())
        if len(shifts) > 1:
            return super()._shifted(damping)
        return IdentityOperator(self.domain, self.factor + shifts.pop())


def space_of(vector: Vector) -> TensorSpace:
    """The space of plain vectors of a tensor's length, or of a dict of tensors."""
    if isinstance(vector, Mapping):
        return TensorSpace(vector)
    if isinstance(vector, Tensor) and vector.ndim and vector.is_floating_point():
        return TensorSpace.flat(len(vector), vector.dtype, vector.device)
    got = str(vector.dtype) if isinstance(vector, Tensor) else type(vector).__name__
    raise TypeError(f"expected a floating-point tensor or a dict of such, or a space to place it in, got {got}.")


def _diagonal_blocks(values: Tensor, space: TensorSpace) -> list[Placed]:
    parts = zip(space.names, values.split(space.sizes), strict=True)
    return [
        Placed((name,), Places(space.slice(name), space.device), EigenBlock(None, None, part[None, :, None]))
        for name, part in parts
        if len(part)
    ]
