"""A Krylov space of a self-adjoint map, kept orthonormal: A V = V H + X C, and thick restarts by its Ritz vectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from curvops.lengths import lengths, lengths_in, size_of
from curvops.matrix import Products, normal

ROUNDING = 10  # precisions of the largest image: what is left of an image below this is no direction
CHUNK = 2**16  # entries of the basis vectors that a restart rotates together

Map = Callable[[Tensor], Tensor]


class Ritz(NamedTuple):
    """Approximate eigenvalues ``[m]``, ascending, their coordinates ``[m, m]`` in the basis, and residuals ``[m]``."""

    values: Tensor
    coordinates: Tensor
    residuals: Tensor


class Krylov:
    """Block Lanczos with full reorthogonalisation, twice, and explicit projections.

    H has each product's overlaps with the whole basis, and not only the ones that symmetry leaves, so residuals are
    those of the products that were made, and a map that is not self-adjoint is noticed.

    Args:
        products: Products with A, whose dtype and device the vectors have.
        image: The map, self-adjoint in the metric's inner product: A, or B⁻¹ A.
        metric: Products with B.
        start: Columns ``[D, b]`` of the first block.
        room: Basis vectors that are kept at most.
        spent: The space counts as invariant where it couples to its outside by no more than this, relative to the
            largest image.
        device, dtype: Where and how the basis is kept.
        generator: Gives directions where the space is invariant.
    """

    def __init__(
        self,
        products: Products,
        image: Map,
        metric: Map,
        start: Tensor,
        room: int,
        spent: float,
        device: torch.device,
        dtype: torch.dtype,
        generator: torch.Generator,
    ) -> None:
        self._products, self._image, self._metric, self._generator = products, image, metric, generator
        self._spent, self._largest = spent, 0.0
        self.dim, self._width = start.shape
        self._rows = torch.empty(room + self._width, self.dim, device=device, dtype=dtype)
        self._overlaps = torch.zeros(room, room, dtype=torch.float64, device="cpu")  # H
        self._coupling = torch.zeros(0, 0, dtype=torch.float64, device="cpu")  # C
        self.room, self.size, self.block = room, 0, 0  # vectors of V at most, of V, of X
        self.ended = False  # whether the last product found the space invariant
        self._advance(start)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What `resume` goes on from."""
        tensors = {"rows": self._rows[: self.size + self.block], "overlaps": self._overlaps, "coupling": self._coupling}
        numbers = {name: getattr(self, name) for name in ("room", "size", "block", "ended", "_largest")}
        return {**tensors, "generator": self._generator.get_state()}, numbers

    def resume(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Go on from a state of a space with the same arguments; its tensors may be on the CPU."""
        for name in ("size", "block", "ended", "_largest"):
            setattr(self, name, numbers[name])
        self._rows[: self.size + self.block] = tensors["rows"]
        self._overlaps, self._coupling = tensors["overlaps"], tensors["coupling"]
        self._generator.set_state(tensors["generator"])

    def expand(self) -> None:
        """Take products with the block X, which joins the basis."""
        begin, end = self.size, self.size + self.block
        image = self._image(self._rows[begin:end].T.to(self._products.device, self._products.dtype))
        if not image.isfinite().all():
            raise ValueError(f"{self._products.title}: a product with {self._products.name} is not finite.")
        self._overlaps[begin:end, :begin] = self._coupling
        self.size = end
        self._overlaps[:end, begin:end] = self._advance(image)

    def ritz(self) -> Ritz:
        """Eigenpairs of the projection; residuals are ‖A V s − θ V s‖ = ‖(H − θ) s + X C s‖."""
        overlaps = self._overlaps[: self.size, : self.size]
        values, coordinates = torch.linalg.eigh((overlaps + overlaps.T) / 2)
        within = lengths(overlaps @ coordinates - coordinates * values)
        return Ritz(values, coordinates, torch.hypot(within, lengths(self._coupling @ coordinates)))

    @property
    def eps(self) -> float:
        """Precision of the products or of the basis, whichever is lower."""
        return max(torch.finfo(dtype).eps for dtype in (self._products.dtype, self._rows.dtype))

    def asymmetry(self) -> float:
        """‖H − Hᵀ‖ / ‖H‖, which is rounding where the map is self-adjoint."""
        overlaps = self._overlaps[: self.size, : self.size]
        return float(size_of(overlaps - overlaps.T) / size_of(overlaps).clamp(min=torch.finfo(torch.float64).tiny))

    def vectors(self, coordinates: Tensor) -> Tensor:
        """Columns ``[D, K]`` of their coordinates ``[m, K]``."""
        found = coordinates.T.to(self._rows) @ self._rows[: self.size]
        return found.T.to(self._products.device, self._products.dtype)

    def restart(self, ritz: Ritz, kept: Tensor) -> None:
        """Keep some Ritz vectors only, and the block (Wu & Simon 2000)."""
        rotation, block = ritz.coordinates[:, kept], self._rows[self.size : self.size + self.block].clone()
        turned = rotation.T.to(self._rows)
        for part in self._rows.split(CHUNK, dim=1):
            part[: len(kept)] = turned @ part[: self.size]
        self._coupling = self._coupling @ rotation
        self.size = len(kept)
        self._rows[self.size : self.size + self.block] = block
        self._overlaps.zero_()
        self._overlaps[: self.size, : self.size] = ritz.values[kept].diag()

    def _advance(self, columns: Tensor) -> Tensor:
        """Make the next block of some columns' part outside the space; returns their overlaps with the space."""
        self.block, width, self.ended = 0, min(self._width, self.dim - self.size), False
        coordinates = torch.zeros(self.size + width, columns.shape[1], dtype=torch.float64, device="cpu")
        for j, column in enumerate(columns.T):
            found, inside = self._outside(column)
            coordinates[: len(inside), j] = inside
            if self.block == width:
                continue
            norm = self._norm(found)
            if self.size:  # else these are the start's columns
                self._largest = max(self._largest, self._norm(column))
                self.ended |= norm <= max(self._spent, ROUNDING * self.eps) * self._largest
            if norm > ROUNDING * self.eps * self._largest:
                coordinates[len(inside), j] = norm
            else:  # nothing leads out of the space here: go on in a random direction, which is not coupled to it
                found, _ = self._outside(normal((self.dim,), self._generator, self._products))
                norm = self._norm(found)
                if not norm:
                    raise ValueError(f"{self._products.title}: the metric is not positive definite. Damp it.")
            self._rows[self.size + self.block] = (found / norm).to(self._rows)
            self.block += 1
        before = torch.zeros(self.block, max(0, self.size - columns.shape[1]), dtype=torch.float64, device="cpu")
        self._coupling = torch.cat([before, coordinates[self.size :]], 1)[:, : self.size].contiguous()
        return coordinates[: self.size]

    def _outside(self, column: Tensor) -> tuple[Tensor, Tensor]:
        """A vector without its part within the space and the block, and that part's coordinates."""
        rows = self._rows[: self.size + self.block]
        inside = torch.zeros(len(rows), dtype=torch.float64, device="cpu")
        for _ in range(2):
            found = rows @ self._metric(column.unsqueeze(1)).squeeze(1).to(rows)
            column = column - (found @ rows).to(column)
            inside += found.double().cpu()
        return column, inside

    def _norm(self, column: Tensor) -> float:
        return float(lengths_in(self._metric, column.unsqueeze(1)))
