"""States of computations with a matrix that is known by its products only, in a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from curvops.checkpoint import Checkpoint
from curvops.digest import digest
from curvops.lengths import lengths
from curvops.matrix import Products, normal, seeded

State = tuple[Mapping[str, Tensor], Mapping[str, Any]]


class Saved:
    """The state of a computation that was found, and how the next ones are written; nothing without a checkpoint.

    Args:
        checkpoint: Where.
        products: Products with the matrix, whose number says when it is time to write, and goes on from the state's.
        options: What was asked. The matrix is known by its answer to one vector, which is not counted.
        start: The vectors that it starts with.
        image: What the vector is multiplied with, the matrix and its metric; gives one column or more.

    Attributes:
        tensors, about: The state that was found, if any; the tensors are on the CPU, whatever they were.

    Raises:
        ValueError: If the file is of another computation or matrix.
    """

    def __init__(
        self,
        checkpoint: Checkpoint | None,
        products: Products,
        options: Mapping[str, Any],
        start: Tensor,
        image: Callable[[Tensor], Tensor],
    ) -> None:
        self._checkpoint, self._products = checkpoint, products
        self.tensors: dict[str, Tensor] = {}
        self.about: dict[str, Any] = {}
        if checkpoint is None:
            return
        self._witness = {"computation": products.title, "matrix": products.name, "shape": products.shape, **options}
        self._witness |= {"start": digest({"start": start}), "dtype": products.dtype, "device": products.device.type}
        # read before the product: processes that share a file and multiply together have all read the same one
        if (about := checkpoint.about(self._witness)) is not None:
            self.about, self.tensors = about, checkpoint.tensors(torch.device("cpu"))
        self._answer = image(normal((products.shape[1], 1), seeded(0), products))
        products.count = self._last = self.about.get("products", 0)
        if about is not None and not _close(self.tensors["answer"], self._answer.cpu()):
            raise checkpoint.error("of another matrix: its product with a vector is not what it was")

    def write(self, state: Callable[[], State], due: bool = False) -> None:
        """Write a state, if there were enough products since the last one or it is ``due``."""
        count = self._products.count
        if self._checkpoint is None or not (due or count - self._last >= self._checkpoint.every):
            return
        tensors, about = state()
        first, self._last = not (count or self.about), count
        self._checkpoint.write(self._witness, {**tensors, "answer": self._answer}, {**about, "products": count}, first)


def _close(one: Tensor, other: Tensor) -> bool:
    """Whether two products are the same but for the order of sums."""
    least = torch.finfo(one.dtype).eps ** 0.75
    return bool((lengths(one - other) <= least * lengths(other)).all())
