"""
The class structure of the GGN's outliers
=========================================

Its C − 1 largest eigenpairs are, nearly, those of the class means.
"""

# %%
# Why there are C − 1 outliers
# ----------------------------
# The spectrum of a trained classifier has about as many large eigenvalues as classes, far from the rest. Papyan 2020
# (`arXiv 2008.11865 <https://arxiv.org/abs/2008.11865>`_) explains them: the GGN of the mean cross-entropy is
# Σ_n Σ_c' p_nc' δ_nc' δ_nc'ᵀ / N, with the gradient δ_nc' = J_nᵀ (e_c' − p_n) of −ℓ_n if the label were c'. Averaged
# within a class, these gradients have C − 1 large directions, which hold most of the matrix.

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from curvops import GGNLinearOperator, JacobianLinearOperator
from curvops.tour import digits


# %%
# The means, without any datum's gradient
# ---------------------------------------
def class_gradients(jacobian: JacobianLinearOperator, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean logit gradients δ_{c,c'} by class and cross-class, and their weights (Papyan 2020, arXiv 2008.11865, § 3).

    The GGN of the mean cross-entropy is Σ_n Σ_c' p_nc' δ_nc' δ_nc'ᵀ / N, with the gradient δ_nc' = J_nᵀ (e_c' − p_n) of
    −ℓ_n if the label were c'. For the data n of class c, δ_{c,c'} is the mean of δ_nc' with the weights p_nc'.

    Args:
        jacobian: Of the logits of all data, ``[N C, D]``.
        logits: ``[N, C]``.
        labels: ``[N]``.

    Returns:
        The means ``[D, C, C]``, and the weights ``[C, C]``, which sum to 1. No datum's gradient is formed: a walk over
        the data with C² columns is all that it takes.
    """
    p, (size, classes) = logits.softmax(1), logits.shape
    own = nn.functional.one_hot(labels, classes).to(p)
    weights = own.T @ p / size
    residuals = torch.eye(classes).to(p) - p.unsqueeze(1)  # [N, C', C]: e_c' − p_n
    shares = own.unsqueeze(2) * p.unsqueeze(1) / size  # [N, C, C']
    columns = torch.einsum("nab,nbk->nkab", shares, residuals).reshape(size * classes, classes**2)
    sums = (jacobian.T @ columns).reshape(-1, classes, classes)
    return sums / weights.clamp(min=torch.finfo(p.dtype).tiny), weights


# %%
# A trained network
# -----------------
_, setup = digits(epochs=3, num_data=100, dtype=torch.float64)
X, labels = (torch.cat(part) for part in zip(*setup.data, strict=True))
with torch.no_grad():
    logits = setup.model(X)
classes = logits.shape[1]
jacobian = JacobianLinearOperator(setup.model, setup.params, [(X, None)])
means, weights = class_gradients(jacobian, logits, labels)
factor = (means * weights.sqrt()).flatten(1)

# %%
# The decomposition holds
# -----------------------
# Dense: the GGN is that of the means plus the covariances of the logit gradients around them
G, rows = GGNLinearOperator.of(setup.risk()).to_dense(), jacobian.to_dense().reshape(len(X), classes, -1)
within = torch.zeros_like(G)
for n, label in enumerate(labels.tolist()):
    p = logits[n].softmax(0)
    deviations = rows[n] - p @ rows[n] - means[:, label].T
    within += (deviations.T * p) @ deviations / len(X)
torch.testing.assert_close(factor @ factor.T + within, G, rtol=1e-9, atol=1e-12)
print("the GGN is that of the class means plus the covariances around them, to rounding")

# %%
# Outliers, beside the class means
# --------------------------------
outliers = classes - 1
found = GGNLinearOperator.of(setup.risk()).eigenpairs(classes + 2)
vectors, roots, _ = torch.linalg.svd(factor, full_matrices=False)
values, of_means = found.values.flip(0), roots.square()[: classes + 2]
print("    GGN  class means")
for k in range(classes + 2):
    print(
        f"{values[k].item():7.3f}  {of_means[k].item():7.3f}" + ("  <- C − 1 outliers end" if k == outliers - 1 else "")
    )
overlap = (vectors[:, :outliers].T @ found.vectors.flip(1)[:, :outliers]).square().sum().item() / outliers
print(f"the C − 1 first eigenvectors of both span the same space to {overlap:.1%}")
assert overlap > 0.98 and (of_means[:outliers] > 0.85 * values[:outliers]).all()
assert of_means[outliers] < 0.5 * of_means[outliers - 1]

# %%
figure, ax = plt.subplots(figsize=(4.5, 3), layout="constrained")
ax.axvline(outliers + 0.5, color="0.7", linewidth=1)
ax.plot(range(1, classes + 3), values, "o", label="GGN")
ax.plot(range(1, classes + 3), of_means, "x", label="class means")
ax.set(xlabel="eigenvalue, from the largest", yscale="log", title="C − 1 outliers")
ax.legend(frameon=False)
plt.show()
