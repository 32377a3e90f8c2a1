"""Losses and forms of outputs."""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn

from zoo.entries import CE, ZOO, Entry, Net, entry, free, net, sequences, shifted, tokens, vectors


def _mlp(*widths):
    layers = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def _small(name, loss, y=lambda: torch.randn(5, 2), outputs=2, **facts):
    """Register a net of two layers; its loss and targets are what matters."""
    ZOO[name] = Entry(lambda: (_mlp(6, 4, outputs), torch.randn(5, 6), y(), loss), **facts)


def _reduced(reduction):
    """Let a loss say what it is."""
    return lambda loss: (setattr(loss, "reduction", reduction), loss)[1]


@_reduced("mean")
def _gaussian(z, y):
    return (0.5 * (z - y).square() * torch.tensor([1.0, 4.0])).sum(1).mean()


@_reduced("mean")
def _mixture(z, y):
    """The negative log-likelihood of a mixture of Gaussians is not convex in the network's output."""
    logits, means, scales = z.chunk(3, 1)
    log = -0.5 * ((y - means) / scales.exp()).square() - scales - 0.5 * math.log(2 * math.pi)
    return -torch.logsumexp(logits.log_softmax(1) + log, 1).mean()


@_reduced("sum")
def _evidence(z, y):
    """It couples all outputs of a datum."""
    return (torch.logsumexp(z.flatten(1), 1) - z.flatten(1).gather(1, y[:, None])[:, 0]).sum()


@_reduced("sum")
def _flattened(z, y):
    return F.cross_entropy(z, y.flatten(), reduction="sum")


_small("squared_error_summed", nn.MSELoss(reduction="sum"), class_axis=-1)
_small("huber", nn.HuberLoss(delta=0.5), class_axis=-1)
_small("smooth_l1", nn.SmoothL1Loss(beta=0.7), class_axis=-1)
_small("poisson_counts", nn.PoissonNLLLoss(), lambda: torch.randint(4, (5, 2)).double(), class_axis=-1)
_small("gaussian_with_fixed_variance", _gaussian, class_axis=-1)
_small("soft_labels", nn.CrossEntropyLoss(label_smoothing=0.1), lambda: torch.rand(5, 3).softmax(1), 3)
_small("summed_cross_entropy", nn.CrossEntropyLoss(reduction="sum"), lambda: torch.randint(3, (5,)), 3)
_small("mixture_density", _mixture, lambda: torch.randn(5, 1), 6, convex=False, class_axis=None)
_bits = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([2.0, 0.5, 1.0]), weight=torch.tensor([1.0, 0.3, 2.0]))
_small("many_labels", _bits, lambda: torch.randint(2, (5, 3)).double(), 3, class_axis=-1)


@entry(class_axis=-1)
def squared_error_of_sequences():
    return _mlp(6, 4, 2), torch.randn(3, 4, 6), torch.randn(3, 4, 2), nn.MSELoss()


@entry()
def log_softmax_and_nll():
    return nn.Sequential(_mlp(6, 4, 3), nn.LogSoftmax(1)), *vectors(), nn.NLLLoss()


@entry(class_axis=-1)
def probabilities():
    y = torch.randint(2, (5, 2)).double()
    return nn.Sequential(_mlp(6, 4, 2), nn.Sigmoid()), torch.randn(5, 6), y, nn.BCELoss()


@entry(class_axis=None)
def evidence_of_a_set():
    return _mlp(6, 4, 2), torch.randn(3, 4, 6), torch.randint(8, (3,)), _evidence


@entry()
def flattened_tokens():
    X, y = shifted(3, 5, 9)
    y[:, -1] = -100
    model = Net(lambda m, x: m.head(m.embed(x).tanh()).flatten(0, 1), embed=nn.Embedding(9, 4), head=nn.Linear(4, 9))
    return model, X, y, _flattened


@net(lambda: (torch.randn(5, 6), torch.randn(5)), nn.MSELoss(), class_axis=-1, a=nn.Linear(6, 4), v=free(4), b=free())
def value_of_one_axis(m, x):
    return (m.a(x).tanh() @ m.v).squeeze(-1) + m.b


@entry(dtype=torch.float32)
def single_precision_attention():
    layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
    return Net(lambda m, x: m.o(m.e(x)[:, 0]), e=layer, o=nn.Linear(6, 3)), *sequences(), CE


@net(lambda: (torch.randn(5, 1), torch.randn(5, 2)), nn.MSELoss(), class_axis=-1, net=_mlp(1, 5, 1))
def physics_informed(m, x):
    """The residual of a differential equation: the output holds a derivative in the input."""

    def u(t):
        return m.net(t[None])[0, 0]

    slope = torch.func.vmap(torch.func.grad(u))(x)
    return torch.cat([slope + m.net(x), m.net(x)], 1)


@net(lambda: (torch.randn(4, 6), torch.randn(4, 2, 2)), nn.MSELoss(), class_axis=-1, net=_mlp(6, 4, 4))
def regression_of_matrices(m, x):
    L = m.net(x).view(-1, 2, 2).tril()
    return L @ L.mT + torch.eye(2)


@net(lambda: tokens(2, 1), embed=nn.Embedding(9, 4), head=nn.Linear(4, 3))
def batch_of_one_position(m, x):
    return m.head(m.embed(x)[:, -1])
