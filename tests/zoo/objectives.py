"""Losses and forms of outputs."""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn

from zoo.entries import CE, Net, entry, free, sequences, tokens, vectors


def _mlp(*widths):
    layers = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def _regression(*shape):
    return torch.randn(5, 6), torch.randn(*shape)


@entry(class_axis=-1)
def squared_error_of_sequences():
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
    return model, torch.randn(3, 4, 6), torch.randn(3, 4, 2), nn.MSELoss()


@entry(class_axis=-1)
def squared_error_summed():
    return _mlp(6, 4, 2), *_regression(5, 2), nn.MSELoss(reduction="sum")


@entry(class_axis=-1)
def huber():
    return _mlp(6, 4, 2), *_regression(5, 2), nn.HuberLoss(delta=0.5)


@entry(class_axis=-1)
def smooth_l1():
    return _mlp(6, 4, 2), *_regression(5, 2), nn.SmoothL1Loss(beta=0.7)


@entry(class_axis=-1)
def poisson_counts():
    return _mlp(6, 4, 2), torch.randn(5, 6), torch.randint(4, (5, 2)).double(), nn.PoissonNLLLoss()


@entry(class_axis=-1)
def gaussian_with_fixed_variance():
    def loss(z, y):
        return (0.5 * (z - y).square() * torch.tensor([1.0, 4.0])).sum(1).mean()

    loss.reduction = "mean"
    return _mlp(6, 4, 2), *_regression(5, 2), loss


@entry()
def soft_labels():
    return _mlp(6, 4, 3), torch.randn(5, 6), torch.rand(5, 3).softmax(1), nn.CrossEntropyLoss(label_smoothing=0.1)


@entry()
def summed_cross_entropy():
    return _mlp(6, 4, 3), *vectors(), nn.CrossEntropyLoss(reduction="sum")


@entry()
def log_softmax_and_nll():
    return nn.Sequential(_mlp(6, 4, 3), nn.LogSoftmax(1)), *vectors(), nn.NLLLoss()


@entry(class_axis=-1)
def many_labels():
    y = torch.randint(2, (5, 3)).double()
    loss = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([2.0, 0.5, 1.0]), weight=torch.tensor([1.0, 0.3, 2.0]))
    return _mlp(6, 4, 3), torch.randn(5, 6), y, loss


@entry(class_axis=-1)
def probabilities():
    return (
        nn.Sequential(_mlp(6, 4, 2), nn.Sigmoid()),
        torch.randn(5, 6),
        torch.randint(2, (5, 2)).double(),
        nn.BCELoss(),
    )


@entry(convex=False, class_axis=None)
def mixture_density():
    """The negative log-likelihood of a mixture of Gaussians is not convex in the network's output."""

    def loss(z, y):
        logits, means, scales = z.chunk(3, 1)
        log = -0.5 * ((y - means) / scales.exp()).square() - scales - 0.5 * math.log(2 * math.pi)
        return -torch.logsumexp(logits.log_softmax(1) + log, 1).mean()

    loss.reduction = "mean"
    return _mlp(6, 5, 6), torch.randn(5, 6), torch.randn(5, 1), loss


@entry(class_axis=None)
def evidence_of_a_set():
    """A loss that couples all outputs of a datum."""

    def loss(z, y):
        return (torch.logsumexp(z.flatten(1), 1) - z.flatten(1).gather(1, y[:, None])[:, 0]).sum()

    loss.reduction = "sum"
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
    return model, torch.randn(3, 4, 6), torch.randint(8, (3,)), loss


@entry()
def flattened_tokens():
    def run(m, x):
        return m.head(m.embed(x).tanh()).flatten(0, 1)

    X = torch.randint(9, (3, 5))
    y = X.roll(-1, 1)
    y[:, -1] = -100

    def loss(z, y):
        return F.cross_entropy(z, y.flatten(), reduction="sum")

    loss.reduction = "sum"
    return Net(run, embed=nn.Embedding(9, 4), head=nn.Linear(4, 9)), X, y, loss


@entry(class_axis=-1)
def value_of_one_axis():
    def run(m, x):
        return (m.a(x).tanh() @ m.v).squeeze(-1) + m.b

    return Net(run, a=nn.Linear(6, 4), v=free(4), b=free()), torch.randn(5, 6), torch.randn(5), nn.MSELoss()


@entry(dtype=torch.float32)
def single_precision():
    return nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 3)), *vectors(), CE


@entry(dtype=torch.float32)
def single_precision_attention():
    layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
    return Net(lambda m, x: m.o(m.e(x)[:, 0]), e=layer, o=nn.Linear(6, 3)), *sequences(), CE


@entry(class_axis=-1)
def physics_informed():
    """The residual of a differential equation: the output holds a derivative in the input."""

    def run(m, x):
        def u(t):
            return m.net(t[None])[0, 0]

        slope = torch.func.vmap(torch.func.grad(u))(x)
        return torch.cat([slope + m.net(x), m.net(x)], 1)

    return Net(run, net=_mlp(1, 5, 1)), torch.randn(5, 1), torch.randn(5, 2), nn.MSELoss()


@entry(class_axis=-1)
def regression_of_matrices():
    def run(m, x):
        L = m.net(x).view(-1, 2, 2).tril()
        return L @ L.mT + torch.eye(2)

    return Net(run, net=_mlp(6, 4, 4)), torch.randn(4, 6), torch.randn(4, 2, 2), nn.MSELoss()


@entry()
def two_heads_and_a_buffer():
    def run(m, x):
        h = m.body((x - m.mean) / 2)
        return m.one(h) + m.mask * m.two(h)

    parts = {"body": _mlp(6, 4), "one": nn.Linear(4, 3), "two": nn.Linear(4, 3)}
    return Net(run, **parts, mean=torch.randn(6), mask=torch.tensor([1.0, 0.0, 1.0])), *vectors(), CE


@entry()
def batch_of_one_position():
    def run(m, x):
        return m.head(m.embed(x)[:, -1])

    return Net(run, embed=nn.Embedding(9, 4), head=nn.Linear(4, 3)), *tokens(2, 1), CE
