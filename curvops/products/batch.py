"""Products with one batch's matrix over the batch's graph: the reference, and forward mode where it is proved."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from curvops.losses import OutputCurvature
from curvops.products.account import tolerance
from curvops.products.record import Recorder
from curvops.products.reference import GradientLinearization, OutputLinearization, drained, inner_product
from curvops.risk.data import Batch

Push = Callable[[Tensor], Tensor]


class BatchProduct(ABC):
    """A batch's symmetric matrix without the constant c, known by its products.

    Args:
        batch: The batch.
        curvature: The loss at its output.
        record: What its forward pass did.
        sizes: Entries of each parameter.
    """

    def __init__(self, batch: Batch, curvature: OutputCurvature, record: Recorder, sizes: list[int]) -> None:
        self.batch, self.curvature, self.record, self.sizes = batch, curvature, record, sizes
        self.copies = 1  # of what the graph holds
        self.held_bytes = 0  # beside graphs

    @abstractmethod
    def parts(self, v: Tensor, last: bool = False) -> list[Tensor | None]:
        """The product with a flat vector ``[D]`` by parameter, ``None`` for zeros; the ``last`` one frees the graph."""

    def add_to(self, total: Tensor, rows: Tensor, last: bool = False) -> Tensor:
        """Add the products with several vectors, ``[K, D]``, to ``total`` ``[K, D]``: no flat vector lies beside its parts."""
        for k, (sums, v) in enumerate(zip(total, rows, strict=True)):
            start, final = 0, last and self.record.fresh and k == len(rows) - 1
            for part, size in zip(drained(self.parts(v, final)), self.sizes, strict=True):
                if part is not None:
                    sums[start : start + size].add_(part.reshape(-1))
                start += size
        return total


class HessianProduct(BatchProduct):
    """The Hessian of one batch."""

    def __init__(
        self, batch: Batch, curvature: OutputCurvature, record: Recorder, gradient: GradientLinearization
    ) -> None:
        super().__init__(batch, curvature, record, gradient.space.sizes)
        self._gradient = gradient

    def parts(self, v: Tensor, last: bool = False) -> list[Tensor | None]:
        return self._gradient.parts(v, last)


class FactorProduct(BatchProduct):
    """Jᵀ S Sᵀ J of one batch.

    Args:
        jacobian: The Jacobian by reverse mode.
        output_matrix: u ↦ S Sᵀ u, both of the output's shape.
        push: J v by a forward mode that was proved; ``None`` for reverse over reverse.
    """

    def __init__(
        self,
        batch: Batch,
        curvature: OutputCurvature,
        record: Recorder,
        jacobian: OutputLinearization,
        output_matrix: Callable[[Tensor], Tensor],
        push: Push | None = None,
    ) -> None:
        super().__init__(batch, curvature, record, jacobian.space.sizes)
        self.jacobian, self._output_matrix, self.push = jacobian, output_matrix, push

    def parts(self, v: Tensor, last: bool = False) -> list[Tensor | None]:
        if self.push is not None:
            pushed = self.push(v)
            image = self._output_matrix(pushed)
            result = self.jacobian.pull(image)
            if self._agree(result, v, image, pushed):
                return result
        return self.jacobian.pull(self._output_matrix(self.jacobian.push(v)), last)

    def _agree(self, result: list[Tensor | None], v: Tensor, image: Tensor, pushed: Tensor) -> bool:
        """Whether vᵀ G v = ‖Sᵀ J v‖², which costs nothing; an image of zero says nothing."""
        size = float(image.norm() * pushed.norm())
        along = inner_product(result, v, self.sizes)
        inner = torch.dot(image.flatten().to(v.dtype), pushed.flatten().to(v.dtype))
        return size > 0 and abs(float(inner - along)) <= tolerance(pushed.dtype) * size


class HeldRows(BatchProduct):
    """Jᵀ S Sᵀ J of one batch by its rows Sᵀ J, ``[R, D]``."""

    def __init__(self, product: BatchProduct, rows: Tensor) -> None:
        super().__init__(product.batch, product.curvature, product.record, product.sizes)
        self._rows, self.held_bytes = rows, rows.numel() * rows.itemsize

    def parts(self, v: Tensor, last: bool = False) -> list[Tensor | None]:
        return list(((v @ self._rows.T) @ self._rows).split(self.sizes))

    def add_to(self, total: Tensor, rows: Tensor, last: bool = False) -> Tensor:
        return total.add_((rows @ self._rows.T) @ self._rows)
