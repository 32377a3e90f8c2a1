"""KFAC and EKFAC of a whole pretrained transformer, and what they say about its doubts."""

# %%
# A language model that has read a lot, and a small question
# ----------------------------------------------------------
# MiniLM turns a sentence into 384 numbers. We put a linear layer on top and let it tell four topics
# apart. All 22 million parameters get their curvature, embeddings and norms included, and with the
# curvature comes a Gaussian over the weights (Laplace's approximation), and with that an answer to
# a question that the softmax cannot answer: has the model seen anything like this before?
#
# `make minilm` runs this file in an environment of its own, which holds the model's weights.

import math
import time

import torch
from minilm import LEARN, Classifier, encode, sentences, topics
from torch import Tensor, nn
from torch.func import functional_call, jvp

from curvops import EKFACLinearOperator, KFACLinearOperator
from curvops.tour.meter import measured

torch.manual_seed(0)
started = time.perf_counter()

# %%
# Sentences
# ---------
# Sixteen sentences a topic to learn from, four a topic to be tested on, and some about none of the
# topics: the network must pick one of the four all the same.

TEST = {
    "cooking": """Simmer the lentils with cumin.|The oven must be hot before the pizza goes in.
        Grate some lemon peel over the pasta.|The pancakes stuck to the pan.""",
    "sport": """The sprinter false-started and was disqualified.|They defended a one-goal lead to the whistle.
        The referee showed no mercy.|She won gold on the balance beam.""",
    "astronomy": """The black hole swallows gas from its companion.|Its moons were seen by Galileo.
        The satellite mapped the oldest light in the universe.|Mercury has no atmosphere to speak of.""",
    "music": """The pianist missed a note in the sonata.|Turn up the amplifier, the guitar is too quiet.
        The opera ends with a duet.|A simple rhythm, clapped by hand.""",
}
STRANGE = """The tenant must pay the rent by the third of each month.|My password has expired again.
    The dentist filled two of my teeth.|Parliament votes on the budget on Thursday.
    The train to the coast is delayed by an hour.|He sold his shares before prices fell.
    The cat sleeps on the windowsill all day.|Please sign the form in triplicate.
    The river flooded the lower part of the town.|Her thesis is about medieval tax law.
    The plumber replaced a leaking pipe.|This glue does not hold on plastic.
    The judge adjourned the hearing.|We painted the fence green.
    Vaccines train the immune system.|The printer is out of paper."""


learn_text = [s for topic in topics for s in sentences(LEARN[topic])]
learn_y = torch.tensor([k for k, topic in enumerate(topics) for _ in sentences(LEARN[topic])])
test_text = [s for topic in topics for s in sentences(TEST[topic])]
test_y = torch.tensor([k for k, topic in enumerate(topics) for _ in sentences(TEST[topic])])
strange_text = sentences(STRANGE)
print(f"{len(learn_text)} sentences to learn from, {len(test_text)} to test, {len(strange_text)} about something else")

# %%
# The model
# ---------
# The tokenizer pads and gives a `BatchEncoding`; it goes into the operators as it is. We add the
# positions: where a model looks them up once for the whole batch, their embedding's rows belong to
# no datum, and it would have to be looked at one sentence at a time.

model = Classifier().eval()
loss = nn.CrossEntropyLoss()
X = encode(learn_text)
data = [(encode(learn_text[k : k + 16]), learn_y[k : k + 16]) for k in range(0, len(learn_text), 16)]
number = len(learn_y)

# %%
# The head learns for a moment
# ----------------------------
# The encoder stays as it came. How much the head's weights are held back, the precision of their
# prior, is chosen by Laplace's approximation of the evidence: the log-likelihood, minus what the
# prior takes, minus half the log-determinant of the posterior's precision N F + τ, over the prior's.
# `logdet` has that, dense matrix or not, and all dampings share one eigendecomposition.

with torch.no_grad():
    features = model.features(X)
head = {name: p for name, p in model.named_parameters() if name.startswith("head")}
size = sum(p.numel() for p in head.values())


def learn(precision: float) -> float:
    """Fit the head under a prior, and return the evidence."""
    optimizer = torch.optim.LBFGS(model.head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def held_back() -> Tensor:
        return precision / 2 * sum(p.square().sum() for p in model.head.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(model.head(features), learn_y) + held_back() / number
        value.backward()
        return value

    optimizer.step(closure)
    model.zero_grad(set_to_none=True)
    own = dict(model.head.named_parameters())
    curvature = EKFACLinearOperator(model.head, loss, own, [(features, learn_y)], fisher_type="type-2")
    with torch.no_grad():
        fit = -number * loss(model.head(features), learn_y) - held_back()
    # N F + τ = N (F + τ/N)
    logdet = curvature.logdet(damping=precision / number) + size * math.log(number / precision)
    return float(fit - logdet / 2)


evidence = {precision: learn(precision) for precision in (1.0, 3.0, 10.0, 30.0, 100.0)}
HEAD = max(evidence, key=evidence.__getitem__)
print("evidence: " + ", ".join(f"{value:.1f} at τ = {precision:g}" for precision, value in evidence.items()))
learn(HEAD)

# %%
# The curvature of everything
# ---------------------------
# `type-2` takes all four columns of the loss' Hessian, so that nothing is sampled. `explain` has a
# row for each block; we print some.

params = dict(model.named_parameters())
print(f"{sum(p.numel() for p in params.values()):,} parameters in {len(params)} tensors")
operators = {}
for kind in (KFACLinearOperator, EKFACLinearOperator):
    with measured(torch.device("cpu")) as cost:
        operator = kind(model, loss, params, data, fisher_type="type-2", check_deterministic=False)
        trace = operator.trace()
    peak = f"{cost.peak_bytes / 2**30:.2f} GiB" if cost.peak_bytes else "unknown"
    print(f"{operator.name}: {cost.seconds / 60:.1f} minutes, peak memory {peak}, trace {trace:.4f}")
    operators[kind] = operator
account = operators[EKFACLinearOperator].explain()
wanted = ("embeddings", "layer.0.attention.self.query", "layer.0.intermediate", "head")
for row in account.rows:
    if any(part in name for part in wanted for name in row.names):
        names = ", ".join(row.names).removeprefix("encoder.")
        print(f"  {names:<48} {row.block:<28} {row.operation:<10} {row.memory / 2**20:7.1f} MiB  {row.why}")
print(f"  {len(account.rows)} blocks, {account.memory / 2**20:,.0f} MiB; {account.notes[0]}")

# %%
# Two predictives
# ---------------
# The posterior over weights is N(θ*, (N F + τ)⁻¹), with F the curvature of the mean loss over N
# sentences and τ the prior's precision; that is (F + τ/N)⁻¹ / N, so `sample` gets the damping τ/N. It may
# differ from parameter to parameter: the encoder's weights are believed to be within 0.01 of where they
# came from. The logits are taken to be linear in the weights (which is what the Gauss-Newton curvature
# assumes): a sample δ moves them by J δ, one forward derivative.

ENCODER, SAMPLES = 1e4, 20
asked = encode(test_text + strange_text)


def moved_logits(operator, weights: dict[str, Tensor]) -> Tensor:
    """Logits under samples of the posterior, `[samples, sentences, topics]`."""
    generator = torch.Generator().manual_seed(1)
    damping = {name: (HEAD if name in head else ENCODER) / number for name in weights}
    point = {name: p.detach() for name, p in weights.items()}
    found = []
    for _ in range(SAMPLES // 5):
        columns = operator.sample(5, damping=damping, generator=generator) / number**0.5
        for column in columns.unbind(1):
            parts = column.split([p.numel() for p in weights.values()])
            step = {name: part.view_as(weights[name]) for name, part in zip(weights, parts, strict=True)}
            logits, change = jvp(lambda some: functional_call(model, some, (asked,)), (point,), (step,))
            found.append((logits + change).detach())
    return torch.stack(found)


def report(title: str, logits: Tensor) -> None:
    """Print accuracy and calibration on the topics, and how well entropy tells strangers apart."""
    predicted, strangers = logits.softmax(-1).mean(0).split([len(test_text), len(strange_text)])
    accuracy = (predicted.argmax(-1) == test_y).float().mean()
    nll = nn.functional.nll_loss(predicted.log(), test_y)
    entropies = [-(p * p.clamp(min=1e-12).log()).sum(-1) for p in (predicted, strangers)]
    above = (entropies[1].unsqueeze(1) > entropies[0]).float().mean()
    print(
        f"{title:<24}{accuracy:>9.0%}{nll:>8.3f}{entropies[0].mean():>13.3f}{entropies[1].mean():>13.3f}"
        f"{above:>8.3f}{strangers.amax(-1).max():>11.0%}"
    )


print(f"\n{'':<24}{'accuracy':>9}{'nll':>8}{'entropy in':>13}{'entropy out':>13}{'AUROC':>8}{'surest out':>11}")
with torch.no_grad():
    report("point estimate", model(asked)[None])
last = EKFACLinearOperator(model, loss, head, data, fisher_type="type-2", check_deterministic=False)
for title, operator, weights in (
    ("last layer, EKFAC", last, head),
    ("all weights, KFAC", operators[KFACLinearOperator], params),
    ("all weights, EKFAC", operators[EKFACLinearOperator], params),
):
    report(title, moved_logits(operator, weights))

# %%
# How to read the table
# ---------------------
# The Gaussian is centred at the point estimate, so what changes is how sure the model is. "entropy" is
# the mean entropy of the predictive (0 is certain, 1.386 is a fair die with four sides) on the four
# topics and on sentences about something else, AUROC how often a stranger has more of it than a sentence
# that belongs, and the last column the highest probability that any stranger gets for a topic.
#
# The posterior takes confidence away where the data do not support it: strangers come close to the fair
# die. It has its price on the topics themselves, where 64 sentences leave much open about the 1,540 weights
# of a head: answers become more careful, and with few samples one or the other flips. The encoder adds
# little, since its prior is narrow.

print(f"\nfrom beginning to end: {(time.perf_counter() - started) / 60:.1f} minutes")
