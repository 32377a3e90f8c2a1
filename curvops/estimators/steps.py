"""Steps of an estimate in a checkpoint: what an estimator knew after the last one, and the products since."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from curvops.checkpoint import Checkpoint
from curvops.digest import digest
from curvops.estimators.groups import Rows
from curvops.estimators.probes import Probes
from curvops.spectrum.saved import Saved, State


class Steps:
    """Takes an estimator's products in the place of its `Probes`, so that they can be written and given once more.

    A run that goes on begins the step in which it was killed again, with the same random vectors, and with the products
    that it had. So an estimator says only what it knows between two steps; nothing is kept without a checkpoint.

    Args:
        checkpoint: Where.
        probes: The estimator's random vectors.
        rows: Its groups.
        options: What was asked.
        inside: Whether the products of a step under way are kept, and written, too.

    Attributes:
        keeps: Whether there is a checkpoint.
        tensors, about: What the estimator said after the last step that was found, if any.

    Raises:
        ValueError: If the file is of another computation or matrix.
    """

    def __init__(
        self,
        checkpoint: Checkpoint | None,
        probes: Probes,
        rows: Mapping[str, Rows],
        options: Mapping[str, Any],
        inside: bool = True,
    ) -> None:
        self._probes, self._products, self._inside = probes, probes.products, inside
        self.tensors: dict[str, Tensor] = {}
        self.about: dict[str, Any] = {}
        self._answers: list[Tensor] = []  # of the step, known from the file
        self._since: list[Tensor] = []  # all answers of the step
        self.keeps = checkpoint is not None
        if checkpoint is None:
            return
        places = {name: _places(own) for name, own in rows.items()}
        asked = {**options, "groups": digest(places)}
        self._saved = Saved(checkpoint, self._products, asked, probes.empty(), self._products)
        found = {name: tensor.to(self._products.device) for name, tensor in self._saved.tensors.items()}
        self.about = dict(self._saved.about)
        self._answers = [found.pop(f"since.{k}") for k in range(self.about.pop("since", 0))]
        self._products.count = self._begun = self.about.pop("begun", 0)
        found.pop("answer", None)
        self._random = found.pop("random").cpu() if self._saved.about else probes.random
        probes.random, probes.through, self.tensors = self._random, self._product, found

    def done(self, tensors: Mapping[str, Tensor], **about: Any) -> None:
        """A step is done, after which the estimator knows this."""
        if self.keeps:
            self.tensors, self.about, self._since = dict(tensors), about, []
            self._begun, self._random = self._products.count, self._probes.random

    def end(self) -> None:
        """Write what is known at the end, unless it is there."""
        if self.keeps and self._products.count > self._saved.about.get("products", -1):
            self._saved.write(self._state, due=True)

    def _product(self, multiply: Callable[[Tensor], Tensor], columns: Tensor) -> Tensor:
        if self._answers:
            self._products.count += columns.shape[1]
            found = self._answers.pop(0)
        else:
            if self._inside or self._products.count == self._begun:
                self._saved.write(self._state, due=not self._products.count)
            found = multiply(columns)
        if self._inside:
            self._since.append(found)
        return found

    def _state(self) -> State:
        since = {f"since.{k}": found for k, found in enumerate(self._since)}
        about = {**self.about, "since": len(since), "begun": self._begun}
        return {**self.tensors, **since, "random": self._random}, about


def _places(rows: Rows) -> Tensor:
    return torch.tensor([rows.start, rows.stop], device="cpu") if isinstance(rows, slice) else rows
