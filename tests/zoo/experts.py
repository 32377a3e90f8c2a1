"""Mixtures of experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from zoo.entries import free, frees, net, sequences, vectors


def _experts(count, width=6):
    return nn.ModuleList(nn.Sequential(nn.Linear(width, 5), nn.GELU(), nn.Linear(5, width)) for _ in range(count))


@net(lambda: vectors(7), router=nn.Linear(6, 3), experts=_experts(3), head=nn.Linear(6, 3))
def switch_by_index(m, x):
    """Top-1 routing; an expert that no datum reaches."""
    gates = (m.router(x) - torch.tensor([0.0, 0.0, 1e3])).softmax(-1)
    weight, choice = gates.max(-1)
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        chosen = choice == e
        if chosen.any():
            out[chosen] = expert(x[chosen]) * weight[chosen, None]
    return m.head(out)


@net(lambda: sequences(4), router=nn.Linear(6, 4), experts=_experts(4), head=nn.Linear(6, 3))
def top_two_experts_with_index_add(m, x):
    n, t, d = x.shape
    rows = x.reshape(-1, d)
    weights, choices = m.router(rows).softmax(-1).topk(2)
    weights = weights / weights.sum(-1, keepdim=True)
    out = torch.zeros_like(rows)
    for e, expert in enumerate(m.experts):
        place, slot = torch.where(choices == e)
        out = out.index_add(0, place, expert(rows[place]) * weights[place, slot, None])
    return m.head(out.view(n, t, d).mean(1))


@net(
    vectors,
    **frees(up=(3, 6, 4), bias=(3, 4), down=(3, 4, 6)),
    router=nn.Linear(6, 3, bias=False),
    head=nn.Linear(6, 3),
)
def experts_in_one_tensor(m, x):
    """All experts on all data, by bmm and by einsum."""
    gates = m.router(x).softmax(-1)
    h = torch.bmm(x.expand(3, -1, -1), m.up) + m.bias[:, None]
    y = torch.einsum("enh,ehd->end", F.silu(h), m.down)
    return m.head(torch.einsum("ne,end->nd", gates, y))


@net(lambda: vectors(7), W=free(3, 6, 6), b=free(3, 6), head=nn.Linear(6, 3))
def experts_by_slices(m, x):
    choice = x[:, 0].gt(0).long() + x[:, 1].gt(0).long()
    out = torch.zeros_like(x)
    for e in range(3):
        place = (choice == e).nonzero().squeeze(1)
        out = out.index_add(0, place, (x[place] @ m.W[e]).tanh() + m.b[e])
    return m.head(out)


@net(lambda: vectors(7, 8), exists=hasattr(F, "grouped_mm"), dtype=torch.float32, W=free(3, 8, 8), head=nn.Linear(8, 3))
def experts_by_grouped_products(m, x):
    """PyTorch's grouped product of rows that are sorted by expert; it exists in single precision only."""
    choice = x[:, 0].gt(0).long() + x[:, 1].gt(0).long()
    order = choice.argsort()
    ends = choice.bincount(minlength=3).cumsum(0).int()
    rows = x[order]
    if x.dtype == torch.float32:
        h = F.grouped_mm(rows, m.W.mT, offs=ends)
    else:
        h = torch.cat([rows[a:b] @ W.T for a, b, W in zip([0, *ends], ends, m.W, strict=False)])
    return m.head(h.tanh()[order.argsort()])
