"""Transformers: by hand, of `torch.nn`, and of Hugging Face."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from zoo.entries import (
    CE,
    Net,
    embeddings,
    entry,
    free,
    frees,
    images,
    linears,
    net,
    sequences,
    shifted,
    tokens,
)

WORDS = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "bos_token_id": 1, "eos_token_id": 2}


def _heads(x, count):
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def _rotated(x):
    """Rotary positions."""
    t, d = x.shape[-2:]
    angles = torch.arange(t)[:, None] * 10.0 ** -(torch.arange(d // 2) / d)
    a, b = x.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1)


@net(
    images,
    patch=nn.Conv2d(2, 8, 2, 2),
    layer=nn.TransformerEncoderLayer(8, 2, 12, 0.0, "gelu", batch_first=True, norm_first=True),
    other=nn.TransformerEncoderLayer(8, 2, 12, 0.0, "gelu", batch_first=True, norm_first=True),
    **{"norm": nn.LayerNorm(8), "head": nn.Linear(8, 3), **frees(token=(1, 1, 8), position=(1, 10, 8))},
)
def vit_by_hand(m, x):
    x = m.patch(x).flatten(2).transpose(1, 2)
    x = torch.cat([m.token.expand(len(x), -1, -1), x], 1) + m.position
    return m.head(m.norm(m.other(m.layer(x)))[:, 0])


@net(
    lambda: shifted(3, 5, 9),
    **embeddings(token=(9, 8), position=(5, 8)),
    **linears(qkv=(8, 24), out=(8, 8), up=(8, 12), down=(12, 8)),
    norm=nn.LayerNorm(8),
    head=nn.Linear(8, 9, bias=False),
    future=torch.ones(5, 5).triu(1).bool(),
)
def gpt_with_positions(m, x):
    h = m.token(x) + m.position(torch.arange(x.shape[1]))
    q, k, v = (_heads(part, 2) for part in m.qkv(m.norm(h)).split(8, -1))
    scores = (q @ k.mT / 2).masked_fill(m.future, float("-inf"))
    h = h + m.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    return m.head(h + m.down(F.gelu(m.up(h)))).transpose(1, 2)


@entry()
def llama_by_hand():
    def rms(x, weight):
        return weight * (x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt())

    def run(m, x):
        h = F.embedding(x, m.table)
        y = rms(h, m.first)
        q, k = (_rotated(_heads(y @ w, 2)) for w in (m.wq, m.wk))
        mixed = F.scaled_dot_product_attention(q, k, _heads(y @ m.wv, 2), is_causal=True)
        h = h + mixed.transpose(1, 2).flatten(2) @ m.wo
        y = rms(h, m.second)
        h = h + (F.silu(y @ m.gate) * (y @ m.up)) @ m.down
        return (rms(h, m.third) @ m.table.T).flatten(0, 1)

    X = torch.randint(9, (3, 4))
    squares = {name: free(8, 8) for name in ("wq", "wk", "wv", "wo")}
    norms = {name: nn.Parameter(torch.rand(8) + 0.5) for name in ("first", "second", "third")}
    model = Net(run, table=free(9, 8), gate=free(8, 10), up=free(8, 10), down=free(10, 8), **squares, **norms)

    def loss(z, y):
        return F.cross_entropy(z, y.flatten())

    loss.reduction = "mean"
    return model, X, X.roll(-1, 1), loss


@entry(rounds=True)
def huggingface_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**WORDS, intermediate_size=12, num_attention_heads=4, num_key_value_heads=2))
    return Net(lambda m, x: m.m(input_ids=x).logits.transpose(1, 2), m=model), *shifted(3, 5, 9), CE


@entry(rounds=True)
def huggingface_mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = MixtralConfig(**WORDS, **heads, intermediate_size=4, num_local_experts=3, num_experts_per_tok=2)
    model = MixtralForCausalLM(config).eval()
    model.set_experts_implementation("eager")
    return Net(lambda m, x: m.m(input_ids=x).logits[:, -1], m=model), *tokens(k=9), CE


@entry(rounds=True)
def huggingface_t5():
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 9, "d_model": 8, "d_kv": 4, "d_ff": 10, "num_layers": 1, "num_heads": 2}
    config = T5Config(
        **sizes, relative_attention_num_buckets=4, decoder_start_token_id=0, feed_forward_proj="gated-gelu"
    )
    X, y = torch.randint(9, (3, 4)), torch.randint(9, (3, 4))

    def run(m, x):
        return m.m(input_ids=x, decoder_input_ids=x.flip(1)).logits.transpose(1, 2)

    return Net(run, m=T5ForConditionalGeneration(config).eval()), X, y, CE


@entry()
def encoder_decoder_with_masks():
    def run(m, x):
        source, target, padding = x
        causal = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        masks = {"src_key_padding_mask": padding, "memory_key_padding_mask": padding, "tgt_mask": causal}
        h = m.t(source, target, tgt_is_causal=True, **masks)
        return m.head(h).transpose(1, 2)

    padding = torch.zeros(3, 4).bool()
    padding[1, 2:] = True
    X = (torch.randn(3, 4, 8), torch.randn(3, 3, 8), padding)
    t = nn.Transformer(8, 2, 1, 1, 12, dropout=0.0, batch_first=True)
    return Net(run, t=t, head=nn.Linear(8, 3)), X, torch.randint(3, (3, 3)), CE


@net(sequences, d=nn.TransformerDecoderLayer(6, 2, 10, dropout=0.0), **linears(memory=(6, 6), head=(6, 3)))
def decoder_layer_sequence_first(m, x):
    h = x.transpose(0, 1)
    return m.head(m.d(h[:2], m.memory(h))).mean(0)


@entry()
def encoder_in_eval_mode_with_padding():
    def run(m, x):
        h, padding = x["h"], x["padding"]
        h = m.e(h, src_key_padding_mask=padding).masked_fill(padding[..., None], 0.0)
        return m.head(h.sum(1))

    layer = nn.TransformerEncoderLayer(6, 2, 10, dropout=0.1, batch_first=True)
    padding = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]).bool()
    X = {"h": torch.randn(3, 5, 6), "padding": padding}
    model = Net(run, e=nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), head=nn.Linear(6, 3)).eval()
    return model, X, torch.randint(3, (3,)), CE


@net(sequences, latents=free(2, 6), head=nn.Linear(12, 3), **{name: nn.Linear(6, 6) for name in "qkv"})
def cross_attention_to_learned_queries(m, x):
    """Perceiver: queries that do not depend on the data."""
    q = m.q(m.latents).expand(len(x), -1, -1)
    h = F.scaled_dot_product_attention(q, m.k(x), m.v(x))
    return m.head(h.flatten(1))


@net(sequences, **{name: free(6, 2, 3) for name in "qkv"}, out=free(2, 3, 3))
def linear_attention_by_einsum(m, x):
    q, k, v = (torch.einsum("ntd,dhe->nhte", x, w) for w in (m.q, m.k, m.v))
    state = torch.einsum("nhte,nhtf->nhef", F.elu(k) + 1, v)
    h = torch.einsum("nhte,nhef->nthf", F.elu(q) + 1, state)
    return torch.einsum("nthf,hfc->nc", h, m.out) / 10


@net(
    sequences,
    a=nn.MultiheadAttention(6, 2, kdim=4, vdim=5, add_bias_kv=True, add_zero_attn=True, batch_first=True),
    **linears(k=(6, 4), v=(6, 5), head=(6, 3)),
)
def attention_with_own_widths_bias_rows_and_zero_row(m, x):
    h, weights = m.a(x, m.k(x), m.v(x), average_attn_weights=True)
    return m.head(h.mean(1)) + weights.mean(1)[:, :3]


@net(sequences, slopes=free(2), temperature=free(), table=nn.Embedding(9, 2), **linears(qkv=(6, 12), head=(4, 3)))
def relative_position_bias_and_learned_slopes(m, x):
    """One table of biases is looked up once and broadcast over the batch; ALiBi's slopes are learned."""
    q, k, v = (_heads(part, 2) for part in m.qkv(x).chunk(3, -1))
    steps = torch.arange(x.shape[1])
    distances = steps[None] - steps[:, None]
    bias = m.table(distances + 4).permute(2, 0, 1) - distances.abs() * m.slopes.exp()[:, None, None]
    h = ((q @ k.mT) * m.temperature + bias).softmax(-1) @ v
    return m.head(h.transpose(1, 2).flatten(2)[:, -1])
