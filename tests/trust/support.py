"""Small models and data that the tests share."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from trust.oracle import Case, real

CLEAR = (TypeError, ValueError, RuntimeError, NotImplementedError, pickle.PicklingError)
CE = nn.CrossEntropyLoss()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, X: Tensor) -> Tensor:
        return self.b(self.a(X).tanh())


class Model(Net):
    """A net with one more layer, further parameters, and a forward pass of the test's own."""

    def __init__(self, forward: Callable[[Any, Any], Tensor], **tensors: Tensor) -> None:
        super().__init__()
        self.c, self.used = nn.Linear(4, 3), forward
        for name, value in tensors.items():
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, X: Any) -> Tensor:
        return self.used(self, X)


def labels(n: int) -> Tensor:
    return torch.arange(n) * 7 % 5 % 3


def data(first: int = 5, second: int = 4) -> list[tuple[Tensor, Tensor]]:
    """Batches whose inputs differ in sign, so that models can tell them apart."""
    return [
        (real(first, 3).abs() + 0.1, labels(first)),
        (-real(second, 3, seed=1).abs() - 0.1, (labels(second) + 1) % 3),
    ]


def picture(model: nn.Module) -> list[Any]:
    """Which object stands under each name of each module, and what is known of the tensors among them."""
    seen: list[Any] = []
    for prefix, module in model.named_modules(remove_duplicate=False):
        tables = {**{k: vars(module)[k] for k in ("_parameters", "_buffers", "_modules")}, "": vars(module)}
        for table, names in tables.items():
            for name, value in names.items():
                known = isinstance(value, Tensor) and (value.requires_grad, id(value.grad), value.tolist())
                seen.append((prefix, table, name, id(value), type(value), known))
        seen.append((module.training, *(len(hooks) for name, hooks in vars(module).items() if name.endswith("_hooks"))))
    return seen


def right_or_refused(case: Case, kind: str, names: str, truth: Tensor | None = None) -> None:
    """The operator is right, or refuses with a message that matches."""
    try:
        op = case.make(kind)
        op @ torch.ones(op.shape[1])
    except CLEAR as error:
        assert re.search(names, str(error)), str(error)
    else:
        case.check(kind, op, truth)
