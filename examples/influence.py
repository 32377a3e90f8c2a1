"""
Which training data a prediction hangs on
=========================================

Influence functions by preconditioned conjugate gradients.
"""

# %%
# The question
# ------------
# A model was trained on N data. How would its loss on one unseen datum change, had datum n not been there? Training
# anew N times answers it. To first order one linear system does (Koh & Liang 2017, `arXiv 1703.04730
# <https://arxiv.org/abs/1703.04730>`_): the minimizer of Σ ℓ_n / N + δ‖θ‖² / 2 without datum n differs by
# (G + δI)⁻¹ ∇ℓ_n / N, so a function of the parameters with gradient v grows by vᵀ (G + δI)⁻¹ ∇ℓ_n / N.
#
# G is the Gauss-Newton matrix of the mean loss, and δ the weight decay of training.

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from curvops import GGNLinearOperator, JacobianLinearOperator, KFACLinearOperator

DAMPING = 1e-2  # the weight decay of training, so that the damped GGN is the curvature of what was minimized


# %%
# The recipe
# ----------
# One system is solved for all data: (G + δI) x = v, by conjugate gradients with KFAC's inverse as preconditioner. The
# gradients ∇ℓ_n = J_nᵀ r_n are never formed; one product J x gives all N answers.
def influences(
    model: nn.Module, X: Tensor, y: Tensor, gradient: Tensor, damping: float, tolerance: float = 1e-8
) -> Tensor:
    """How much a function of the parameters grows when each datum is left out, to first order.

    Args:
        model: Trained with the mean cross-entropy; δ is its weight decay.
        X: Inputs ``[N, …]``.
        y: Classes ``[N]``.
        gradient: v, ``[D]``.
        damping: δ > 0.
        tolerance: Of the relative residual.

    Returns:
        The changes ``[N]``.
    """
    params, loss = dict(model.named_parameters()), nn.CrossEntropyLoss()
    ggn = GGNLinearOperator(model, loss, params, [(X, y)])
    kfac = KFACLinearOperator.of(ggn.risk, fisher_type="type-2", separate_weight_and_bias=False)
    solution = ggn.solve(gradient, damping, preconditioner=kfac.inverse(damping), tolerance=tolerance)
    if not solution.converged:
        raise RuntimeError(f"conjugate gradients: {solution.reason}")
    pushed = JacobianLinearOperator(model, params, [(X, y)]) @ solution.x
    with torch.no_grad():
        residual = model(X).softmax(1) - nn.functional.one_hot(y, int(pushed.numel() / len(X)))
    print(f"{solution.products} products for {len(X)} data, residual {solution.residual.item():.1e}")
    return (pushed.reshape_as(residual) * residual).sum(1) / len(X)


def trained(model: nn.Module, X: Tensor, y: Tensor, size: int) -> nn.Module:
    """The model at the minimum of Σ ℓ_n / size + δ‖θ‖² / 2."""
    params = list(model.parameters())
    optimizer = torch.optim.LBFGS(
        params, max_iter=500, tolerance_grad=1e-10, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        decay = sum(p.square().sum() for p in params) * DAMPING / 2
        value = nn.functional.cross_entropy(model(X), y, reduction="sum") / size + decay
        value.backward()
        return value

    optimizer.step(objective)
    optimizer.zero_grad()
    return model


# %%
# A problem with one answer
# -------------------------
# A softmax regression has a single minimum, so "trained anew" is well defined, and its GGN is the Hessian.
generator = torch.Generator().manual_seed(0)
centres = 1.5 * torch.randn(3, 6, generator=generator, dtype=torch.float64)
y = torch.arange(150) % 3
X = centres[y] + torch.randn(150, 6, generator=generator, dtype=torch.float64)
test = centres[:1] + 0.5, torch.tensor([0])

model = nn.Linear(6, 3).double()
trained(model, X, y, len(X))
params = list(model.parameters())
loss = nn.functional.cross_entropy(model(test[0]), test[1])
gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, params)])
found = influences(model, X, y, gradient, DAMPING)

# %%
# Equal to the dense solves
# -------------------------
# The model is small enough to invert its matrix and to form each datum's gradient.
G = GGNLinearOperator(model, nn.CrossEntropyLoss(), dict(model.named_parameters()), [(X, y)]).to_dense()
inverse = torch.linalg.inv(G + DAMPING * torch.eye(len(G), dtype=G.dtype))
dense = []
for x, label in zip(X, y, strict=True):
    own = torch.autograd.grad(nn.functional.cross_entropy(model(x), label), params)
    dense.append(gradient @ inverse @ torch.cat([g.flatten() for g in own]) / len(X))
dense = torch.stack(dense)
torch.testing.assert_close(found, dense, rtol=1e-6, atol=1e-10)
print(f"largest difference to the dense solves: {(found - dense).abs().max().item():.1e}")

# %%
# Beside the truth
# ----------------
# Train anew without each of the ten data that matter most, and compare.
before, left_out = {name: p.detach().clone() for name, p in model.state_dict().items()}, []
chosen = found.abs().argsort(descending=True)[:10]
for n in chosen.tolist():
    model.load_state_dict(before)
    rest = torch.arange(len(X)) != n
    trained(model, X[rest], y[rest], len(X))
    with torch.no_grad():
        left_out.append(nn.functional.cross_entropy(model(test[0]), test[1]) - loss)
left_out = torch.stack(left_out).detach()

print("datum  predicted  trained anew")
for n, predicted, true in zip(chosen.tolist(), found[chosen].tolist(), left_out.tolist(), strict=True):
    print(f"{n:5d}  {predicted:+.2e}     {true:+.2e}")
correlation = torch.corrcoef(torch.stack([found[chosen], left_out]))[0, 1].item()
print(f"correlation {correlation:.4f}")
assert correlation > 0.99

# %%
figure, ax = plt.subplots(figsize=(4, 3.2), layout="constrained")
ends = [left_out.min().item(), left_out.max().item()]
ax.plot(ends, ends, color="0.6", linewidth=1, label="equal")
ax.plot(left_out, found[chosen], "o", markersize=4)
ax.set(xlabel="change of the loss, trained anew", ylabel="predicted", title="Leaving out one datum")
ax.legend(frameon=False)
plt.show()
