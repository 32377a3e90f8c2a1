"""The registry of the zoo: small models, each with data and a loss, and what is known of them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from kronecker.cases import Net
from torch import Tensor, nn

torch.manual_seed(1)
CE = nn.CrossEntropyLoss()


@dataclass(frozen=True)
class Entry:
    """One model of the zoo.

    Attributes:
        build: Gives ``(model, X, y, loss)``.
        mixes: Whether an output depends on the other data of its batch, so that batches may not be cut.
        convex: Whether the loss is convex in the output, so that its GGN has a factor.
        axis: The axis of X and y that holds the data.
        class_axis: The axis of the output that a loss term runs along; ``None`` if a term is a whole datum.
        surrogate: Whether the model's gradient is not the derivative of its output, by design.
        dtype: The model's precision.
        rounds: Whether the model computes in single precision inside, whatever its own.
    """

    build: Callable[[], tuple[nn.Module, Any, Any, Any]]
    mixes: bool = False
    convex: bool = True
    axis: int = 0
    class_axis: int | None = 1
    surrogate: bool = False
    dtype: torch.dtype = torch.float64
    rounds: bool = False


ZOO: dict[str, Entry] = {}


def entry(exists: bool = True, **facts: Any) -> Callable[[Any], Any]:
    """Register a function that builds a model, its data and its loss, if what it needs ``exists`` in this PyTorch."""

    def register(build: Any) -> Any:
        if exists:
            ZOO[build.__name__] = Entry(build, **facts)
        return build

    return register


def net(data: Callable[[], Any], loss: Any = CE, **given: Any) -> Callable[[Any], Any]:
    """Register a function ``(parts, X)`` as the model that it is with copies of its parts; the rest are facts."""
    facts = {name: given.pop(name) for name in ("exists", *Entry.__annotations__) if name in given}
    torch.manual_seed(1)  # the next one's parts do not depend on how many come before

    def register(function: Any) -> Any:
        @functools.wraps(function)
        def build() -> tuple[Any, ...]:
            return Net(function, **copy.deepcopy(given)).to(torch.get_default_dtype()), *data(), loss

        return entry(**facts)(build)

    return register


def free(*shape: int, scale: float = 0.5) -> nn.Parameter:
    """A free parameter."""
    return nn.Parameter(scale * torch.randn(shape))


def frees(**shapes: tuple[int, ...]) -> dict[str, nn.Parameter]:
    return {name: free(*shape) for name, shape in shapes.items()}


def linears(**widths: tuple[int, int]) -> dict[str, nn.Linear]:
    return {name: nn.Linear(*pair) for name, pair in widths.items()}


def embeddings(**sizes: tuple[int, int]) -> dict[str, nn.Embedding]:
    return {name: nn.Embedding(*pair) for name, pair in sizes.items()}


def vectors(n: int = 5, d: int = 6, k: int = 3) -> tuple[Tensor, Tensor]:
    """Inputs ``[n, d]`` and labels."""
    return torch.randn(n, d), torch.randint(k, (n,))


def sequences(n: int = 3, t: int = 5, d: int = 6, k: int = 3) -> tuple[Tensor, Tensor]:
    """Inputs ``[n, t, d]`` and labels."""
    return torch.randn(n, t, d), torch.randint(k, (n,))


def tokens(n: int = 3, t: int = 5, v: int = 9, k: int = 3) -> tuple[Tensor, Tensor]:
    """Token ids ``[n, t]`` and labels."""
    return torch.randint(v, (n, t)), torch.randint(k, (n,))


def images(n: int = 3, c: int = 2, s: int = 6, k: int = 3) -> tuple[Tensor, Tensor]:
    """Inputs ``[n, c, s, s]`` and labels."""
    return torch.rand(n, c, s, s), torch.randint(k, (n,))


def shifted(n: int, t: int, v: int) -> tuple[Tensor, Tensor]:
    """Token ids ``[n, t]`` and the ids that follow."""
    X = torch.randint(v, (n, t))
    return X, X.roll(-1, 1)
