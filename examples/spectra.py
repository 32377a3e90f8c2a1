"""
The spectrum of a trained network
=================================

Both ends, the density in between, and what the loss does along eigenvectors.
"""

# %%
# A small network, trained for a moment
# -------------------------------------
# A CNN with 830 parameters on scikit-learn's handwritten digits. It is small enough for its whole Hessian, so that
# each number below can stand beside the true one; nothing of the recipe needs that matrix.

import matplotlib.pyplot as plt
import torch

from curvops import HessianLinearOperator
from curvops.plots import (
    plot_convergence,
    plot_eigenvectors_by_layer,
    plot_loss_along,
    plot_loss_plane,
    plot_spectral_density,
)
from curvops.spectrum import EigenPairs, SpectralDensity
from curvops.tour import digits

_, setup = digits(epochs=3, num_data=100, dtype=torch.float64)
print(setup)
hessian = HessianLinearOperator.of(setup.risk())
exact = torch.linalg.eigvalsh(hessian.to_dense())


# %%
# The recipe
# ----------
# Ten classes have nine outliers, C − 1. They are found first and taken out of the density, so that its quadrature
# spends its nodes on the bulk.
def spectrum(hessian: HessianLinearOperator, ends: int, starts: int = 4) -> tuple[EigenPairs, SpectralDensity]:
    """Eigenpairs at both ends, and the density with those at the upper end taken out as outliers.

    Args:
        hessian: Of a trained network; its batches' graphs are kept in the meantime.
        ends: Eigenpairs at each end; C − 1 for C classes holds the outliers at the upper one.
        starts: Start vectors of the density. More of them make its error band narrower.
    """
    with hessian.linearized():
        pairs = hessian.eigenpairs(ends, "both")
        upper = hessian.eigenpairs(ends, start=pairs)
        return pairs, hessian.spectral_density(deflate=upper, num_vectors=starts, depth=40)


ends = 9
pairs, density = spectrum(hessian, ends)
print(f"{pairs.products} products for {ends} eigenpairs at each end, {density.products} for the density")

# %%
# Both ends, beside the truth
# ---------------------------
print("largest, found ", *(f"{value:7.3f}" for value in pairs.values[ends:].flip(0).tolist()))
print("         exact ", *(f"{value:7.3f}" for value in exact[-ends:].flip(0).tolist()))
print("least, found   ", *(f"{value:7.3f}" for value in pairs.values[:ends].tolist()))
print("       exact   ", *(f"{value:7.3f}" for value in exact[:ends].tolist()))
true_ends = torch.cat([exact[:ends], exact[-ends:]])
torch.testing.assert_close(pairs.values, true_ends, rtol=0, atol=1e-10 * exact[-1].item())

# %%
# The density, beside the truth
# -----------------------------
# The share's error is the standard error, from the start vectors, plus what the quadrature's nodes do not resolve. The
# curve's band is of the start vectors only.
points = torch.tensor([-0.1, 0.1, 1.0])
_, found, errors = density.cumulative(points)
true = (exact <= points.unsqueeze(1)).double().mean(1)
for point, part, error, right in zip(points.tolist(), found.tolist(), errors.tolist(), true.tolist(), strict=True):
    print(f"eigenvalues up to {point:5.2f}: {part:.3f} ± {error:.3f}, in truth {right:.3f}")
assert ((found - true).abs() < 4 * errors + 0.005).all()  # a node of the quadrature stands for several eigenvalues

plot_spectral_density(density)
plt.show()

# %%
# The trace, from few products
# ----------------------------
traces = [hessian.trace(num_products=m) for m in (6, 12, 24, 48)]
print(traces[-1], "in truth", f"{exact.sum().item():.4f}")
assert abs(float(traces[-1]) - exact.sum().item()) < 4 * float(traces[-1].standard_error)
plot_convergence(traces, exact.sum())
plt.show()

# %%
# Where the eigenvectors live
# ---------------------------
# The share of each layer in an eigenvector's squared length.
plot_eigenvectors_by_layer(pairs)
plt.show()

# %%
# What the loss does along them
# -----------------------------
# Along the first eigenvector the loss bends as its eigenvalue says, near the middle; farther out it does not know.
first, second = pairs.vectors[:, -1], pairs.vectors[:, -2]
plot_loss_along(hessian, first, steps=torch.linspace(-1, 1, 21))
plt.show()

# %%
plot_loss_plane(hessian, first, second, steps=torch.linspace(-1, 1, 9))
plt.show()
