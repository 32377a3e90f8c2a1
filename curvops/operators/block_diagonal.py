"""Block-diagonal operators and what their blocks make cheap: inverses, powers, determinants, samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from curvops.context import in_own_precision
from curvops.estimators.groups import Rows
from curvops.lengths import power_of_two, size_of
from curvops.operators.blocks import AffineBlock, Block, EigenBlock, KroneckerBlock
from curvops.operators.damping import Damping, Number, by_parameter, number, numbers
from curvops.operators.linear_operator import LinearOperator
from curvops.operators.places import Places, moved
from curvops.operators.submatrix import SubmatrixLinearOperator, restricted_name
from curvops.space import TensorSpace, describe


@dataclass(frozen=True)
class Placed:
    """A block, its parameters, and where its rows sit in the flat vector."""

    names: tuple[str, ...]
    places: Places
    block: Block

    @property
    def positions(self) -> Tensor:
        return self.places.tensor

    @property
    def label(self) -> str:
        """What the block is called in errors."""
        return f"block of {describe(self.names)}"

    def eigen(self) -> EigenBlock:
        return self.block.eigen(self.label)

    def powered(self, exponent: float, shift: float) -> Placed:
        eigen = self.eigen()
        values = eigen.values + shift
        if exponent < 0 and (eigen.singular if shift == 0 else not float(values.abs().amin()) > 0):
            raise ValueError(
                f"{self.label}: it is singular, so the power {exponent:g} does not exist. Pass a positive damping, "
                f"for instance damping=1e-3 (its largest eigenvalue is {float(values.amax()):.2e})."
            )
        if exponent % 1 and values.amin() < 0:
            raise ValueError(
                f"{self.label}: its least eigenvalue is {float(values.amin()):.2e}, so the power {exponent:g} does not "
                "exist. Pass a larger damping."
            )
        return replace(self, block=EigenBlock(eigen.left, eigen.right, values**exponent))

    def affine(self, factor: float, shift: float) -> Placed:
        return replace(self, block=self.block.affine(factor, shift))

    def moved(self, space: TensorSpace, subspace: TensorSpace) -> Placed:
        """The block in a subspace that has all of its parameters."""
        return replace(self, places=moved(self.places, space, subspace))


class BlockDiagonalOperator(LinearOperator):
    """A symmetric operator of blocks that cover all parameters; nothing here forms a dense matrix unasked.

    Eigendecompositions are made once and kept, so that several dampings share them; the factors never change.
    """

    _blocks: Sequence[Placed]
    _at_hand = True

    @property
    def blocks(self) -> Sequence[Placed]:
        """The blocks."""
        return self._blocks

    def _apply(self, columns: Tensor) -> Tensor:
        return self._placed(lambda p: p.block.matmul(columns[p.places.index].to(p.block.dtype)), columns.shape[1])

    def _dense(self) -> Tensor:
        result = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        for placed in self.blocks:
            where = placed.positions
            result[where[:, None], where] = placed.block.dense().to(self.dtype)
        return result

    def _exact_trace(self) -> Tensor:
        return self._total(placed.block.diagonal().sum() for placed in self.blocks)

    def _exact_diagonal(self) -> Tensor:
        return self._placed(lambda p: p.block.diagonal())

    def _exact_norm(self) -> Tensor:
        norms = [p.block.frobenius_norm() for p in self.blocks]
        return (size_of(torch.stack(norms)) if norms else torch.zeros((), device=self.device)).to(self.dtype)

    def _exact_block_norms(self, groups: Mapping[str, Rows]) -> tuple[Tensor, Tensor] | None:
        """Where no block is cut: each has all or none of its parameters among a group's rows."""
        inside = torch.zeros(len(groups), len(self.blocks), dtype=torch.bool, device="cpu")
        for i, rows in enumerate(groups.values()):
            share = {name: self._share(name, rows) for name in self.domain.names}
            for b, placed in enumerate(self.blocks):
                shares = {share[name] for name in placed.names}
                if shares not in ({0.0}, {1.0}):
                    return None
                inside[i, b] = shares == {1.0}
        norms = torch.stack([placed.block.frobenius_norm().cpu() for placed in self.blocks])
        both, scale = inside.double(), power_of_two(norms)
        return ((both * (norms / scale).square()) @ both.T).to(self.device), scale.to(self.device)

    def _share(self, name: str, rows: Rows) -> float:
        """The part of a parameter's entries that are among some rows, from 0 to 1."""
        own = self.domain.slice(name)
        if isinstance(rows, slice):
            found = max(0, min(own.stop, rows.stop) - max(own.start, rows.start))
        else:
            found = int(((rows >= own.start) & (rows < own.stop)).sum())
        return found / max(1, own.stop - own.start)

    def _exact_logdet(self, damping: Damping) -> Tensor:
        def log(placed: Placed, shift: Number) -> Tensor:
            block = placed.eigen()
            if number(shift) == 0 and block.singular:
                return block.values.new_tensor(-math.inf)
            values = block.values + (shift.reshape(()) if isinstance(shift, Tensor) else shift)
            if not self.psd and values.amin() < 0:
                raise ValueError(f"{placed.label}: an eigenvalue is negative, so there is no log-determinant.")
            return values.log().sum()

        return self._total(log(placed, shift) for placed, shift in self._damped(damping))

    def det(self, damping: Damping = 0.0) -> Tensor:
        """The determinant of the matrix plus ``damping`` times the identity; prefer `logdet` for many parameters."""
        return self.logdet(damping).exp()

    @in_own_precision
    def eigenvalues(self) -> Tensor:
        """All eigenvalues in ascending order, ``[D]``."""
        return self._eigenvalues().sort().values

    def _exact_eigenvalues(self) -> Tensor:
        return self.eigenvalues()

    def _exact_eigenvectors(self, chosen: Tensor) -> Tensor:
        units = torch.zeros(self.domain.dim, len(chosen), dtype=self.dtype, device=self.device)
        units[self._eigenvalues().argsort()[chosen], torch.arange(len(chosen), device=self.device)] = 1.0
        return self._rotated(units)

    def _exact_inverse(self, damping: Damping) -> LinearOperator:
        return self.inverse(damping)

    @in_own_precision
    def power(self, exponent: float, damping: Damping = 0.0) -> StructuredOperator:
        """The matrix plus ``damping`` times the identity, to a power such as −1, ½ or −½.

        A ValueError if the power is negative and a block is singular.
        """
        given = numbers(damping, self.domain)
        blocks = [placed.powered(exponent, number(shift)) for placed, shift in self._damped(given)]
        return StructuredOperator(self.domain, blocks, f"{self.name}^{exponent:g}", self.psd)

    @in_own_precision
    def inverse(  # type: ignore[override]  # its options are its own
        self, damping: Damping = 0.0, kind: str = "exact", min_damping: float = 0.0
    ) -> StructuredOperator:
        """The inverse of the damped matrix.

        Without damping, and with the heuristic one, a Kronecker product takes a Cholesky factorisation and an inverse
        of each factor (n³ operations) for each damping afresh; an eigendecomposition decides where rounding hides
        whether a factor has an inverse. The exact damping takes an eigendecomposition of each (9 n³ or more, five times
        as long for a ResNet-18 on the CPU), but once for any number. Blocks known in their eigenbasis (EKFAC) use it.

        Args:
            damping: δ ≥ 0, or one for each parameter by name.
            kind: ``"exact"`` for (F + δ I)⁻¹. ``"heuristic"`` for Kronecker factors that are damped each, by √δ times
                and over π (Martens & Grosse 2015, section 6.3); other blocks take the exact one.
            min_damping: Least damping of a factor (``"heuristic"``) or of a block (``"exact"``).

        Raises:
            TypeError: If a damping is no number, or requires a gradient.
            ValueError: If a block is singular, a damping is negative, or names do not fit.
        """
        if kind not in ("exact", "heuristic"):
            raise ValueError(f"kind: expected 'exact' or 'heuristic', got {kind!r}.")
        if not min_damping >= 0:
            raise ValueError(f"min_damping: expected a number ≥ 0, got {min_damping!r}.")

        def inverted(placed: Placed, shift: float) -> Placed:
            block, least = placed.block, max(shift, min_damping)
            if isinstance(block, (KroneckerBlock, AffineBlock)) and (kind == "heuristic" or block.shift == least == 0):
                inverse = block.inverse(shift, min_damping, placed.label)
                if inverse is not None:
                    return replace(placed, block=inverse)
            return placed.powered(-1.0, least)

        given = numbers(damping, self.domain)
        blocks = [inverted(placed, number(shift)) for placed, shift in self._damped(given)]
        return StructuredOperator(self.domain, blocks, f"{self.name}^-1", self.psd)

    @in_own_precision
    def sample(self, num_samples: int, damping: Damping, generator: torch.Generator | None = None) -> Tensor:
        """Samples ``[D, num_samples]`` of N(0, (F + δ I)⁻¹), for Laplace approximations with prior precision δ.

        ``damping`` is δ, or one for each parameter by name; the ``generator`` (by default the global one) is on the
        operator's device.
        """
        root = self.power(-0.5, damping)
        noise = torch.randn(self.domain.dim, num_samples, generator=generator, dtype=self.dtype, device=self.device)
        # U diag(λ^-½) ε: ε is as good as Uᵀε, so only one rotation is needed
        return root._rotated(noise * root._eigenvalues().unsqueeze(1))

    @property
    def is_diagonal(self) -> bool:
        """Whether all blocks are diagonal."""
        return all(placed.block.is_diagonal for placed in self.blocks)

    def _scaled(self, factor: float) -> LinearOperator:
        if not (factor >= 0 or self.is_diagonal):
            return super()._scaled(factor)
        blocks = [placed.affine(factor, 0.0) for placed in self.blocks]
        return StructuredOperator(self.domain, blocks, f"{factor:g} · {self.name}", self.psd and factor >= 0)

    def _shifted(self, damping: Mapping[str, float]) -> LinearOperator:
        blocks = [placed.affine(1.0, number(shift)) for placed, shift in self._damped(damping)]
        shifts = set(damping.values())
        added = f"{shifts.pop():g} · I" if len(shifts) == 1 else "damping"
        return StructuredOperator(self.domain, blocks, f"({self.name} + {added})", self.psd)

    def _restricted(self, rows: TensorSpace, columns: TensorSpace) -> LinearOperator:
        """The blocks that have a part in the rows and in the columns; where that is all of them, an operator of such."""
        if rows == columns == self.domain:
            return self
        given, taken = set(rows.names), set(columns.names)
        inside = [p for p in self.blocks if given.intersection(p.names) and taken.intersection(p.names)]
        needed = self.domain.subspace(given.union(taken, *(placed.names for placed in inside)))
        blocks = [placed.moved(self.domain, needed) for placed in inside]
        inner = StructuredOperator(needed, blocks, self.name, self.psd)
        if needed == rows == columns:
            inner._name = restricted_name(self, rows, columns)
            return inner
        return SubmatrixLinearOperator.of(inner, rows, columns)

    def _damped(self, damping: Damping) -> list[tuple[Placed, Number]]:
        """The blocks, and one damping for each."""
        given, found = by_parameter(damping, self.domain), []
        for placed in self.blocks:
            shifts = [given[name] for name in placed.names]
            values = {number(shift) for shift in shifts}
            if len(values) > 1:
                raise ValueError(
                    f"damping: expected one number ≥ 0 for the {placed.label}, got {sorted(values)}. "
                    "Give the parameters of a joint block the same damping, or use separate_weight_and_bias=True."
                )
            if any(isinstance(s, Tensor) and s.requires_grad and s is not shifts[0] for s in shifts[1:]):
                raise ValueError(
                    f"damping: expected one tensor for the {placed.label}, got several that need a gradient."
                )
            found.append((placed, shifts[0]))
        return found

    def _eigenvalues(self) -> Tensor:
        """The eigenvalues ``[D]``, those of a block at its places."""
        return self._placed(lambda p: p.eigen().values.flatten())

    def _rotated(self, columns: Tensor) -> Tensor:
        """The eigenvectors, in the order of `_eigenvalues`, times columns ``[D, K]``."""
        return self._placed(lambda p: p.eigen().rotate(columns[p.places.index].to(p.block.dtype)), columns.shape[1])

    def _placed(self, part: Callable[[Placed], Tensor], *columns: int) -> Tensor:
        result = torch.zeros(self.domain.dim, *columns, dtype=self.dtype, device=self.device)
        for placed in self.blocks:
            result[placed.places.index] = part(placed).to(self.dtype)
        return result

    def _total(self, parts: Iterable[Tensor]) -> Tensor:
        return sum((part.to(self.dtype) for part in parts), torch.zeros((), dtype=self.dtype, device=self.device))


class StructuredOperator(BlockDiagonalOperator):
    """Given blocks as an operator, such as an inverse, a power or a multiple; rows of no block are zero."""

    def __init__(self, space: TensorSpace, blocks: Sequence[Placed], name: str = "", psd: bool = True) -> None:
        super().__init__(space, symmetric=True, psd=psd)
        self._blocks, self._name = list(blocks), name
