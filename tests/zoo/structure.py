"""Parameters that enter in unusual ways: tables, scalars, einsum, transforms."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from zoo.entries import CE, Net, embeddings, entry, free, frees, linears, net, sequences, tokens, vectors


@net(
    vectors, **frees(W1=(6, 5), b1=(5,), W2=(4, 5), W3=(4, 4), W4=(4, 4), W5=(4, 4), b5=(4,), W6=(4, 3), v=(4,), u=(3,))
)
def matrix_products_of_all_kinds(m, x):
    h = torch.addmm(m.b1, x, m.W1)
    h = h.tanh() @ m.W2.T
    h = torch.matmul(m.W3, h.T).T.tanh()
    h = torch.stack([torch.mv(m.W4, row) + F.linear(row, m.W5, m.b5) for row in h])
    return torch.mm(h, m.W6) + h.matmul(m.v)[:, None] + torch.outer(h.sum(1), m.u)


@net(vectors, **frees(W=(6, 4), b=(4,), V=(2, 2), c=(1, 2, 2), w=(4,), d=(1,), s=(3,)))
def scaled_sums_of_products(m, x):
    h = torch.addmm(m.b, x, m.W, beta=0.5, alpha=2.0).tanh()
    h = torch.baddbmm(m.c, h.unflatten(1, (2, 2)), m.V.expand(len(x), -1, -1), alpha=0.7)
    return torch.addmv(m.d, h.flatten(1), m.w)[:, None] * m.s + h.flatten(1)[:, :3]


@net(sequences, **frees(A=(4, 6), mix=(5, 2), B=(4, 3), C=(2, 3, 3), D=(3, 3), w=(2,)))
def einsum_weights(m, x):
    h = torch.einsum("ntd,hd->nth", x, m.A).tanh()
    h = torch.einsum("nth,ts->nsh", h, m.mix)
    h = torch.einsum("hk,nsh->nsk", m.B, h).sigmoid()
    return torch.einsum("nsk,skc->nc", h, m.C) + torch.einsum("nsk,kc,s->nc", h, m.D, m.w)


@net(sequences, n1=nn.LayerNorm(6), n2=nn.RMSNorm(6), **linears(tokens=(5, 5), channels=(6, 6), head=(6, 3)))
def mixer(m, x):
    """Weights along the positions: linear layers of a transposed map."""
    x = x + m.tokens(m.n1(x).mT).mT
    return m.head((x + F.gelu(m.channels(m.n2(x)))).mean(1))


@net(vectors, hyper=nn.Linear(5, 24), code=free(5), head=nn.Linear(4, 3))
def hypernetwork(m, x):
    W = m.hyper(m.code).view(4, 6)
    return m.head(F.linear(x, W, m.code[:4]).tanh())


@net(vectors, a=nn.Linear(6, 4), shift=free(4), edge=free(), b=nn.Linear(4, 3))
def operations_in_place(m, x):
    h = m.a(x).add_(m.shift).tanh_()
    h = (h * 2).mul_(0.7).masked_fill_(x[:, :1] > 0, 0.5)
    h[:, 0] = m.edge
    h[:, 1] += 1
    out = torch.zeros(len(x), 3)
    out += m.b(h)
    return out


@net(vectors, W=free(3, 6, 4), b=free(3, 4), V=free(3, 4, 3))
def stacked_ensemble(m, x):
    """Batched linear maps by matmul with a broadcast axis."""
    h = torch.tanh(x @ m.W + m.b[:, None])
    return (h @ m.V).mean(0)


@entry()
def graph_convolution():
    def run(m, x):
        nodes, adjacency = x["nodes"], x["adjacency"]
        h = F.relu(adjacency @ m.a(nodes) + m.own(nodes))
        return m.head((adjacency @ (h @ m.W)).mean(1))

    adjacency = torch.rand(3, 4, 4)
    X = {"nodes": torch.randn(3, 4, 5), "adjacency": adjacency / adjacency.sum(-1, keepdim=True)}
    model = Net(run, a=nn.Linear(5, 4, bias=False), own=nn.Linear(5, 4), W=free(4, 4), head=nn.Linear(4, 3))
    return model, X, torch.randint(3, (3,)), CE


@net(sequences, W=nn.Linear(6, 4), attend=nn.Linear(8, 1), head=nn.Linear(4, 3))
def graph_attention(m, x):
    """Edges of all graphs in a list; messages are added by index."""
    n, t, d = x.shape
    source = torch.arange(n * t)
    target = (source // t) * t + (source + 1) % t
    h = m.W(x.reshape(-1, d))
    score = F.leaky_relu(m.attend(torch.cat([h[source], h[target]], 1)), 0.2).exp()
    out = torch.zeros_like(h).index_add(0, target, score * h[source])
    return m.head(out.view(n, t, -1).sum(1))


@net(sequences, W=free(5, 3, 6, 2))
def capsules(m, x):
    votes = torch.einsum("nid,ijde->nije", x, m.W)

    def squash(s):
        return s * s.norm(dim=-1, keepdim=True) / (1 + s.square().sum(-1, keepdim=True))

    logits = torch.zeros(votes.shape[:3])
    for _ in range(2):
        v = squash((logits.softmax(2)[..., None] * votes).sum(1))
        logits = logits + (votes * v[:, None]).sum(-1)
    return v.norm(dim=-1)


@net(vectors, a=nn.Linear(6, 4), W=free(3, 4), centres=free(3, 4), scale=free())
def cosine_classifier(m, x):
    h = F.normalize(m.a(x).tanh(), dim=-1)
    return F.linear(h, F.normalize(m.W, dim=-1)) * m.scale + F.cosine_similarity(h[:, None], m.centres[None], dim=-1)


@net(vectors, a=nn.Linear(6, 4), slope=free(4), head=nn.Linear(10, 3))
def sorting_and_choosing(m, x):
    h = m.a(x)
    h = torch.cat([h.sort(1).values, h.topk(2, 1).values, torch.where(h > 0, h, m.slope * h)], 1)
    return m.head(h.tanh())


@net(sequences, a=nn.Linear(6, 4), W=free(4, 4, 2), head=nn.Linear(4, 3))
def fourier_layer(m, x):
    spectrum = torch.fft.rfft(m.a(x), dim=1)
    spectrum = torch.einsum("ntc,cd->ntd", spectrum[:, :2], torch.view_as_complex(m.W))
    return m.head(torch.fft.irfft(spectrum, n=5, dim=1).tanh().mean(1))


@net(
    tokens,
    surrogate=True,
    word=nn.Embedding(9, 4, padding_idx=0),
    **embeddings(position=(6, 4), kind=(2, 4)),
    norm=nn.LayerNorm(4),
    head=nn.Linear(4, 3),
)
def position_table_over_the_batch(m, x):
    """The padding's row is used, but gets no gradient."""
    h = m.word(x) + m.position.weight[: x.shape[1]] + m.kind(torch.zeros(1, dtype=torch.long))
    return m.head(m.norm(h).tanh().mean(1))


@net(
    lambda: (torch.randint(4, (5, 3)), torch.randint(3, (5,))),
    table=nn.Embedding(12, 4),
    first=nn.Embedding(12, 3),
    head=nn.Linear(16, 3),
)
def embedding_with_offsets_and_subsets(m, x):
    """Field-wise categorical features in one table."""
    h = m.table(x + torch.arange(3) * 4)
    interactions = (h.sum(1).square() - h.square().sum(1)) / 2
    return m.head(torch.cat([h.flatten(1), interactions], 1).tanh()) + m.first(x + torch.arange(3) * 4).sum(1)


@net(vectors, mask=torch.ones(6, 6).tril(), head=nn.Linear(6, 3), **frees(U=(6, 2), V=(6, 2), d=(6,), b=(6,)))
def low_rank_and_masked_weights(m, x):
    W = m.U @ m.V.T * m.mask + torch.diag(m.d)
    return m.head((x @ W.T + m.b).tanh())


@net(tokens, W=free(9, 4), v=free(4), b=free(3), a=nn.Linear(4, 3, bias=False))
def parameter_in_two_roles(m, x):
    """A vector is a norm's scale and a linear map's bias, a matrix a weight and a table, a bias that of two layers."""
    h = F.layer_norm(m.W[x].mean(1), (4,), m.v, None)
    z = F.linear(h.tanh(), m.W[:3] * 2, m.v[:3]) + F.linear(h, m.a.weight, m.b)
    return z + F.linear(z.sin(), m.W[:3, :3], m.b)


@net(
    sequences,
    token=free(4),
    shift=free(4),
    scale=nn.Parameter(1 + torch.rand(1, 1, 4)),
    **linears(a=(6, 4), head=(4, 3)),
)
def masked_tokens(m, x):
    """A learned token in place of some positions, and a learned scale that divides."""
    h = torch.where((x[..., :1] > 0.3), m.token, m.a(x)) / m.scale
    return m.head(h.tanh().mean(1) - m.shift)


@net(
    lambda: tokens(8, 4, k=4),
    **embeddings(table=(9, 4), position=(4, 4)),
    **linears(mix=(4, 4), head=(4, 4)),
    **frees(W=(4, 4), free=(4, 4)),
)
def as_many_positions_and_channels_as_data(m, x):
    """No axis can be told from another by its size."""
    h = m.table(x) + m.position(torch.arange(4))
    h = h + torch.einsum("nts,ntd->nsd", m.mix(h).softmax(1), h) + m.free
    return m.head((h @ m.W).tanh().sum(1))


@net(tokens, head=nn.Linear(4, 3), **embeddings(word=(9, 4), position=(5, 4), kind=(2, 4)))
def table_in_several_places(m, x):
    """Rows that are added in one place, scaled in another, and permuted in a third."""
    rows = m.position(torch.arange(5))
    h = m.word(x) + rows
    h = h * rows.flip(0).sigmoid() + m.kind(torch.arange(5) % 2)[None].expand(len(x), -1, -1)
    return m.head(h.transpose(0, 1).tanh().sum(0))


@entry()
def frozen_parts():
    """With low-rank layers beside a frozen one, as in LoRA; dropout in eval mode is nothing."""

    def run(m, x):
        h = m.base(x) + (x @ m.down.T @ m.up.T) * 2.0
        return m.head(m.last(m.drop(m.norm(h).tanh())).tanh())

    parts = {**frees(down=(2, 6), up=(5, 2)), **linears(base=(6, 5), last=(5, 4), head=(4, 3))}
    model = Net(run, norm=nn.LayerNorm(5), drop=nn.Sequential(nn.Dropout(0.5), nn.AlphaDropout(0.2)), **parts)
    for part in (model.base, model.norm.bias, model.last.weight):
        part.requires_grad_(False)
    return model.eval(), *vectors(), CE
