"""
KFAC for a transformer
======================

Attention, norms and embeddings get their blocks too, and each block's error is a number.
"""

# %%
# A small transformer
# -------------------
# It reads ten symbols and says whether more of them are small than large. With one layer of width 8 it has 794
# parameters, few enough to put each approximation beside the true Gauss-Newton matrix. Nothing below needs that it is
# small but the comparison.

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from curvops import EKFACLinearOperator, GGNLinearOperator, KFACLinearOperator, KFOCLinearOperator, LinearOperator

WORDS, LENGTH, WIDTH = 12, 10, 8


class Classifier(nn.Module):
    """Does a sequence have more small symbols than large ones?"""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Parameter(torch.randn(LENGTH, WIDTH) / 10)
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, dropout=0.0, batch_first=True, activation="gelu")
        self.encoder, self.head = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(WIDTH, 2)

    def forward(self, X: Tensor) -> Tensor:
        return self.head(self.encoder(self.words(X) + self.places).mean(1))


torch.manual_seed(0)
X = torch.randint(WORDS, (64, LENGTH))
y = ((X < WORDS // 2).sum(1) > LENGTH // 2).long()
model, loss = Classifier().double(), nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
for _ in range(20):
    optimizer.zero_grad()
    value = loss(model(X), y)
    value.backward()
    optimizer.step()
optimizer.zero_grad()
model.eval()
params = dict(model.named_parameters())
print(f"{sum(p.numel() for p in params.values())} parameters, loss {value.item():.3f}")

# %%
# What would be done, before it is done
# -------------------------------------
# ``plan`` tells how each parameter will be treated and what that costs in memory. The packed weight of the attention is
# one linear map; norm scales and the free parameter of the places get a dense or a diagonal block, and none is left out.
problem = model, loss, params, [(X[:32], y[:32]), (X[32:], y[32:])]
print(KFACLinearOperator.plan(*problem, fisher_type="type-2"))

# %%
# Four approximations and the truth
# ---------------------------------
# ``expand`` treats the positions of a sequence as data of their own, ``reduce`` sums over them first (Eschenhagen et al.
# 2023, `arXiv 2311.00636 <https://arxiv.org/abs/2311.00636>`_); which of them is nearer depends on the model. KFOC is the
# Kronecker product that is nearest to each block, and EKFAC corrects the eigenvalues of KFAC.
ggn = GGNLinearOperator(*problem)
exact = ggn.to_dense()
operators: dict[str, LinearOperator] = {
    "KFAC expand": KFACLinearOperator.of(ggn.risk, fisher_type="type-2"),
    "KFAC reduce": KFACLinearOperator.of(ggn.risk, fisher_type="type-2", kfac_approx="reduce"),
    "EKFAC": EKFACLinearOperator.of(ggn.risk, fisher_type="type-2"),
    "KFOC": KFOCLinearOperator.of(ggn.risk, fisher_type="type-2"),
}
print(f"{'':<12}{'trace':>10}{'off the blocks':>16}")
print(f"{'GGN':<12}{exact.trace().item():>10.4f}")
blocks = [ggn.domain.slice(name) for name in params]
within = sum(exact[b, b].square().sum() for b in blocks).sqrt()
errors: dict[str, list[float]] = {}
for title, operator in operators.items():
    matrix = operator.to_dense()
    distances = [(matrix[b, b] - exact[b, b]).norm() for b in blocks]
    errors[title] = [(d / exact[b, b].norm()).item() for d, b in zip(distances, blocks, strict=True)]
    off = torch.stack(distances).norm() / within
    print(f"{title:<12}{matrix.trace().item():>10.4f}{off.item():>16.1%}")

# the exact expectation gives EKFAC the trace of the Gauss-Newton matrix, and KFOC is never farther from it than KFAC
torch.testing.assert_close(operators["EKFAC"].to_dense().trace(), exact.trace())
assert all(f <= k + 1e-9 for f, k in zip(errors["KFOC"], errors["KFAC expand"], strict=True))

# %%
# Which blocks it gets right
# --------------------------
# Relative errors, block by block. Norms are exact: their block is dense, from whole gradients of each datum. So is
# KFOC's of a bias; KFAC's is not, where several positions of one sequence share it.
figure, ax = plt.subplots(figsize=(6, 4.5), layout="constrained")
for title, marker in zip(errors, "ox+v", strict=True):
    ax.plot(errors[title], range(len(params)), marker, markersize=5, label=title)
ax.set_yticks(range(len(params)), params, fontsize=7)
ax.invert_yaxis()
ax.grid(axis="y", linewidth=0.4)
ax.set(xlabel="distance to the GGN's block, relative", xlim=(-0.02, None), title="Errors by parameter")
ax.legend(frameon=False, fontsize=8)
plt.show()

# %%
# From the factors to what one wants
# ----------------------------------
# Inverses, determinants and samples come from the factors, and scale to models whose matrix nobody can form:
# ``examples/minilm_laplace.py`` does the same with 22 million parameters (``make minilm``).
kfac = operators["KFAC expand"]
gradient = torch.cat([g.flatten() for g in ggn.risk.gradient()])
step = kfac.inverse(1e-2) @ gradient
shifted = kfac.to_dense() + 1e-2 * torch.eye(len(gradient), dtype=gradient.dtype)
dense = torch.linalg.solve(shifted, gradient)
torch.testing.assert_close(step, dense)
print(f"inverse: off the dense solve by {((step - dense).norm() / dense.norm()).item():.0e}")
logdet = torch.linalg.slogdet(shifted)[1]
torch.testing.assert_close(kfac.logdet(1e-2).as_subclass(torch.Tensor), logdet)
print(f"log-determinant: {kfac.logdet(1e-2).item():.6f}, of the dense matrix {logdet.item():.6f}")
