"""PyTorch's operations under the names that programs call them by: exported ones by overloads, TorchScript where no mode sees them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.jit import ScriptModule
from torch.nn import Module

REDUCTIONS = "none", "mean", "sum"
MODES = "sum", "mean", "max"
NORMS_OF_BATCHES = {"batch_norm", "instance_norm"}  # of one datum PyTorch's own derivatives may be wrong on the CPU
Function = Callable[..., Any]


def _same(f: Function, *args: Any, **options: Any) -> Any:
    return f(*args, **options)


def _in_place(f: Function, x: Tensor) -> Any:
    return f(x, inplace=True)


def _batch_norm(
    f: Function, x: Tensor, weight: Any, bias: Any, mean: Any, var: Any, training: bool, momentum: float, eps: float, *_: Any
) -> Any:  # fmt: skip
    return f(x, mean, var, weight, bias, training, momentum, eps)


def _batch_norm_in_eval(
    f: Function, x: Tensor, weight: Any, bias: Any, mean: Any, var: Any, momentum: float, eps: float
) -> Any:
    return f(x, mean, var, weight, bias, False, momentum, eps), *_nothing(x, 2)


def _embedding(
    f: Function, weight: Tensor, ids: Tensor, padding_idx: int = -1, scaled: bool = False, sparse: bool = False
) -> Any:
    return f(ids, weight, padding_idx if padding_idx >= 0 else None)


def _embedding_bag(
    f: Function,
    weight: Tensor,
    ids: Tensor,
    offsets: Tensor,
    scaled: bool = False,
    mode: int = 0,
    sparse: bool = False,
    weights: Any = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Any:
    padding_idx = None if padding_idx is not None and padding_idx < 0 else padding_idx
    out = f(
        ids,
        weight,
        offsets,
        mode=MODES[mode],
        per_sample_weights=weights,
        include_last_offset=include_last_offset,
        padding_idx=padding_idx,
    )
    return out, *_nothing(ids, 3)


def _distances(f: Function, x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: Any = None) -> Any:
    return f(x1, x2, p)


def _multi_margin(
    f: Function, z: Tensor, y: Tensor, p: int = 1, margin: float = 1.0, weight: Any = None, reduction: int = 1
) -> Any:
    return f(z, y, p, margin, weight, reduction=REDUCTIONS[reduction])


def _multilabel_margin(f: Function, z: Tensor, y: Tensor, reduction: int = 1) -> Any:
    return f(z, y, reduction=REDUCTIONS[reduction])


def _norm(f: Function, x: Tensor, p: Any = 2, *args: Any, **options: Any) -> Any:
    return f(x, p, *args, **options)


def _grouped(f: Function, a: Tensor, b: Tensor, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Any:
    return f(a, b, offs=offs, bias=bias, out_dtype=out_dtype)


def _nothing(like: Tensor, count: int) -> list[Tensor]:
    """What else an operation gives, for its backward pass."""
    return [like.new_empty(0) for _ in range(count)]


# by the name among PyTorch's operators: the function that one writes, and how it is called with the operator's arguments
ADAPTED: dict[str, tuple[Any, Function]] = {
    "hardsigmoid": (F.hardsigmoid, _same),
    "hardsigmoid_": (F.hardsigmoid, _in_place),
    "_weight_norm": (torch._weight_norm, _same),
    "norm_except_dim": (torch.norm_except_dim, _same),
    "batch_norm": (F.batch_norm, _batch_norm),
    "_native_batch_norm_legit_no_training": (F.batch_norm, _batch_norm_in_eval),
    "instance_norm": (F.instance_norm, _batch_norm),
    "scaled_dot_product_attention": (F.scaled_dot_product_attention, _same),
    "embedding": (F.embedding, _embedding),
    "embedding_bag": (F.embedding_bag, _embedding_bag),
    "_embedding_bag": (F.embedding_bag, _embedding_bag),
    "cdist": (torch.cdist, _distances),
    "_cdist_forward": (torch.cdist, _distances),
    "pdist": (torch.pdist, _same),
    "_pdist_forward": (torch.pdist, _same),
    "multi_margin_loss": (F.multi_margin_loss, _multi_margin),
    "multilabel_margin_loss": (F.multilabel_margin_loss, _multilabel_margin),
    "linalg_vector_norm": (torch.linalg.vector_norm, _same),
    "linalg_norm": (torch.linalg.norm, _same),
    "linalg_matrix_norm": (torch.linalg.matrix_norm, _same),
    "norm": (torch.norm, _norm),
    "cosine_similarity": (F.cosine_similarity, _same),
    "_grouped_mm": (getattr(torch, "_grouped_mm", None), _grouped),
    **{name: (getattr(torch, name), _same) for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")},
}


def overloads(table: Mapping[Any, Function]) -> dict[Any, Function]:
    """The substitutes of a table for all operators that do what a function of it does."""
    found: dict[Any, Function] = {}
    for name, (function, adapted) in ADAPTED.items():
        packet = getattr(torch.ops.aten, name, None)
        if packet is not None and function in table:
            own = [getattr(packet, overload) for overload in packet.overloads() if "out" not in overload]
            found.update(dict.fromkeys([packet, *own], partial(adapted, table[function])))
    # these are functions as well as operators
    return found | {getattr(torch, name): found[getattr(torch.ops.aten, name)] for name in NORMS_OF_BATCHES}


def scripted(modules: Iterable[Module]) -> set[str]:
    """The operators that TorchScript runs where no function mode sees them, among those that have a substitute."""
    found: set[str] = set()
    for module in modules:
        if isinstance(module, ScriptModule):
            try:
                graph = str(module.inlined_graph)
            except (RuntimeError, AttributeError):  # a container, which has no `forward`
                continue
            found |= set(re.findall(r"\baten::(\w+)\(", graph))
    return found & ADAPTED.keys()


def forget_optimized(modules: Iterable[Module]) -> None:
    """Let TorchScript compile again what modules run, as what it has optimised serves even where that is switched off."""
    for module in modules:
        if isinstance(module, ScriptModule):
            for name in module._c._method_names():
                module._c._get_method(name)._debug_flush_compilation_cache()
