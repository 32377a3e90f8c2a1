"""What the tour looks at: the synthetic task of the tutorial, and a small net on handwritten digits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from curvops.risk.empirical_risk import EmpiricalRisk

# the names of all setups, with the number of parameters of each model that is drawn
SIZES = {"tutorial": (683,), "digits": (830, 830)}

# single precision whatever the caller's default, so that a seed gives the same weights
_conv, _linear = partial(nn.Conv2d, dtype=torch.float32), partial(nn.Linear, dtype=torch.float32)


@dataclass(frozen=True)
class Setup:
    """A model, a loss and batches `(X, y)`, whose curvature is drawn into the folder `name`, empty for the top level."""

    name: str
    title: str
    model: nn.Sequential
    loss: nn.Module
    data: Iterable[tuple[Tensor, Tensor]]

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
    def layers(self) -> tuple[int, ...]:
        """Number of parameters of each child of the model, zero where it has none."""
        return tuple(sum(p.numel() for p in child.parameters()) for child in self.model)

    @property
    def groups(self) -> dict[str, int]:
        """The layers that have parameters, numbered from 1, with their number of parameters."""
        return {str(k): size for k, size in enumerate(filter(None, self.layers), 1)}

    def risk(self) -> EmpiricalRisk:
        """Make the empirical risk, of which all operators can be made."""
        return EmpiricalRisk(self.model, self.loss, self.params, self.data)

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
    with _seeded(seed):
        images = torch.rand(50, 3, 10, 10, dtype=torch.float32)
        labels = torch.randint(5, (50,))
        model = nn.Sequential(
            _conv(3, 4, 3, padding=1),
            nn.ReLU(),
            _conv(4, 4, 5, padding=2, stride=2),
            nn.Sigmoid(),
            _conv(4, 1, 3, padding=1),
            nn.Flatten(),
            _linear(25, 5),
        )
    return _setup(
        "", "Synthetic images, a CNN with random weights", model, images, labels, 20, device=device, dtype=dtype
    )


def digits(
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    num_data: int = 500,
    epochs: int = 20,
) -> tuple[Setup, Setup]:
    """Return a CNN on scikit-learn's 8 × 8 digits, before and after it is trained for a moment.

    The titles tell the accuracy on images not trained on. The curvature is that of `num_data` of the training images;
    training, in single precision on the CPU, walks over all of them `epochs` times.
    """
    from sklearn.datasets import load_digits

    source = load_digits()
    images = torch.tensor(source.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(source.target)
    with _seeded(seed):
        order = torch.randperm(len(images))
        images, labels = images[order], labels[order]
        before, after = (
            nn.Sequential(
                _conv(1, 6, 3, padding=1),
                nn.Tanh(),
                _conv(6, 8, 3, padding=1, stride=2),
                nn.Tanh(),
                nn.AvgPool2d(2),
                nn.Flatten(),
                _linear(32, 10),
            )
            for _ in range(2)
        )
        after.load_state_dict(before.state_dict())
        optimizer = torch.optim.Adam(after.parameters(), lr=5e-3)
        for rows in (rows for _ in range(epochs) for rows in torch.randperm(1400).split(50)):
            optimizer.zero_grad()
            nn.functional.cross_entropy(after(images[rows]), labels[rows]).backward()
            optimizer.step()
        optimizer.zero_grad()

    def setup(model: nn.Sequential, name: str, state: str) -> Setup:
        with torch.no_grad():
            accuracy = (model(images[1400:]).argmax(1) == labels[1400:]).double().mean().item()
        title = f"Handwritten digits, a CNN {state} training ({accuracy:.1%} of unseen images right)"
        return _setup(name, title, model, images[:num_data], labels[:num_data], 100, device=device, dtype=dtype)

    return setup(before, "digits/before", "before"), setup(after, "digits/after", f"after {epochs} epochs of")


def tiny(*, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Setup:
    """Return a network with 12 parameters, on which everything can be tried in no time."""
    with _seeded(0):
        model = nn.Sequential(_conv(1, 1, 1), nn.ReLU(), nn.Flatten(), _linear(4, 2))
    images = torch.linspace(0, 1, 12, dtype=torch.float32).reshape(3, 1, 2, 2)
    return _setup("tiny", "Three tiny images", model, images, torch.tensor([0, 1, 0]), 2, device=device, dtype=dtype)


def _setup(name: str, title: str, model: nn.Sequential, images: Tensor, labels: Tensor, batch: int, **to: Any) -> Setup:
    data = DataLoader(TensorDataset(images.to(**to), labels.to(to["device"])), batch_size=batch)
    return Setup(name, title, model.to(**to).eval(), nn.CrossEntropyLoss(reduction="mean"), data)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the CPU's generator, from which everything here is drawn, and put it back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # no GPU's
        yield
