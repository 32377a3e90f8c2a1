"""
A Laplace posterior of the last layer
=====================================

Its samples, its predictive variance, and the evidence that chooses the prior.
"""

# %%
# A Gaussian around what was learned
# ----------------------------------
# Training finds one set of weights θ. Laplace's approximation puts a Gaussian around it whose precision is the
# curvature of the negative log-posterior: N(θ, (F + τI)⁻¹), with F the curvature of −log p(y | θ), summed over the
# data, and τ the precision of the prior (MacKay 1992). Here F is the KFAC of the last layer. For squared error and a
# linear last layer it is exact, so that every number has a closed form beside it.

import math

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from curvops import JacobianLinearOperator, KFACLinearOperator, LinearOperator

NOISE = 0.1  # standard deviation of the targets


# %%
# Curvature and evidence
# ----------------------
# A Kronecker operator has a log-determinant, for any number of dampings from one eigendecomposition, and the evidence
# is differentiable in τ. Scaling the operator by 1 / (2σ²) turns the curvature of a squared error into that of a
# Gaussian's negative log-likelihood.
def fisher(model: nn.Module, params: dict[str, Tensor], X: Tensor, y: Tensor) -> LinearOperator:
    """N·F, the KFAC of −log p(y | θ) summed over the data, for Gaussian noise; exact for a last layer."""
    squares = nn.MSELoss(reduction="sum")
    kfac = KFACLinearOperator(model, squares, params, [(X, y)], fisher_type="type-2", separate_weight_and_bias=False)
    return kfac / (2 * NOISE**2)


def log_evidence(F: LinearOperator, log_likelihood: Tensor, square: Tensor, tau: Tensor) -> Tensor:
    """Laplace's log p(y) for the prior N(0, I/τ): log p(y | θ) − τ‖θ‖²/2 + (D log τ − log det(F + τI)) / 2.

    Args:
        F: Curvature of −log p(y | θ) at the maximum of the posterior, summed over the data.
        log_likelihood: log p(y | θ) there.
        square: ‖θ‖² there.
        tau: τ, in which the result is differentiable.
    """
    return log_likelihood - tau * square / 2 + (F.shape[0] * tau.log() - F.logdet(tau)) / 2


# %%
# The prior that the data prefer
# ------------------------------
def tuned(model: nn.Module, params: dict[str, Tensor], X: Tensor, y: Tensor, steps: int = 150) -> tuple[Tensor, Tensor]:
    """The τ that maximizes the evidence, and its log-evidence (MacKay 1992): θ and τ in turn.

    θ is the mean of the posterior given τ, which for a last layer is one Newton step, by F's own inverse.

    Args:
        model: Trained; the parameters are left at the posterior's mean.
        params: Those of its last layer.
        X: Inputs ``[N, d]``.
        y: Targets ``[N, k]``.
        steps: Steps of Adam on log τ.
    """
    F = fisher(model, params, X, y)
    log_tau = torch.zeros((), dtype=y.dtype, requires_grad=True)
    optimizer = torch.optim.Adam([log_tau], lr=0.3)
    for _ in range(steps):
        tau = log_tau.exp()
        likelihood = torch.distributions.Normal(y, NOISE).log_prob(model(X)).sum()  # the gradient is taken at θ
        gradient = torch.autograd.grad(likelihood, list(params.values()))
        gradient = [g - tau.detach() * p for g, p in zip(gradient, params.values(), strict=True)]
        with torch.no_grad():
            for p, step in zip(params.values(), F.solve(gradient, tau.item()).x, strict=True):
                p += step
            likelihood = torch.distributions.Normal(y, NOISE).log_prob(model(X)).sum()
            square = sum(p.square().sum() for p in params.values())
        value = log_evidence(F, likelihood, square, tau)
        optimizer.zero_grad()
        (-value).backward()
        optimizer.step()
    return tau.detach(), value.detach()


# %%
# What the model does not know
# ----------------------------
def predictive_variance(F: LinearOperator, tau: float, jacobian: LinearOperator) -> Tensor:
    """Variance of the outputs under the posterior N(θ, (F + τI)⁻¹), linearized in θ: the diagonal of J (F + τI)⁻¹ Jᵀ."""
    rows = jacobian.to_dense()
    return (rows * F.solve(rows.T, tau).x.T).sum(1)


# %%
# A sine with a gap
# -----------------
# Thirty points on each side; a tanh network is fitted, and its last layer gets a posterior.
generator = torch.Generator().manual_seed(0)
X = torch.cat([torch.linspace(-1, -0.3, 30), torch.linspace(0.2, 1, 30)]).double().unsqueeze(1)
y = torch.sin(5 * X) + NOISE * torch.randn(X.shape, generator=generator, dtype=X.dtype)
with torch.random.fork_rng(devices=[]):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 30), nn.Tanh(), nn.Linear(30, 1)).double()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
for _ in range(300):
    optimizer.zero_grad()
    (model(X) - y).square().mean().backward()
    optimizer.step()

params = {f"2.{name}": p for name, p in model[2].named_parameters()}
tau, evidence = tuned(model, params, X, y)
F = fisher(model, params, X, y)

# %%
# The evidence, beside the closed form
# ------------------------------------
# The last layer is a linear regression on features, whose evidence and posterior have closed forms.
with torch.no_grad():
    features = torch.cat([model[:2](X), torch.ones_like(X)], 1)
noise = NOISE**2 * torch.eye(len(X), dtype=X.dtype)


def exact(tau: Tensor) -> Tensor:
    covariance = noise + features @ features.T / tau
    return torch.distributions.MultivariateNormal(torch.zeros(len(X)).double(), covariance).log_prob(y.squeeze())


torch.testing.assert_close(evidence, exact(tau), rtol=1e-9, atol=0)
assert exact(tau) >= max(exact(tau * factor) for factor in (0.9, 1.1))
print(f"τ = {tau.item():.3f} maximizes the log-evidence: {evidence.item():.6f}, in closed form {exact(tau).item():.6f}")

# %%
# The variance of a prediction, beside the exact posterior's
# ----------------------------------------------------------
# Far from the data and in the gap the model is less sure.
inputs = torch.linspace(-2, 2, 9).double().unsqueeze(1)
variance = predictive_variance(F, tau.item(), JacobianLinearOperator(model, params, [(inputs, None)]))
with torch.no_grad():
    new = torch.cat([model[:2](inputs), torch.ones_like(inputs)], 1)
posterior = torch.linalg.inv(features.T @ features / NOISE**2 + tau * torch.eye(31, dtype=features.dtype))
torch.testing.assert_close(variance, (new @ posterior * new).sum(1), rtol=1e-8, atol=0)
assert variance[0] > variance[3] and variance[-1] > variance[-4]  # the data end at ±1
print("    x  deviation  exact")
true = (new @ posterior * new).sum(1)
for x, found, right in zip(inputs.flatten().tolist(), variance.sqrt().tolist(), true.sqrt().tolist(), strict=True):
    print(f"{x:+.1f}     {found:.4f}  {right:.4f}")

# %%
# Samples
# -------
# Columns around the posterior's mean. Their spread is the variance, up to chance.
samples = F.sample(4000, tau.item(), generator)  # columns around the posterior's mean
spread = (new @ samples).square().mean(1)
error = ((spread / variance - 1) / math.sqrt(2 / 4000)).abs().max().item()
print(f"variance of 4000 samples: at most {error:.1f} standard errors from it")
assert error < 4

# %%
figure, ax = plt.subplots(figsize=(5, 3.2), layout="constrained")
grid = torch.linspace(-2, 2, 81).double().unsqueeze(1)
with torch.no_grad():
    middle = model(grid).flatten()
    basis = torch.cat([model[:2](grid), torch.ones_like(grid)], 1)
deviation = predictive_variance(F, tau.item(), JacobianLinearOperator(model, params, [(grid, None)])).sqrt()
ax.fill_between(grid.flatten(), middle - 2 * deviation, middle + 2 * deviation, alpha=0.2, label="± 2 deviations")
ax.plot(grid, middle.unsqueeze(1) + basis @ samples[:, :8], color="0.6", linewidth=0.6)
ax.plot(grid, middle, label="mean")
ax.plot(X, y, "k.", markersize=3, label="data")
ax.set(xlabel="input", ylabel="output", ylim=(-3, 3), title="Posterior of the last layer, with eight samples")
ax.legend(frameon=False, loc="upper center", ncols=3)
plt.show()
