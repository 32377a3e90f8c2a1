"""Products that conjugate gradients take on the damped GGN of a trained classifier, by preconditioner.

Usage: python benchmarks/solvers.py [--damping 1e-3,1e-4] [--steps 200] [--columns 1]
The net (64 – 64 – 32 – 10, ReLU) is trained on scikit-learn's digits by Adam. The damping is relative to the GGN's largest
eigenvalue, the right-hand side is the gradient (and further columns are random), and the residual asked for is 1e-6.
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from curvops import EKFACLinearOperator, GGNDiagonalLinearOperator, GGNLinearOperator, KFACLinearOperator
from curvops.solvers.cg import cg

KRONECKER = {"KFAC": KFACLinearOperator, "EKFAC": EKFACLinearOperator}


def trained(
    steps: int,
) -> tuple[nn.Module, nn.Module, dict[str, torch.Tensor], list[tuple[torch.Tensor, torch.Tensor]]]:
    """The net after some steps, its loss, its parameters, and all digits in one batch."""
    torch.manual_seed(0)
    digits = load_digits()
    X, y = torch.tensor(digits.data / 16), torch.tensor(digits.target)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).double()
    loss, optimizer = nn.CrossEntropyLoss(), torch.optim.Adam(model.parameters(), 3e-3)
    loader, done = DataLoader(TensorDataset(X, y), 128, shuffle=True), 0
    while done < steps:
        for inputs, labels in loader:
            optimizer.zero_grad()
            loss(model(inputs), labels).backward()
            optimizer.step()
            done += 1
    return model, loss, dict(model.named_parameters()), [(X, y)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--damping", default="1e-2,1e-3,1e-4")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--columns", type=int, default=1)
    arguments = parser.parse_args()
    problem = trained(arguments.steps)
    ggn = GGNLinearOperator(*problem)
    flat = ggn.risk.value_and_gradient()[1]
    others = torch.randn(len(flat), arguments.columns - 1, generator=torch.Generator().manual_seed(1)).to(flat)
    b, largest = torch.cat([flat.unsqueeze(1), others], 1), float(torch.linalg.eigvalsh(ggn.to_dense())[-1])
    approximations = {name: make(*problem, fisher_type="type-2") for name, make in KRONECKER.items()}
    diagonal = GGNDiagonalLinearOperator(*problem, fisher_type="type-2").diagonal()
    print(f"{len(flat)} parameters, λ_max = {largest:.3g}, {arguments.columns} right-hand sides\n")
    print(f"{'δ / λ_max':>9}  {'preconditioner':<16} {'products':>8}  {'share':>6}  {'residual':>8}")
    for relative in map(float, arguments.damping.split(",")):
        damping = relative * largest
        inverses = {"none": None, "diagonal": 1 / (diagonal + damping)}
        for name, approximation in approximations.items():
            inverses[f"{name} exact"] = approximation.inverse(damping)
        inverses["KFAC heuristic"] = approximations["KFAC"].inverse(damping, kind="heuristic")
        counts: dict[str, int] = {}
        for name, inverse in inverses.items():
            found = cg(ggn, b, damping=damping, preconditioner=inverse, max_iterations=5000)
            counts[name] = found.products
            share = f"{found.products / counts['none']:.0%}"
            print(f"{relative:>9g}  {name:<16} {found.products:>8}  {share:>6}  {float(found.residual.max()):>8.1e}")


if __name__ == "__main__":
    main()
