"""The curvature of a whole pretrained transformer, seen from afar: its blocks, and not its entries."""

# %%
# Too large to be drawn
# ---------------------
# MiniLM has 22 million parameters, so that a curvature matrix of it has 500 trillion entries. What can be
# seen of it are its blocks: how strongly the parameters of one layer are coupled to those of another, as the
# Frobenius norm of the matrix between them. A product with a random vector that is zero outside of one layer
# tells the norms of all blocks in that layer's columns, so a few products for each layer are enough for a
# picture, and the same products give each layer's trace.
#
# `make minilm` runs this file in an environment of its own, which holds the model's weights.

import sys
import time
from functools import reduce
from pathlib import Path

import matplotlib
import torch
from minilm import LEARN, Classifier, encode, sentences, topics
from torch import nn

from curvops import EmpiricalRisk, GGNLinearOperator
from curvops.tour import Effort, coarse_tour, plot_blocks, plot_spectra, save_figure
from curvops.tour.groups import module_groups

matplotlib.use("agg")
torch.manual_seed(0)
folder = Path(sys.argv[1] if len(sys.argv) > 1 else "tour/minilm")
folder.mkdir(parents=True, exist_ok=True)
started = time.perf_counter()

# %%
# Sentences of four topics
# ------------------------

BATCH = 16
chosen = [(text, k) for k, topic in enumerate(topics) for text in sentences(LEARN[topic])[:8]]
chosen = chosen[::2] + chosen[1::2]  # all topics in each batch

# %%
# The model, and a head that learns for a moment
# ----------------------------------------------

model, loss = Classifier().eval(), nn.CrossEntropyLoss()
batches = [chosen[k : k + BATCH] for k in range(0, len(chosen), BATCH)]
data = [(encode([text for text, _ in batch]), torch.tensor([topic for _, topic in batch])) for batch in batches]
with torch.no_grad():
    seen = [(model.features(X), y) for X, y in data]
optimizer = torch.optim.Adam(model.head.parameters(), lr=3e-3)
for _ in range(8):
    optimizer.zero_grad()
    (sum(loss(model.head(features), y) for features, y in seen) / len(seen)).backward()
    optimizer.step()
model.zero_grad(set_to_none=True)

# %%
# The coarse tour
# ---------------
# Groups are the model's modules down to the parts of an encoder layer: attention, and the two halves of the
# perceptron. Each finished part is written to the file, and a second call goes on with what is there.

params = dict(model.named_parameters())
parts = module_groups({name: p.shape for name, p in params.items()}, depth=5)
short = {"encoder.embeddings.": "", "encoder.encoder.layer.": "", "_embeddings": "", "position": "place"}
groups = {reduce(lambda name, pair: name.replace(*pair), short.items(), name): size for name, size in parts.items()}
risk = EmpiricalRisk(model, loss, params, data)
print(f"{risk.space.dim:,} parameters, {len(chosen)} sentences, risk {risk.value():.3f}")
effort = Effort(block_products=4, eigenvalues=4, eigen_products=30, density_depth=16, density_vectors=2)
coarse = coarse_tour(
    risk,
    folder / "coarse.safetensors",
    groups=groups,
    effort=effort,
    memory_budget=6 * 2**30,
    settings={"setup": "MiniLM with a head on sentences of four topics"},
    say=lambda line: print(f"{(time.perf_counter() - started) / 60:6.1f} min  {line}", flush=True),
)
seconds, processor = time.perf_counter() - started, time.process_time()
print(f"{seconds / 60:.1f} minutes, {processor / 60:.1f} of one processor; memory is above the model's")
for title, own in coarse.costs.items():
    peak = "unknown" if own.peak_bytes is None else f"{own.peak_bytes / 2**30:.2f} GiB"
    print(f"  {title:<26} {own.seconds / 60:6.1f} min, {coarse.products[title]:4d} products, peak {peak}")

# %%
# What there is to see
# --------------------
# The curvature is spread over the whole model: a fine-tuning that moved one layer only would meet it from the
# others' blocks as well, which KFAC and EKFAC leave out (they are exactly zero there).

for name, (fig, _) in {"blocks": plot_blocks(coarse), "spectra": plot_spectra(coarse)}.items():
    for suffix in ("pdf", "png"):
        print(save_figure(fig, folder / f"coarse_{name}.{suffix}"))

# %%
# A closer look at one block
# --------------------------
# Entries of any block are there on demand: rows and columns of an operator by name. Here those of the head,
# whose norm was estimated above.

title = "Generalized Gauss-Newton"
exact = GGNLinearOperator.of(risk)["head.*"].to_dense().norm()
where = list(coarse.groups).index("head")
estimate, error = (float(found[title][where, where]) for found in (coarse.norms, coarse.errors))
print(f"the block of the head: its norm is {exact:.3f}, the estimate was {estimate:.3f} ± {error:.3f}")
