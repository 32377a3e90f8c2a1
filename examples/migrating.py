"""
Coming from curvlinops, PyHessian or BackPACK
=============================================

The same numbers, call by call.
"""

# %%
# One problem
# -----------
# The pages :doc:`../migrating` and :doc:`../howto` list each call of these libraries, of hessian-eigenthings and of
# nngeometry. Here are those that most scripts consist of, each beside what PyTorch alone gives.

import matplotlib.pyplot as plt
import torch
from torch import nn

import curvops
import curvops.compat  # from here on `import curvlinops` means curvops
import curvops.plots

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
loss_function = nn.CrossEntropyLoss()
data = [(torch.randn(20, 4).double(), torch.randint(3, (20,))) for _ in range(3)]
params = dict(model.named_parameters())
X, y = (torch.cat(part) for part in zip(*data, strict=True))


def by_pytorch(flat: torch.Tensor) -> torch.Tensor:
    """The loss as a function of the flat parameters."""
    parts = flat.split([p.numel() for p in params.values()])
    named = {name: part.view_as(p) for (name, p), part in zip(params.items(), parts, strict=True)}
    return loss_function(torch.func.functional_call(model, named, (X,)), y)


flat = torch.cat([p.detach().flatten() for p in params.values()])
true_hessian = torch.autograd.functional.hessian(by_pytorch, flat)
eigenvalues = torch.linalg.eigvalsh(true_hessian)

# %%
# curvlinops
# ----------
# A script for curvlinops runs as it is after ``import curvops.compat``: parameters as a list, its names, its options.
from curvlinops import GGNLinearOperator, HessianLinearOperator, KFACLinearOperator  # noqa: E402 — means curvops

theirs = HessianLinearOperator(model, loss_function, [p for p in model.parameters() if p.requires_grad], data)
v = torch.ones(theirs.shape[1], dtype=torch.float64)
torch.testing.assert_close(theirs @ v, true_hessian @ v)
print("H v, first entries:", *(f"{value:.6f}" for value in (theirs @ v)[:3].tolist()))
print("   by PyTorch only:", *(f"{value:.6f}" for value in (true_hessian @ v)[:3].tolist()))

ggn = GGNLinearOperator(model, loss_function, params, data)
kfac = KFACLinearOperator(model, loss_function, params, data, fisher_type="type-2", separate_weight_and_bias=False)
print(ggn, kfac, sep="\n")

# %%
# New code needs no translation: ``from curvops import …``, with the parameters as a dict.
hessian = curvops.HessianLinearOperator(model, loss_function, params, data)
torch.testing.assert_close(hessian @ v, theirs @ v)

# %%
# PyHessian
# ---------
# ``hessian(model, criterion, dataloader=…)`` has ``eigenvalues``, ``trace`` and ``density``. So does every operator
# here, of the whole data, with residuals and standard errors.
values, vectors = hessian.eigenpairs(2)
print("two largest eigenvalues:", *(f"{value:.6f}" for value in values.tolist()))
print("        by PyTorch only:", *(f"{value:.6f}" for value in eigenvalues[-2:].tolist()))
torch.testing.assert_close(values, eigenvalues[-2:])
trace = hessian.trace(num_products=30)
print(trace, "by PyTorch only", f"{true_hessian.trace().item():.6f}")
assert abs(float(trace) - true_hessian.trace().item()) < 4 * float(trace.standard_error)
density = hessian.spectral_density(depth=20, num_vectors=4)
curvops.plots.plot_spectral_density(density)
plt.show()

# %%
# BackPACK
# --------
# No module is extended and no attribute is left on a parameter: an operator's diagonal and its blocks are asked for.
# The exact diagonal of the GGN is ``DiagGGNExact``; the rows of the matrix, computed by hand, say the same.
diagonal = curvops.GGNDiagonalLinearOperator(model, loss_function, params, data).diagonal()
J = torch.func.jacrev(
    lambda p: torch.func.functional_call(model, dict(zip(params, p, strict=True)), (X,)), chunk_size=None
)(tuple(p.detach() for p in params.values()))
rows = torch.cat([part.flatten(2) for part in J], 2)  # [N, C, D]
p = model(X).detach().softmax(1)
output_hessian = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
by_hand = torch.einsum("ncd,nck,nkd->d", rows, output_hessian, rows) / len(X)
torch.testing.assert_close(torch.as_tensor(diagonal), by_hand)
print("diagonal of the GGN:", *(f"{value:.6f}" for value in diagonal[:3].tolist()))
print("            by hand:", *(f"{value:.6f}" for value in by_hand[:3].tolist()))

# %%
# ``KFAC`` and ``KFLR``, then ``p.kfac``, are operators with their factors in ``blocks``.
left, right = (side[0] for side in (kfac.blocks[0].block.left, kfac.blocks[0].block.right))
print("factors of the first layer:", tuple(left.shape), tuple(right.shape))
