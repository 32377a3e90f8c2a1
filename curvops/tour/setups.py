"""What the tour looks at: the synthetic task of the tutorial, and a small net on handwritten digits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

SIZES = {"tutorial": (683,), "digits": (830, 830)}
"""The names of all setups, with the number of parameters of each model that is drawn."""


@dataclass(frozen=True)
class Setup:
    """A model, a loss and data whose curvature is drawn.

    Attributes:
        name: Its folder in the tour's output; empty for the top level.
        title: What it is, for a reader.
        model: The model, in evaluation mode.
        loss: The loss, a module with a reduction.
        data: Batches `(X, y)`; can be walked again.
        layers: Number of parameters of each child of the model, zero where it has none.
    """

    name: str
    title: str
    model: nn.Sequential
    loss: nn.Module
    data: Iterable[tuple[Tensor, Tensor]]
    layers: tuple[int, ...]

    @property
    def params(self) -> dict[str, Tensor]:
        """The parameters that are trained, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @property
    def num_params(self) -> int:
        """Number of rows of a curvature matrix."""
        return sum(p.numel() for p in self.params.values())

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return next(iter(self.params.values())).device

    @property
    def groups(self) -> dict[str, int]:
        """The layers that have parameters, numbered from 1, with their number of parameters."""
        return {str(k + 1): size for k, size in enumerate(size for size in self.layers if size)}

    def __str__(self) -> str:
        return f"{self.title}\nTotal parameters: {self.num_params}\nLayer parameters: {list(self.layers)}"


def tutorial(*, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0) -> Setup:
    """Return the tutorial's task: 50 random images in 5 classes, and a CNN of 683 parameters.

    The caller's random state stays as it is.

    Example:
        >>> print(tutorial())
        Synthetic images, a CNN with random weights
        Total parameters: 683
        Layer parameters: [112, 0, 404, 0, 37, 0, 130]
    """
    classes, channels, size = 5, 3, 10
    with _seeded(seed):
        images = torch.rand(50, channels, size, size, dtype=torch.float32)
        labels = torch.randint(classes, (50,))
        model = nn.Sequential(
            _conv(channels, 4, 3, padding=1),
            nn.ReLU(),
            _conv(4, 4, 5, padding=2, stride=2),
            nn.Sigmoid(),
            _conv(4, 1, 3, padding=1),
            nn.Flatten(),
            nn.Linear(25, classes, dtype=torch.float32),
        )
    return _setup("", "Synthetic images, a CNN with random weights", model, images, labels, 20, device, dtype)


def digits(
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    num_data: int = 500,
    epochs: int = 20,
) -> tuple[Setup, Setup]:
    """Return a CNN on scikit-learn's 8 × 8 digits, before and after it is trained for a moment.

    Args:
        device: Where the parameters live.
        dtype: Of images and parameters; training itself is done in single precision on the CPU.
        seed: Of the weights, the order of the data and the split.
        num_data: How many of the training images the curvature is that of.
        epochs: Walks over the training images.

    Returns:
        The two setups; their titles tell the accuracy on images that were not trained on.
    """
    from sklearn.datasets import load_digits

    source = load_digits()
    images = torch.tensor(source.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(source.target)
    with _seeded(seed):
        order = torch.randperm(len(images))
        images, labels = images[order], labels[order]
        train, test = slice(0, 1400), slice(1400, None)
        before, after = _digits_model(), _digits_model()
        after.load_state_dict(before.state_dict())
        _train(after, images[train], labels[train], epochs)

    setups = []
    for model, name, state in (
        (before, "digits/before", "before"),
        (after, "digits/after", f"after {epochs} epochs of"),
    ):
        with torch.no_grad():
            accuracy = (model(images[test]).argmax(1) == labels[test]).double().mean().item()
        title = f"Handwritten digits, a CNN {state} training ({accuracy:.1%} of unseen images right)"
        setups.append(_setup(name, title, model, images[:num_data], labels[:num_data], 100, device, dtype))
    return setups[0], setups[1]


def tiny(*, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Setup:
    """Return a network with 12 parameters, on which everything can be tried in no time."""
    with _seeded(0):
        model = nn.Sequential(_conv(1, 1, 1, padding=0), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2, dtype=torch.float32))
    images = torch.linspace(0, 1, 12, dtype=torch.float32).reshape(3, 1, 2, 2)
    return _setup("tiny", "Three tiny images", model, images, torch.tensor([0, 1, 0]), 2, device, dtype)


def _digits_model() -> nn.Sequential:
    return nn.Sequential(
        _conv(1, 6, 3, padding=1),
        nn.Tanh(),
        _conv(6, 8, 3, padding=1, stride=2),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 10, dtype=torch.float32),
    )


def _train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, batch: int = 50) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(batch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
    optimizer.zero_grad()


def _setup(
    name: str,
    title: str,
    model: nn.Sequential,
    images: Tensor,
    labels: Tensor,
    batch: int,
    device: torch.device | str,
    dtype: torch.dtype,
) -> Setup:
    model = model.to(device=device, dtype=dtype).eval()
    data = DataLoader(TensorDataset(images.to(device, dtype), labels.to(device)), batch_size=batch)
    layers = tuple(sum(p.numel() for p in child.parameters()) for child in model)
    return Setup(name, title, model, nn.CrossEntropyLoss(reduction="mean"), data, layers)


def _conv(inputs: int, outputs: int, kernel: int, *, padding: int, stride: int = 1) -> nn.Conv2d:
    # single precision whatever the caller's default, so that a seed gives the same weights
    return nn.Conv2d(inputs, outputs, kernel, padding=padding, stride=stride, dtype=torch.float32)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the CPU's generator, from which everything here is drawn, and put it back afterwards."""
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(state)
