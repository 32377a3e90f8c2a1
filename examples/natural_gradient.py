"""
A natural-gradient optimizer in 40 lines
========================================

Kronecker factors that follow the training, on handwritten digits.
"""

# %%
# The step
# --------
# Gradient descent measures a step by the length of the change of θ; natural gradient by the change of the model's
# predictions, which is what the Fisher matrix measures. The step is θ ← θ − η (F̄ + δI)⁻¹ g, with the gradient g of a
# batch and F̄ the moving average of the batches' KFAC (Martens & Grosse 2015, `arXiv 1503.05671
# <https://arxiv.org/abs/1503.05671>`_). All that it takes from the library is ``refresh``, which makes the factors of
# the next batch and averages, and ``inverse``.

import argparse
from collections.abc import Callable, Mapping
from itertools import pairwise

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from curvops import KFACLinearOperator


class NaturalGradient:
    """θ ← θ − η (F̄ + δI)⁻¹ g, with g of a batch and F̄ the moving average of the batches' KFAC.

    The defaults train. Measured by ``python examples/natural_gradient.py --compare --steps 100``: the loss at the end, and the largest on the way.

        δ     decay  exact damping, mc_samples=1  exact, type-2     heuristic, mc_samples=1  heuristic, type-2
        1e-2  0      770, of 1400: diverges       0.0021, of 1.7    0.0088, of 1.7           0.0098, of 1.7
        1e-2  0.9    0.028, of 8                  0.013, of 10      0.0087, of 1.7           0.0088, of 1.7
        1e-3  0      8100, of 13000: diverges     11000: diverges   6, of 30                 0.72, of 9.9
        1e-3  0.9    0.89, of 15                  2.6, of 33        0.12, of 24              0.00022, of 2.5

    A single sample leaves whole directions without curvature, in which exact damping takes steps of up to 1/δ. With
    δ = 1e-2 the exact expectation (``"type-2"``), the average or heuristic damping, which lifts each factor, is enough
    to train; 1e-3 takes all three of them.
    """

    def __init__(
        self, model: nn.Module, loss: Callable, params: Mapping[str, Tensor], learning_rate: float = 0.3,
        damping: float = 1e-2, kind: str = "heuristic", decay: float = 0.9, **options: object,
    ) -> None:  # fmt: skip
        self.problem, self.options = (model, loss, params), {"fisher_type": "type-2", **options}
        self.learning_rate, self.damping, self.kind, self.decay = learning_rate, damping, kind, decay
        self.kfac: KFACLinearOperator | None = None

    def step(self, X: Tensor, y: Tensor) -> float:
        """One step on a batch; its loss before."""
        if self.kfac is None:
            options = {"separate_weight_and_bias": False, **self.options}
            self.kfac = KFACLinearOperator(*self.problem, [(X, y)], **options)
        else:
            self.kfac = self.kfac.refresh([(X, y)], decay=self.decay)
        value, gradient = self.kfac.risk.value_and_gradient()
        step = self.kfac.inverse(self.damping, kind=self.kind) @ gradient
        with torch.no_grad():
            for p, change in zip(self.kfac.risk.params.values(), self.kfac.domain.split(step), strict=True):
                p -= self.learning_rate * change
        return float(value)


# %%
# Beside the dense matrix
# -----------------------
# One step on a network so small that its matrix can be inverted.
def network(*widths: int) -> nn.Sequential:
    """A tanh network, with the same weights each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [part for n, m in pairwise(widths) for part in (nn.Linear(n, m), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def check_one_step() -> None:
    """A step without an average is that of the dense matrix."""
    generator = torch.Generator().manual_seed(0)
    X, y = torch.rand(30, 5, generator=generator).double(), torch.randint(3, (30,), generator=generator)
    model, loss = network(5, 4, 3).double(), nn.CrossEntropyLoss()
    params = dict(model.named_parameters())
    kfac = KFACLinearOperator(model, loss, params, [(X, y)], fisher_type="type-2", separate_weight_and_bias=False)
    before = torch.cat([p.detach().flatten() for p in params.values()])
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss(model(X), y), list(params.values()))])
    NaturalGradient(model, loss, params, kind="exact", damping=1e-2).step(X, y)
    after = torch.cat([p.detach().flatten() for p in params.values()])
    dense = torch.linalg.solve(kfac.to_dense() + 1e-2 * torch.eye(len(before), dtype=gradient.dtype), gradient)
    torch.testing.assert_close(after, before - 0.3 * dense)
    print("a step equals that of the dense matrix")


check_one_step()


# %%
# On handwritten digits
# ---------------------
def train(steps: int, make: Callable = NaturalGradient, **options: object) -> tuple[list[float], float]:
    """Losses of all training data along the way, and the accuracy on unseen data, of an optimizer with ``step(X, y)``."""
    source = load_digits()
    X, y = torch.tensor(source.images, dtype=torch.float32).flatten(1) / 16, torch.tensor(source.target)
    generator = torch.Generator().manual_seed(0)
    seen, unseen = torch.randperm(len(X), generator=generator).split([1400, len(X) - 1400])
    model, loss = network(64, 64, 10), nn.CrossEntropyLoss()
    optimizer = make(model, loss, dict(model.named_parameters()), **options)
    losses = []
    for _ in range(steps):
        rows = seen[torch.randint(len(seen), (200,), generator=generator)]
        optimizer.step(X[rows], y[rows])
        with torch.no_grad():
            losses.append(loss(model(X[seen]), y[seen]).item())
        if not losses[-1] < 1e6:
            break
    with torch.no_grad():
        return losses, (model(X[unseen]).argmax(1) == y[unseen]).double().mean().item()


losses, accuracy = train(30)
print(f"loss after 30 steps {losses[-1]:.2g}, {accuracy:.1%} of unseen digits right")
assert losses[-1] < 0.2 and accuracy > 0.9


# %%
# Beside gradient descent and Adam
# --------------------------------
# The same network and batches, each with the best of five learning rates. A step of natural gradient costs several of
# theirs; what is compared here is how far a step gets.
class Torch:
    """One of PyTorch's optimizers, stepped by batches."""

    def __init__(
        self, model: nn.Module, loss: Callable, params: Mapping[str, Tensor], kind: type, learning_rate: float
    ) -> None:
        self.model, self.loss, self.optimizer = model, loss, kind(list(params.values()), lr=learning_rate)

    def step(self, X: Tensor, y: Tensor) -> None:
        self.optimizer.zero_grad()
        self.loss(self.model(X), y).backward()
        self.optimizer.step()


RATES = {torch.optim.SGD: (0.1, 0.3, 1.0, 3.0, 10.0), torch.optim.Adam: (3e-3, 1e-2, 3e-2, 0.1, 0.3)}
figure, ax = plt.subplots(figsize=(4.5, 3.2), layout="constrained")
ax.semilogy(losses, label="natural gradient")
for kind, rates in RATES.items():
    runs = {rate: train(30, Torch, kind=kind, learning_rate=rate)[0] for rate in rates}
    best = min(runs, key=lambda rate: runs[rate][-1])
    print(f"{kind.__name__}: loss after 30 steps {runs[best][-1]:.2g}, with the learning rate {best:g}")
    ax.semilogy(runs[best], label=f"{kind.__name__}, rate {best:g}")
    assert losses[-1] < runs[best][-1]
ax.set(xlabel="step", ylabel="loss of all training data", title="Thirty steps on digits")
ax.legend(frameon=False)
plt.show()


# %%
# Damping, averages and samples
# -----------------------------
# ``python examples/natural_gradient.py --compare --steps 100`` prints what the docstring's table says. It takes minutes.
def compare(steps: int) -> None:
    """The table of `NaturalGradient`."""
    for damping in (1e-2, 1e-3):
        for decay in (0.9, 0.0):
            for kind in ("exact", "heuristic"):
                for fisher in ("mc", "type-2"):
                    losses, _ = train(steps, damping=damping, decay=decay, kind=kind, fisher_type=fisher)
                    print(
                        f"δ {damping:g}, decay {decay:g}, {kind}, {fisher}: {losses[-1]:.2g}, at most {max(losses):.2g}"
                    )


parser = argparse.ArgumentParser(description=NaturalGradient.__doc__)
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--compare", action="store_true", help="the table of NaturalGradient")
given = parser.parse_args()
if given.compare:
    compare(given.steps)
