"""Small problems in double precision: models, losses and data that every operator must handle."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from kronecker.cases import Net
from torch import Tensor, nn

N = 6


@dataclass
class Problem:
    """A model, a loss and one batch of all data; `args` cuts it into batches."""

    model: nn.Module
    loss: Any
    X: Any
    y: Any
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def params(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @property
    def dim(self) -> int:
        return sum(p.numel() for p in self.params.values())

    def data(self, *sizes: int) -> list[tuple[Any, Any]]:
        """The data in batches of some sizes, by default in one."""
        if not sizes:
            return [(self.X, self.y)]
        if isinstance(self.X, dict):
            columns = [t.split(sizes) for t in self.X.values()]
            Xs: Iterable[Any] = [dict(zip(self.X, parts, strict=True)) for parts in zip(*columns, strict=True)]
        else:
            Xs = self.X.split(sizes)
        return list(zip(Xs, self.y.split(sizes), strict=True))

    def args(self, *sizes: int) -> tuple[Any, ...]:
        return self.model, self.loss, self.params, self.data(*sizes)


PROBLEMS: dict[str, Callable[[], Problem]] = {}
LOSSES: dict[str, Callable[[], Problem]] = {}


def seeded(register: dict[str, Callable[[], Problem]]) -> Callable[[Callable[[], Any]], Callable[[], Problem]]:
    """Register a problem under its function's name; it is the same each time."""

    def decorate(make: Callable[[], Any]) -> Callable[[], Problem]:
        def build() -> Problem:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(7)
                model, loss, X, y, *options = make()
            return Problem(model.double(), loss, X, y, *options)

        register[make.__name__] = build
        return build

    return decorate


def real(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@seeded(PROBLEMS)
def mlp():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    return model, nn.CrossEntropyLoss(), real(N, 3), torch.randint(3, (N,))


@seeded(PROBLEMS)
def cnn():
    model = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.SiLU(), nn.Conv2d(4, 2, 2), nn.Flatten(), nn.Linear(2, 2))
    return model, nn.CrossEntropyLoss(reduction="sum"), real(N, 2, 4, 4), torch.randint(2, (N,))


@seeded(PROBLEMS)
def transformer():
    """A transformer block over tokens, with positions, that gives logits `[N, C, T]`."""
    model = Net(
        lambda net, X: net.head(
            net.block(net.embedding(X["ids"]) * X["mask"][..., None] + net.positions),
        ).movedim(-1, 1),
        embedding=nn.Embedding(3, 3),
        positions=nn.Parameter(torch.randn(2, 3)),
        block=nn.TransformerEncoderLayer(3, 1, 2, dropout=0.0, batch_first=True, activation="gelu"),
        head=nn.Linear(3, 2),
    )
    X = {"ids": torch.randint(3, (N, 2)), "mask": torch.rand(N, 2, dtype=torch.float64)}
    y = torch.randint(2, (N, 2))
    y[1, 1] = y[4, 0] = -100
    return model, nn.CrossEntropyLoss(), X, y


@seeded(PROBLEMS)
def lstm():
    layers = {"lstm": nn.LSTM(2, 2, batch_first=True), "head": nn.Linear(2, 2)}
    return Net(lambda net, x: net.head(net.lstm(x)[0]), **layers), nn.MSELoss(), real(N, 3, 2), real(N, 3, 2)


def norms_forward(net: Any, x: Tensor) -> Tensor:
    x = net.layer(net.first(x)).sigmoid()
    return net.last(net.batch(x) + net.group(x))


@seeded(PROBLEMS)
def norms():
    layers = {"first": nn.Linear(3, 4), "layer": nn.LayerNorm(4), "group": nn.GroupNorm(1, 4)}
    model = Net(norms_forward, **layers, batch=nn.BatchNorm1d(4), last=nn.Linear(4, 2))
    return model.eval(), nn.BCEWithLogitsLoss(), real(N, 3), torch.rand(N, 2, dtype=torch.float64)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tied = nn.Linear(3, 3, bias=False)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.unused = nn.Parameter(torch.randn(2))
        self.temperature = nn.Parameter(torch.tensor(0.7))
        self.free = nn.Parameter(torch.randn(3))
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
        self.head = nn.Linear(3, 3, bias=False)
        self.head.weight = self.tied.weight
        self.register_buffer("shift", torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.frozen(self.tied(x)) * self.temperature + self.shift)
        x = torch.tanh(self.tied(x) + self.free)
        return self.normed(self.head(x))


@seeded(PROBLEMS)
def odd():
    return Odd(), nn.HuberLoss(delta=0.7), real(N, 3), real(N, 2)


def with_loss(loss: Any, y: Tensor, outputs: int = 3, **options: Any) -> tuple[Any, ...]:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, outputs))
    return model, loss, real(len(y), 3), y, options


WEIGHT = torch.tensor([0.3, 1.0, 2.5], dtype=torch.float64)


LABELS, SOME_IGNORED = torch.tensor([0, 2, 1, 2, 0, 2]), torch.tensor([0, 7, 1, 2, 7, 2])


def probabilities() -> Tensor:
    return torch.rand(N, 3, dtype=torch.float64).softmax(1)


for _reduction in ("mean", "sum"):
    for _name, _make in {
        "ce": lambda r: (nn.CrossEntropyLoss(reduction=r), LABELS.clone()),
        "ce_weights": lambda r: (nn.CrossEntropyLoss(WEIGHT, reduction=r), LABELS.clone()),
        "ce_smoothing": lambda r: (nn.CrossEntropyLoss(label_smoothing=0.2, reduction=r), LABELS.clone()),
        "ce_ignored": lambda r: (nn.CrossEntropyLoss(ignore_index=7, reduction=r), SOME_IGNORED.clone()),
        "ce_all": lambda r: (nn.CrossEntropyLoss(WEIGHT, None, 7, None, r, 0.2), SOME_IGNORED.clone()),
        "ce_soft": lambda r: (nn.CrossEntropyLoss(reduction=r), probabilities()),
        "ce_soft_all": lambda r: (nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.1, reduction=r), probabilities()),
        "bce": lambda r: (nn.BCEWithLogitsLoss(reduction=r), probabilities()),
        "bce_weight": lambda r: (nn.BCEWithLogitsLoss(WEIGHT, reduction=r), probabilities()),
        "bce_pos_weight": lambda r: (nn.BCEWithLogitsLoss(pos_weight=WEIGHT, reduction=r), probabilities()),
        "mse": lambda r: (nn.MSELoss(reduction=r), real(N, 3)),
        "huber": lambda r: (nn.HuberLoss(reduction=r, delta=0.5), real(N, 3)),
        "margin": lambda r: (nn.MultiMarginLoss(2, weight=WEIGHT, reduction=r), LABELS.clone()),
    }.items():

        def _build(make: Any = _make, reduction: str = _reduction) -> tuple[Any, ...]:
            return with_loss(*make(reduction))

        _build.__name__ = f"{_name}_{_reduction}"
        seeded(LOSSES)(_build)


@seeded(LOSSES)
def function_sum():
    return with_loss(lambda z, y: (z - y).pow(4).sum(), real(N, 3), reduction="sum")


@seeded(LOSSES)
def one_axis_mse():
    model, loss, X, y, options = with_loss(nn.MSELoss(), real(N), 1)
    return nn.Sequential(model, nn.Flatten(0)), loss, X, y, options


@seeded(LOSSES)
def positions_mean():
    X, y = real(N, 2, 3), torch.randint(2, (N, 2))
    y[0, 0] = y[3, 1] = -100
    classes_to_axis_1 = Net(lambda _, x: x.movedim(-1, 1))
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2), classes_to_axis_1)
    return model, nn.CrossEntropyLoss(WEIGHT[:2], label_smoothing=0.1), X, y


def custom(name, forward, backward):
    """An `autograd.Function` of that name, whose backward is given the gradient and the inputs."""

    def save(ctx, *inputs):
        ctx.save_for_backward(*inputs)
        return forward(*inputs)

    methods = {"forward": save, "backward": lambda ctx, g: backward(g, *ctx.saved_tensors)}
    return type(name, (torch.autograd.Function,), {key: staticmethod(method) for key, method in methods.items()}).apply


class Interrupting:
    def __init__(self, batches: list[tuple[Any, Any]]) -> None:
        self.batches, self.error = batches, None

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        for k, batch in enumerate(self.batches):
            if k and self.error is not None:
                raise self.error
            yield batch
