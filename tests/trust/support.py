"""Small models and data that the tests share."""

import pickle
import re
from collections.abc import Callable, Iterable
from itertools import cycle
from typing import Any

import pytest
import torch
from oracles import Case, real
from problems import custom
from torch import Tensor, nn

CLEAR = (TypeError, ValueError, RuntimeError, NotImplementedError, pickle.PicklingError)
CE = nn.CrossEntropyLoss()
times = custom("Times", lambda x, w: x @ w.T, lambda g, x, w: (g @ w, g.T @ x))
PAIRS = ("Hessian", "EKFAC"), ("GGN", "GGNDiagonal"), ("EF", "EKFAC"), ("Hessian", "GGNDiagonal")


def rotate(variants: Iterable[Any], *choices: Any) -> list[Any]:
    """Each variant with one of the choices, in turn; else with two kinds of operators."""
    pairs = zip(variants, cycle(choices or PAIRS))
    return [pytest.param(*pair, id=" - ".join(map(str, pair)).replace("'", "")) for pair in pairs]


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


def used(case: Case, kind: str, **options: Any) -> Any:
    op = case.make(kind, **options)
    op @ torch.ones(op.shape[1])
    return op


def right_or_refused(case: Case, kinds: Iterable[str], names: str, truth: Tensor | None = None) -> None:
    for kind in kinds:
        try:
            op = used(case, kind)
        except CLEAR as error:
            assert re.search(names, str(error)), str(error)
        else:
            case.check(kind, op=op, truth=truth)
