"""Recurrent networks, and models that apply a module several times."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from zoo.entries import CE, Net, entry, free, frees, linears, net, sequences, shifted, tokens, vectors


@net(
    sequences,
    gru=nn.GRU(6, 3, num_layers=2, bidirectional=True, batch_first=True),
    rnn=nn.RNN(6, 4, nonlinearity="relu", bias=False, batch_first=True, bidirectional=True),
    cell=nn.GRUCell(6, 4),
    **linears(head=(6, 3), last=(8, 4), leave=(4, 3)),
)
def recurrent_layers_and_cells(m, x):
    h = m.last(m.rnn(x)[0][:, -1])
    for step in x.unbind(1):
        h = m.cell(step, h)
    return m.head(m.gru(x)[0].mean(1)) + m.leave(h)


@net(sequences, lstm=nn.LSTM(6, 4, proj_size=2), h=free(1, 1, 2), c=free(1, 1, 4), head=nn.Linear(2, 3))
def lstm_with_projection(m, x):
    """Sequence first inside, and a state that is learned."""
    h = x.transpose(0, 1)
    state = (m.h.expand(-1, len(x), -1).contiguous(), m.c.expand(-1, len(x), -1).contiguous())
    return m.head(m.lstm(h, state)[1][0][0])


@net(lambda: shifted(3, 4, 7), class_axis=1, embed=nn.Embedding(7, 4), cell=nn.LSTMCell(4, 4), bias=free(7))
def language_model_of_lstm_cells(m, x):
    h, c = (x.new_zeros(len(x), 4, dtype=torch.float64) for _ in range(2))
    logits = []
    for ids in x.unbind(1):
        h, c = m.cell(m.embed(ids), (h, c))
        logits.append(F.linear(h, m.embed.weight, m.bias))
    return torch.stack(logits, -1)


@net(sequences, W=free(6, 4), U=free(4, 4), b=free(4), V=free(4, 3))
def recurrence_by_hand(m, x):
    h = torch.zeros(len(x), 4)
    for step in x.unbind(1):
        h = torch.tanh(step @ m.W + h @ m.U + m.b)
    return h @ m.V


@net(sequences, rate=free(4), frequency=free(4), **linears(enter=(6, 4), leave=(4, 3)))
def state_space(m, x):
    """A diagonal complex recurrence, with a parameter in the exponent."""
    decay = torch.exp(torch.complex(-m.rate.exp(), m.frequency))
    h = torch.zeros(len(x), 4, dtype=torch.complex128)
    for step in m.enter(x).unbind(1):
        h = decay * h + step
    return m.leave(h.real)


@net(vectors, inject=nn.Linear(6, 5, bias=False), **linears(up=(7, 5), down=(5, 6), head=(6, 3)))
def neural_ode(m, x):
    """The same layers many times, and the input anew each time, as in an equilibrium."""
    z = x
    for k in range(8):
        t = torch.full((len(x), 1), k / 8)
        z = z + 0.125 * m.down(torch.tanh(m.up(torch.cat([z, t], 1)) + m.inject(x)))
    return m.head(z)


@net(vectors, W=free(6, 7), steps=free(2, scale=0.1), thresholds=free(2), head=nn.Linear(7, 3))
def unrolled_sparse_coding(m, x):
    """ISTA: the dictionary is used as W and as its transpose, with learned steps and thresholds."""
    code = torch.zeros(len(x), 7)
    for step, threshold in zip(m.steps, m.thresholds, strict=True):
        code = F.softshrink(code - step * (code @ m.W.T - x) @ m.W, 0.0)
        code = torch.sign(code) * (code.abs() - threshold.exp() / 10).relu()
    return m.head(code)


@entry(axis=1)
def sequence_first_language_model():
    """Data along the second axis of inputs, targets and logits ``[T, C, N]``."""

    def run(m, x):
        h = m.rnn(m.embed(x))[0]
        return m.head(h).transpose(0, 1).transpose(1, 2)

    model = Net(run, embed=nn.Embedding(7, 4), rnn=nn.GRU(4, 4), head=nn.Linear(4, 7))
    X = torch.randint(7, (4, 3))
    return model, X, X.T.roll(-1, 1), CE


@net(sequences, a=nn.Linear(6, 4), b=nn.Linear(4, 3))
def batch_as_the_minor_axis(m, x):
    """Rows of the linear layers come position by position, the data within each."""
    n, t, d = x.shape
    rows = x.transpose(0, 1).reshape(t * n, d)
    h = torch.tanh(m.a(rows))
    return m.b(h).view(t, n, 3).sum(0)


@net(
    tokens,
    **{
        mode: nn.EmbeddingBag(9, 4, mode=mode, padding_idx=padding)
        for mode, padding in (("mean", 0), ("sum", None), ("max", None))
    },
    **frees(weights=(5,), table=(9, 3)),
    head=nn.Linear(7, 3),
)
def embedding_bags(m, x):
    bags = m.mean(x) + m.sum(x, per_sample_weights=m.weights.expand(len(x), -1)) * m.max(x)
    flat = F.embedding_bag(x.flatten(), m.table, torch.arange(0, x.numel(), x.shape[1]), mode="sum")
    return m.head(torch.cat([bags, flat], 1))


@net(
    vectors,
    **{part: nn.Sequential(nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 5), nn.GELU()) for part in ("body", "again")},
    **linears(enter=(6, 5), head=(5, 3)),
)
def checkpointed_reentrantly_and_not(m, x):
    h = checkpoint(m.body, m.enter(x), use_reentrant=True)
    return m.head(h + checkpoint(m.again, h, use_reentrant=False))


@entry()
def packed_layers():
    def run(m, x):
        h, padding = x["h"], {"batch_first": True, "enforce_sorted": False}
        lengths = h.isfinite().all(-1).sum(1)
        gru, last = m.gru(pack_padded_sequence(h.nan_to_num(), lengths, **padding))
        lstm = m.lstm(pack_padded_sequence(m.embed(x["ids"]), lengths, **padding))[0]
        both = [pad_packed_sequence(packed, batch_first=True)[0].sum(1) for packed in (gru, lstm)]
        return m.head(torch.cat(both, 1)) + m.last(last[-1])

    X = {"h": torch.randn(4, 5, 3), "ids": torch.randint(1, 9, (4, 5))}
    X["h"][0, 2:], X["h"][3, 4:] = torch.nan, torch.nan
    X["ids"][0, 2:], X["ids"][3, 4:] = 0, 0
    gru = nn.GRU(3, 2, num_layers=2, bidirectional=True, batch_first=True)
    parts = {"gru": gru, "lstm": nn.LSTM(4, 3, batch_first=True), "embed": nn.Embedding(9, 4, padding_idx=0)}
    return Net(run, **parts, **linears(head=(7, 3), last=(2, 3))), X, torch.randint(3, (4,)), CE
