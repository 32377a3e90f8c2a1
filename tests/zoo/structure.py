"""Parameters that enter in unusual ways: tables, scalars, einsum, transforms."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from zoo.entries import CE, Net, entry, free, sequences, tokens, vectors


@entry()
def matrix_products_of_all_kinds():
    def run(m, x):
        h = torch.addmm(m.b1, x, m.W1)
        h = h.tanh() @ m.W2.T
        h = torch.matmul(m.W3, h.T).T.tanh()
        h = torch.stack([torch.mv(m.W4, row) + F.linear(row, m.W5, m.b5) for row in h])
        return torch.mm(h, m.W6) + h.matmul(m.v)[:, None] + torch.outer(h.sum(1), m.u)

    shapes = {
        "W1": (6, 5),
        "b1": (5,),
        "W2": (4, 5),
        "W3": (4, 4),
        "W4": (4, 4),
        "W5": (4, 4),
        "b5": (4,),
        "W6": (4, 3),
    }
    return Net(run, **{name: free(*shape) for name, shape in shapes.items()}, v=free(4), u=free(3)), *vectors(), CE


@entry()
def scaled_sums_of_products():
    def run(m, x):
        h = torch.addmm(m.b, x, m.W, beta=0.5, alpha=2.0).tanh()
        h = torch.baddbmm(m.c, h.unflatten(1, (2, 2)), m.V.expand(len(x), -1, -1), alpha=0.7)
        return torch.addmv(m.d, h.flatten(1), m.w)[:, None] * m.s + h.flatten(1)[:, :3]

    parts = {"W": (6, 4), "b": (4,), "V": (2, 2), "c": (1, 2, 2), "w": (4,), "d": (1,), "s": (3,)}
    return Net(run, **{name: free(*shape) for name, shape in parts.items()}), *vectors(), CE


@entry()
def einsum_weights():
    def run(m, x):
        h = torch.einsum("ntd,hd->nth", x, m.A).tanh()
        h = torch.einsum("nth,ts->nsh", h, m.mix)
        h = torch.einsum("hk,nsh->nsk", m.B, h).sigmoid()
        return torch.einsum("nsk,skc->nc", h, m.C) + torch.einsum("nsk,kc,s->nc", h, m.D, m.w)

    shapes = {"A": (4, 6), "mix": (5, 2), "B": (4, 3), "C": (2, 3, 3), "D": (3, 3), "w": (2,)}
    return Net(run, **{name: free(*shape) for name, shape in shapes.items()}), *sequences(), CE


@entry()
def mixer():
    """Weights along the positions: linear layers of a transposed map."""

    def run(m, x):
        x = x + m.tokens(m.n1(x).mT).mT
        return m.head((x + F.gelu(m.channels(m.n2(x)))).mean(1))

    parts = {"tokens": nn.Linear(5, 5), "channels": nn.Linear(6, 6), "n1": nn.LayerNorm(6), "n2": nn.RMSNorm(6)}
    return Net(run, **parts, head=nn.Linear(6, 3)), *sequences(), CE


@entry(class_axis=-1)
def bilinear_layer():
    model = Net(lambda m, x: m.b(x[0].tanh(), m.a(x[1])), a=nn.Linear(4, 3), b=nn.Bilinear(5, 3, 2))
    return model, (torch.randn(5, 5), torch.randn(5, 4)), torch.randn(5, 2), nn.MSELoss()


@entry()
def scalars_and_free_parameters():
    """A temperature, a free bias, a parameter that is never used, and one that cannot matter."""

    def run(m, x):
        h = m.a(x).tanh() + m.shift
        return m.b(h) / m.temperature.exp() + m.bias + m.common

    parts = {"a": nn.Linear(6, 4), "b": nn.Linear(4, 3, bias=False), "unused": nn.Linear(2, 2)}
    return Net(run, shift=free(1), temperature=free(), bias=free(3), common=free(), **parts), *vectors(), CE


@entry()
def frozen_parts():
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    model[0].requires_grad_(False)
    model[1].bias.requires_grad_(False)
    model[3].weight.requires_grad_(False)
    return model, *vectors(), CE


@entry()
def hypernetwork():
    def run(m, x):
        W = m.hyper(m.code).view(4, 6)
        return m.head(F.linear(x, W, m.code[:4]).tanh())

    return Net(run, hyper=nn.Linear(5, 24), code=free(5), head=nn.Linear(4, 3)), *vectors(), CE


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale):
        ctx.save_for_backward(x, scale)
        return scale * x**3

    @staticmethod
    def backward(ctx, g):
        x, scale = ctx.saved_tensors
        return 3 * g * scale * x**2, (g * x**3).sum_to_size(scale.shape)


@entry()
def own_autograd_function():
    return (
        Net(lambda m, x: m.b(Cube.apply(m.a(x), m.s)), a=nn.Linear(6, 4), b=nn.Linear(4, 3), s=free(4)),
        *vectors(),
        CE,
    )


@entry()
def operations_in_place():
    def run(m, x):
        h = m.a(x).add_(m.shift).tanh_()
        h = (h * 2).mul_(0.7).masked_fill_(x[:, :1] > 0, 0.5)
        h[:, 0] = m.edge
        h[:, 1] += 1
        out = torch.zeros(len(x), 3)
        out += m.b(h)
        return out

    return Net(run, a=nn.Linear(6, 4), shift=free(4), edge=free(), b=nn.Linear(4, 3)), *vectors(), CE


@entry(surrogate=True)
def straight_through_quantisation():
    def run(m, x):
        W = m.a.weight
        W = W + ((W * 8).round() / 8 - W).detach()
        h = F.linear(x, W, m.a.bias).tanh()
        return m.b(h + (h.sign() - h).detach() * 0.5)

    return Net(run, a=nn.Linear(6, 4), b=nn.Linear(4, 3)), *vectors(), CE


@entry()
def gradient_inside_the_model():
    """An energy's gradient in the input, by `torch.func`."""

    def run(m, x):
        def energy(row):
            return m.out(torch.tanh(m.enter(row))).sum()

        return m.head(torch.func.vmap(torch.func.grad(energy))(x))

    return Net(run, enter=nn.Linear(6, 5), out=nn.Linear(5, 1), head=nn.Linear(6, 3)), *vectors(), CE


@entry()
def vmap_over_an_ensemble():
    def run(m, x):
        def one(W, b):
            return torch.tanh(F.linear(x, W, b))

        return m.head(torch.func.vmap(one)(m.W, m.b).mean(0))

    return Net(run, W=free(3, 4, 6), b=free(3, 4), head=nn.Linear(4, 3)), *vectors(), CE


@entry()
def stacked_ensemble():
    """Batched linear maps by matmul with a broadcast axis."""

    def run(m, x):
        h = torch.tanh(x @ m.W + m.b[:, None])
        return (h @ m.V).mean(0)

    return Net(run, W=free(3, 6, 4), b=free(3, 4), V=free(3, 4, 3)), *vectors(), CE


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


@entry()
def graph_attention():
    """Edges of all graphs in a list; messages are added by index."""

    def run(m, x):
        n, t, d = x.shape
        source = torch.arange(n * t)
        target = (source // t) * t + (source + 1) % t
        h = m.W(x.reshape(-1, d))
        score = F.leaky_relu(m.attend(torch.cat([h[source], h[target]], 1)), 0.2).exp()
        out = torch.zeros_like(h).index_add(0, target, score * h[source])
        return m.head(out.view(n, t, -1).sum(1))

    return Net(run, W=nn.Linear(6, 4), attend=nn.Linear(8, 1), head=nn.Linear(4, 3)), *sequences(), CE


@entry()
def point_net():
    def run(m, x):
        h = m.a(x.transpose(1, 2)).relu()
        return m.head(m.b(h).max(2).values)

    return Net(run, a=nn.Conv1d(6, 4, 1), b=nn.Conv1d(4, 5, 1), head=nn.Linear(5, 3)), *sequences(), CE


@entry()
def capsules():
    def run(m, x):
        votes = torch.einsum("nid,ijde->nije", x, m.W)

        def squash(s):
            return s * s.norm(dim=-1, keepdim=True) / (1 + s.square().sum(-1, keepdim=True))

        logits = torch.zeros(votes.shape[:3])
        for _ in range(2):
            v = squash((logits.softmax(2)[..., None] * votes).sum(1))
            logits = logits + (votes * v[:, None]).sum(-1)
        return v.norm(dim=-1)

    return Net(run, W=free(5, 3, 6, 2)), *sequences(), CE


@entry()
def cosine_classifier():
    def run(m, x):
        h = F.normalize(m.a(x).tanh(), dim=-1)
        return F.linear(h, F.normalize(m.W, dim=-1)) * m.scale + F.cosine_similarity(
            h[:, None], m.centres[None], dim=-1
        )

    return Net(run, a=nn.Linear(6, 4), W=free(3, 4), centres=free(3, 4), scale=free()), *vectors(), CE


@entry()
def sorting_and_choosing():
    def run(m, x):
        h = m.a(x)
        h = torch.cat([h.sort(1).values, h.topk(2, 1).values, torch.where(h > 0, h, m.slope * h)], 1)
        return m.head(h.tanh())

    return Net(run, a=nn.Linear(6, 4), slope=free(4), head=nn.Linear(10, 3)), *vectors(), CE


@entry()
def fourier_layer():
    def run(m, x):
        spectrum = torch.fft.rfft(m.a(x), dim=1)
        spectrum = torch.einsum("ntc,cd->ntd", spectrum[:, :2], torch.view_as_complex(m.W))
        return m.head(torch.fft.irfft(spectrum, n=5, dim=1).tanh().mean(1))

    return Net(run, a=nn.Linear(6, 4), W=free(4, 4, 2), head=nn.Linear(4, 3)), *sequences(), CE


@entry(surrogate=True)
def position_table_over_the_batch():
    """The padding's row is used, but gets no gradient."""

    def run(m, x):
        h = m.word(x) + m.position.weight[: x.shape[1]] + m.kind(torch.zeros(1, dtype=torch.long))
        return m.head(m.norm(h).tanh().mean(1))

    tables = {"word": nn.Embedding(9, 4, padding_idx=0), "position": nn.Embedding(6, 4), "kind": nn.Embedding(2, 4)}
    return Net(run, **tables, norm=nn.LayerNorm(4), head=nn.Linear(4, 3)), *tokens(), CE


@entry()
def embedding_with_offsets_and_subsets():
    """Field-wise categorical features in one table."""

    def run(m, x):
        h = m.table(x + torch.arange(3) * 4)
        interactions = (h.sum(1).square() - h.square().sum(1)) / 2
        return m.head(torch.cat([h.flatten(1), interactions], 1).tanh()) + m.first(x + torch.arange(3) * 4).sum(1)

    parts = {"table": nn.Embedding(12, 4), "first": nn.Embedding(12, 3), "head": nn.Linear(16, 3)}
    return Net(run, **parts), torch.randint(4, (5, 3)), torch.randint(3, (5,)), CE


@entry()
def dropout_in_eval_mode():
    model = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5), nn.SELU(), nn.AlphaDropout(0.2), nn.Linear(5, 3)).eval()
    return model, *vectors(), CE


@entry()
def low_rank_and_masked_weights():
    def run(m, x):
        W = m.U @ m.V.T * m.mask + torch.diag(m.d)
        return m.head((x @ W.T + m.b).tanh())

    parts = {"U": free(6, 2), "V": free(6, 2), "d": free(6), "b": free(6), "mask": torch.ones(6, 6).tril()}
    return Net(run, **parts, head=nn.Linear(6, 3)), *vectors(), CE


@entry()
def quadratic_form():
    def run(m, x):
        return torch.stack([((x @ W) * x).sum(1) for W in m.W], 1) + F.bilinear(x, x, m.W) * 0.1

    return Net(run, W=free(3, 6, 6)), *vectors(), CE


@entry()
def parameter_in_two_roles():
    """One vector is a norm's scale and a linear map's bias; one matrix is a weight and a table."""

    def run(m, x):
        h = F.layer_norm(m.W[x].mean(1), (4,), m.v, None)
        return F.linear(h.tanh(), m.W[:3] * 2, m.v[:3]) + m.a(h)

    return Net(run, W=free(9, 4), v=free(4), a=nn.Linear(4, 3)), *tokens(), CE


@entry()
def one_bias_for_two_layers():
    def run(m, x):
        h = F.linear(x, m.W, m.b).tanh()
        return m.head(F.linear(h, m.V, m.b).tanh() + h)

    return Net(run, W=free(4, 6), V=free(4, 4), b=free(4), head=nn.Linear(4, 3)), *vectors(), CE


@entry()
def masked_tokens():
    """A learned token in place of some positions, and a learned scale that divides."""

    def run(m, x):
        h = torch.where((x[..., :1] > 0.3), m.token, m.a(x)) / m.scale
        return m.head(h.tanh().mean(1) - m.shift)

    parts = {"a": nn.Linear(6, 4), "head": nn.Linear(4, 3)}
    scale = nn.Parameter(1 + torch.rand(1, 1, 4))
    return Net(run, token=free(4), shift=free(4), scale=scale, **parts), *sequences(), CE


@entry()
def as_many_positions_and_channels_as_data():
    """No axis can be told from another by its size."""

    def run(m, x):
        h = m.table(x) + m.position(torch.arange(4))
        h = h + torch.einsum("nts,ntd->nsd", m.mix(h).softmax(1), h) + m.free
        return m.head((h @ m.W).tanh().sum(1))

    tables = {"table": nn.Embedding(9, 4), "position": nn.Embedding(4, 4), "mix": nn.Linear(4, 4)}
    return Net(run, **tables, W=free(4, 4), free=free(4, 4), head=nn.Linear(4, 4)), *tokens(8, 4, k=4), CE


@entry()
def table_in_several_places():
    """Rows that are added in one place, scaled in another, and permuted in a third."""

    def run(m, x):
        rows = m.position(torch.arange(5))
        h = m.word(x) + rows
        h = h * rows.flip(0).sigmoid() + m.kind(torch.arange(5) % 2)[None].expand(len(x), -1, -1)
        return m.head(h.transpose(0, 1).tanh().sum(0))

    tables = {"word": nn.Embedding(9, 4), "position": nn.Embedding(5, 4), "kind": nn.Embedding(2, 4)}
    return Net(run, **tables, head=nn.Linear(4, 3)), *tokens(), CE
