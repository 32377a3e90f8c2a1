"""
Truncated Newton steps
======================

Hessian products, damping where the curvature is negative, and a line search.
"""

# %%
# Away from a saddle
# ------------------
# Newton's step solves H p = −g. For a network H is not positive definite, and nobody can store it; a few conjugate
# gradient steps with its products do.

import matplotlib.pyplot as plt
import torch
from torch import nn

from curvops import HessianLinearOperator


# %%
# The recipe
# ----------
def newton_step(hessian: HessianLinearOperator, least: float = 1e-10) -> tuple[float, float]:
    """Move the parameters by a truncated Newton step, damped (Nocedal & Wright 2006, algorithm 7.1).

    (H + δI) p = −g is solved by conjugate gradients, to a residual of min(½, √‖g‖): no better than the distance to a
    minimum deserves. δ is ‖g‖², which vanishes there (Li et al. 2004), and grows tenfold where they meet negative
    curvature. The step is halved until the loss falls by 1e-4 of what the slope promises (Armijo).

    Args:
        hessian: Of the loss that is minimized; its parameters are moved in place.
        least: Smallest part of the step that is tried.

    Returns:
        The loss and the gradient's norm before the step.

    Raises:
        RuntimeError: If no part of the step lessens the loss: rounding is all that is left.
    """
    risk = hessian.risk
    value, gradient = risk.value_and_gradient()
    size = gradient.norm().item()
    damping = size**2
    with hessian.linearized():
        while not (solution := hessian.solve(-gradient, damping, solver="cg", tolerance=min(0.5, size**0.5))).converged:
            damping = max(10 * damping, 1e-3)
    slope = (gradient @ solution.x).item()
    step, start = 1.0, {name: p.detach().clone() for name, p in risk.params.items()}
    while step > least:
        with torch.no_grad():
            for (name, p), move in zip(risk.params.items(), hessian.domain.split(solution.x), strict=True):
                p.copy_(start[name] + step * move)
        if risk.value() <= value + 1e-4 * step * slope:
            return value.item(), size
        step /= 2
    raise RuntimeError(f"no part of the step down to {least:g} lessens the loss; the gradient's norm is {size:.1e}.")


# %%
# On a quadratic
# --------------
def check_against_dense() -> None:
    """On a quadratic the steps end at the minimum, where the dense Hessian's only step ends."""
    generator = torch.Generator().manual_seed(0)
    X, y = (torch.randn(40, k, generator=generator, dtype=torch.float64) for k in (5, 2))
    model = nn.Linear(5, 2).double()
    hessian = HessianLinearOperator(model, nn.MSELoss(), dict(model.named_parameters()), [(X, y)])
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    expected = before - torch.linalg.solve(
        hessian.to_dense(), torch.cat([g.flatten() for g in hessian.risk.gradient()])
    )
    while newton_step(hessian)[1] > 1e-6:
        pass
    torch.testing.assert_close(torch.cat([p.detach().flatten() for p in model.parameters()]), expected)
    print("on a quadratic the steps end where the dense Hessian's does")


check_against_dense()

# %%
# From a saddle to the least loss
# -------------------------------
# A linear network with a bottleneck: a saddle where it begins, and its least loss in closed form.
generator = torch.Generator().manual_seed(0)
X = torch.linalg.qr(torch.randn(50, 4, generator=generator, dtype=torch.float64))[0] * 50**0.5
y = (
    torch.randn(50, 3, generator=generator, dtype=torch.float64)
    + X @ torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.5]).double())[:, :3]
)
model = nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 3, bias=False)).double()
with torch.no_grad():
    for p in model.parameters():
        p.copy_(0.01 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
hessian = HessianLinearOperator(model, nn.MSELoss(), dict(model.named_parameters()), [(X, y)])
least = torch.linalg.eigvalsh(hessian.to_dense())[0].item()
print(f"to begin with, the least eigenvalue is {least:.3f}")
assert least < -0.1

value, sizes, values = torch.inf, [torch.inf], []
while sizes[-1] > 1e-8 and len(sizes) < 40:
    value, size = newton_step(hessian)
    sizes.append(size)
    values.append(value)
    print(f"step {len(sizes) - 2:2d}: loss {value:.8f}, gradient {size:.1e}")

# %%
# Beside the truth
# ----------------
# The best regression of rank two, from a singular value decomposition.
regression = X.T @ y / 50  # X has orthonormal columns, times √50
rest = (y - X @ regression).square().mean().item() + torch.linalg.svdvals(regression)[2].item() ** 2 / 3
print(f"the best regression of rank two has {rest:.8f}")
assert sizes[-1] < 1e-8 and abs(value - rest) < 1e-9

# %%
figure, ax = plt.subplots(figsize=(4.5, 3), layout="constrained")
ax.semilogy([v - rest for v in values], "o-", label="loss above the least one")
ax.semilogy(sizes[1:], "x-", label="norm of the gradient")
ax.set(xlabel="step", title="Slow out of the saddle, fast at the end")
ax.legend(frameon=False)
plt.show()
