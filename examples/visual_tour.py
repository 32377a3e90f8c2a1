"""
The visual tour
===============

Six ways to look at the curvature of one small network, from the setup to the figure.
"""

# %%
# What is drawn here
# ------------------
# Training a network means walking down a landscape, the empirical risk as a function of all
# parameters. How the landscape bends around the place where we stand is told by a square matrix
# with a row and a column for each parameter. For large networks nobody can store that matrix, and
# the operators of this library multiply with it instead. For a small one we can, and looking at it
# tells at a glance what the common approximations keep and what they throw away.

from pathlib import Path

import torch

from curvops import (
    EFLinearOperator,
    EKFACLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    KFACLinearOperator,
)
from curvops.tour import log_abs, plot_matrices, save_figure, tutorial, unchanged

# %%
# A network and something to learn
# --------------------------------
# `tutorial` makes fifty random images with random labels and a convolutional network for them.
# Everything that it contains is ordinary PyTorch; your own model, loss and batches work the same.
# The parameters are handed over as a dict, and their order is the order of rows and columns.

setup = tutorial()
print(setup)
model, loss, data = setup.model, setup.loss, setup.data
params = {name: p for name, p in model.named_parameters() if p.requires_grad}

# %%
# The reference: all second derivatives
# -------------------------------------
# The Hessian is the whole truth about the landscape to second order. As an operator it costs about
# as much as a few gradients per product and stores nothing; a vector may come as one long tensor,
# as a list with one tensor per parameter, or as a dict, and the answer has the same form.

hessian = HessianLinearOperator(model, loss, params, data)
direction = {name: torch.ones_like(p) for name, p in params.items()}
bend = hessian @ direction
assert list(bend) == list(params)
print(f"{hessian.shape[0]} parameters; the risk bends by {sum(b.sum() for b in bend.values()):.3f} along the ones")

# %%
# Linearize the network, keep the loss
# ------------------------------------
# The Hessian has two sources: the loss is curved, and so is the network. The generalized
# Gauss-Newton matrix drops the second one. What remains can not be negative, which optimizers like.
# For cross-entropy it is also the Fisher information of the network's own predictions.

ggn = GGNLinearOperator(model, loss, params, data)

# %%
# Replace an expectation by samples, or by the labels
# ---------------------------------------------------
# That Fisher information is an expectation over labels drawn from the predictions. One draw per
# image is cheap and right on average: the Monte-Carlo Fisher. The empirical Fisher takes the labels
# of the data set instead. It looks alike, but is not an estimate of anything the others compute.

fisher = GGNLinearOperator(model, loss, params, data, mc_samples=1)
empirical = EFLinearOperator(model, loss, params, data)

# %%
# Assume structure
# ----------------
# KFAC treats each layer on its own, and writes its block as a Kronecker product of two small
# matrices, one of the layer's inputs and one of the gradients at its output. EKFAC keeps the
# eigenvectors of that product and corrects the eigenvalues. Here both are built from the exact
# expectation (`"type-2"`), so that structure is all that sets them apart from the Gauss-Newton matrix.

structure = {"fisher_type": "type-2", "separate_weight_and_bias": False}
kfac = KFACLinearOperator(model, loss, params, data, **structure)
ekfac = EKFACLinearOperator(model, loss, params, data, **structure)

# %%
# From operators to matrices
# --------------------------
# `to_dense` uses what is known about the operator. Multiplying onto the identity gives the same.

operators = {
    "Hessian": hessian,
    "Generalized Gauss-Newton": ggn,
    "Empirical Fisher": empirical,
    "EKFAC": ekfac,
    "Monte-Carlo Fisher": fisher,
    "KFAC": kfac,
}
matrices = {title: operator.to_dense() for title, operator in operators.items()}
torch.testing.assert_close(kfac @ torch.eye(setup.num_params), matrices["KFAC"])

# %%
# Some of what we are about to see can be said in numbers first: how far is each from the Hessian and
# from the Gauss-Newton matrix, and how negative does it get?


def distance(matrix: torch.Tensor, other: torch.Tensor) -> float:
    """Relative distance in Frobenius norm."""
    return float((matrix - other).norm() / other.norm())


print(f"{'':<26}{'off Hessian':>12}{'off GGN':>10}{'smallest eigenvalue':>22}")
for title, matrix in matrices.items():
    smallest = float(torch.linalg.eigvalsh(matrix.double()).min())
    off_hessian, off_ggn = (distance(matrix, matrices[other]) for other in ("Hessian", "Generalized Gauss-Newton"))
    print(f"{title:<26}{off_hessian:>12.1%}{off_ggn:>10.1%}{smallest:>22.1e}")

# EKFAC keeps the trace of the Gauss-Newton matrix, and only the Hessian has negative curvature
torch.testing.assert_close(matrices["EKFAC"].trace(), matrices["Generalized Gauss-Newton"].trace())
assert torch.linalg.eigvalsh(matrices["Hessian"].double()).min() < -1e-3

# %%
# The figure
# ----------
# The entries span many orders of magnitude, so their logarithm is drawn; dark means large. Lines
# separate the layers. Between the early layers the Hessian has strong blocks of its own: that is
# the curvature of the network, which all the others leave out.

folder = Path("tour/example")
folder.mkdir(parents=True, exist_ok=True)
figure, _ = plot_matrices(matrices, groups=setup.groups, transform=log_abs)
print(save_figure(figure, folder / "curvature_matrices_log_abs.pdf"))

# %%
# Without the logarithm a few entries in the last layers take all the colour, even when the largest
# hundredth of them is cut off. What it does show is the sign.

figure, _ = plot_matrices(matrices, groups=setup.groups, transform=unchanged, clip=0.99)
print(save_figure(figure, folder / "curvature_matrices.pdf"))
