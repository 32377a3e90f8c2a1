"""A model with its data, as every library takes it, and how a result is compared."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import models
import torch
from torch import Tensor, nn

import curvops

LOSS = nn.CrossEntropyLoss()


@dataclass(frozen=True)
class Problem:
    """A model, its data, and the parameters that are asked about: all, or those of linear and convolution layers."""

    name: str
    model: nn.Module
    data: Any
    linear: bool = False

    @cached_property
    def params(self) -> dict[str, Tensor]:
        return models.linear_parameters(self.model) if self.linear else dict(self.model.named_parameters())

    @cached_property
    def size(self) -> int:
        return sum(p.numel() for p in self.params.values())

    @cached_property
    def num_data(self) -> int:
        return sum(len(y) for _, y in self.data)

    @cached_property
    def v(self) -> Tensor:
        """A vector, always the same."""
        return torch.randn(self.size, generator=torch.Generator().manual_seed(1))

    @property
    def parts(self) -> list[Tensor]:
        """The vector in the parameters' shapes."""
        pieces = self.v.split([p.numel() for p in self.params.values()])
        return [piece.view_as(p) for piece, p in zip(pieces, self.params.values(), strict=True)]

    def joined(self) -> Problem:
        """The same with all data in one batch."""
        X, y = (torch.cat(parts) for parts in zip(*self.data, strict=True))
        return replace(self, data=[(X, y)])

    def apart(self) -> Problem:
        """The same with a model of its own, of which nothing is known."""
        return replace(self, model=copy.deepcopy(self.model))

    def gradient(self) -> None:
        for X, y in self.data:
            torch.autograd.grad(LOSS(self.model(X), y), list(self.params.values()))

    def ours(self, kind: str, check: bool = False, **options: Any) -> Any:
        make = getattr(curvops, f"{kind}LinearOperator")
        return make(self.model, LOSS, self.params, self.data, check_deterministic=check, **options)

    def peer(self, kind: str, check: bool = False, **options: Any) -> Any:
        import curvlinops  # here, since not being there is one of the ways to fail

        make, listed = getattr(curvlinops, f"{kind}LinearOperator"), list(self.params.values())
        return make(self.model, LOSS, listed, self.data, check_deterministic=check, num_data=self.num_data, **options)

    def peer_factors(self, kind: str, check: bool = False, **options: Any) -> Any:
        """The peer's Kronecker operator with what it computes at its first product."""
        operator = self.peer(kind, check, num_per_example_loss_terms=self.data[0][1][0].numel(), **options)
        operator.compute_kronecker_factors()
        if kind == "EKFAC":
            operator.compute_eigenvalue_correction()
        return operator


def flat(parts: Sequence[Tensor]) -> Tensor:
    """Some tensors as one vector."""
    return torch.cat([part.detach().flatten() for part in parts])


def relative(a: Tensor, b: Tensor) -> float:
    """Distance relative to the second."""
    return float((a - b).norm() / b.norm())


def installed(package: str) -> str:
    """A package's version."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"
