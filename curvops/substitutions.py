"""Operations whose second derivative PyTorch lacks or has wrong, and what stands in for them.

`tests/test_substitutions.py` compares each entry with central differences of the gradient.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction

from curvops.aten import overloads
from curvops.context import switched
from curvops.fully_shard import gathering
from curvops.norms import NORMS, vector_norm

_PLAIN = ContextVar("whether this thread computes without kernels that have no second derivative", default=False)
_checkpoint: Any = CheckpointFunction.apply
_optimized: Any = vars(torch.jit)["optimized_execution"]
Maybe = Tensor | None


@contextmanager
def plain_kernels() -> Iterator[None]:
    """A context, for forward and backward passes, without kernels and programs that have no second derivative."""
    before = _PLAIN.set(True)
    try:
        with (
            switched("attention", lambda: sdpa_kernel(SDPBackend.MATH)),
            # a model may compile parts of itself as it runs
            switched("compiler", lambda: torch.compiler.set_stance("force_eager")),
            switched("checkpoints", _keeping_checkpoints),
            # TorchScript's own derivatives of what it has optimised are wrong; the setting is each thread's
            _optimized(False),
        ):
            yield
    finally:
        _PLAIN.reset(before)


@contextmanager
def _keeping_checkpoints() -> Iterator[None]:
    own = vars(CheckpointFunction).get("apply")  # by itself it is inherited
    setattr(CheckpointFunction, "apply", _reentrant)  # noqa: B010
    try:
        yield
    finally:
        if own is None:
            del CheckpointFunction.apply
        else:
            setattr(CheckpointFunction, "apply", own)  # noqa: B010


def _reentrant(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
    """Reentrant checkpointing has no `torch.autograd.grad`, so that here, and in no other thread, it keeps everything."""
    return function(*args) if _PLAIN.get() else _checkpoint(function, preserve_rng_state, *args)


class Substitutions(TorchFunctionMode):
    """Replaces the operations of the table wherever a model calls them, and tensors by ``stand_ins``, by their `id`.

    Nothing of the model is touched, so a tensor is replaced under whatever name or path the model reaches it.
    """

    def __init__(self, stand_ins: Mapping[int, Tensor] | None = None) -> None:
        super().__init__()
        self._stand_ins = stand_ins or {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._stand_ins:
            args = tuple(self._replaced(arg) for arg in args)
            kwargs = {name: self._replaced(arg) for name, arg in kwargs.items()}
        if func is COND:  # the model's own code is in the branches
            with self:
                return cond(*args, **kwargs)
        return TABLE.get(func, func)(*args, **kwargs)

    def _replaced(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._stand_ins.get(id(value), value)
        if type(value) in (list, tuple):
            return type(value)(self._replaced(v) for v in value)
        return value


def gradients(outputs: Any, inputs: Any, cotangents: Any = None, **options: Any) -> tuple[Tensor | None, ...]:
    """`torch.autograd.grad` under the substitutions: what is run again in it (checkpointing) runs as it ran before."""
    with gathering(), Substitutions():
        return opened(torch.autograd.grad)(outputs, inputs, cotangents, **options)


COND = torch.ops.higher_order.cond


def cond(pred: Any, true_fn: Callable[..., Any], false_fn: Callable[..., Any], operands: Any = ()) -> Any:
    """The branch that is taken, run eagerly."""
    return (true_fn if bool(pred) else false_fn)(*operands)


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    result = (input + 3).clamp(0, 6) / 6
    return input.copy_(result) if inplace else result


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """g v / ‖v‖ (Salimans & Kingma 2016, arXiv 1602.07868, eq. 2), the norm over all axes but ``dim``."""
    return v * (g / norm_except_dim(v, 2, dim))


def norm_except_dim(v: Tensor, pow: int = 2, dim: int = 0) -> Tensor:
    axes = None if dim == -1 else [axis for axis in range(v.ndim) if axis != dim % v.ndim]
    return vector_norm(v, pow, dim=axes, keepdim=axes is not None)


def batch_norm(
    input: Tensor,
    running_mean: Maybe,
    running_var: Maybe,
    weight: Maybe = None,
    bias: Maybe = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """In train mode without the running statistics, whose update in place no transform allows."""
    if training:
        running_mean = running_var = None
    return _straightened(F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps))


def instance_norm(*args: Any, **options: Any) -> Tensor:
    return _straightened(F.instance_norm(*args, **options))


def _straightened(out: Tensor) -> Tensor:
    """The same, to which the gradient comes in the order of its memory: of one datum, others give wrong ones on the CPU."""
    one = out.ndim > 2 and len(out) == 1 and out.is_contiguous()
    return out.flatten().view(out.shape) if one else out


def attention(*args: Any, **options: Any) -> Tensor:
    """By the math kernel, whatever the model itself asks for."""
    others = torch.backends.cuda
    if others.flash_sdp_enabled() or others.mem_efficient_sdp_enabled() or others.cudnn_sdp_enabled():
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(*args, **options)
    return F.scaled_dot_product_attention(*args, **options)


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """With a bound on the norms, which PyTorch enforces in place, the bounded rows are a copy's.

    The padding's row is a constant, as to PyTorch's backward pass; its forward mode would differentiate in it. Gradients
    are not scaled by frequencies: these are no derivatives, and a matrix that is made of them is not symmetric.
    """
    if max_norm is not None:
        bounded = weight.detach().clone()
        torch.embedding_renorm_(bounded, input.contiguous(), max_norm, norm_type)
        weight = weight + (bounded - weight).detach()  # PyTorch does not differentiate the bound
    padding = -1 if padding_idx is None else padding_idx % weight.shape[0]
    found = torch.embedding(weight, input, padding, False, False)
    return found if padding_idx is None else torch.where((input == padding).unsqueeze(-1), found.detach(), found)


def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Maybe = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Maybe = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
    noted: Callable[[Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Embed, then reduce each bag over a padded axis; ``noted`` gets the rows, and which of them are in a bag."""
    if weight.dtype == torch.long and input.is_floating_point():
        input, weight = weight, input
    if input.ndim == 1:
        assert offsets is not None
        ends = offsets[1:] if include_last_offset else torch.cat([offsets[1:], offsets.new_tensor([len(input)])])
        starts = offsets[:-1] if include_last_offset else offsets
        if not len(input):  # one row that is in no bag
            input = input.new_zeros(1)
            per_sample_weights = None if per_sample_weights is None else per_sample_weights.new_zeros(1)
        place = starts[:, None] + torch.arange(max(int((ends - starts).max()), 1), device=input.device)
        seen, place = place < ends[:, None], place.clamp(max=len(input) - 1)
        input = input[place]
        per_sample_weights = None if per_sample_weights is None else per_sample_weights[place]
    else:
        seen = torch.ones_like(input, dtype=torch.bool)
    if padding_idx is not None:
        seen = seen & (input != padding_idx % weight.shape[0])
    rows = embedding(input, weight, None, max_norm, norm_type)
    if noted is not None:
        noted(rows, seen)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights[..., None]
    if mode == "max":
        largest = rows.masked_fill(~seen[..., None], -torch.inf).amax(1)
        return torch.where(seen.any(1)[:, None], largest, 0.0)
    total = (rows * seen[..., None]).sum(1)
    return total if mode == "sum" else total / seen.sum(1, keepdim=True).clamp(min=1)


def cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str = "") -> Tensor:
    """Distances of all pairs of rows, by their differences."""
    return vector_norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p, dim=-1)


def pdist(input: Tensor, p: float = 2.0) -> Tensor:
    first, second = torch.triu_indices(len(input), len(input), 1, device=input.device)
    return vector_norm(input[first] - input[second], p, dim=-1)


def grouped_mm(
    mat_a: Tensor, mat_b: Tensor, *, offs: Maybe = None, bias: Maybe = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """One product for each group of rows, as in a mixture of experts: in any precision and layout."""
    if offs is None:
        out = mat_a @ mat_b
    elif mat_a.ndim == 2 and mat_b.ndim == 3:
        ends = offs.tolist()
        parts = [mat_a[a:b] @ mat_b[k] for k, (a, b) in enumerate(zip([0, *ends], ends, strict=False))]
        out = F.pad(torch.cat(parts), (0, 0, 0, len(mat_a) - ends[-1]))
    else:
        function = getattr(F, "grouped_mm", None) or torch._grouped_mm
        return function(mat_a, mat_b, offs=offs, bias=bias, out_dtype=out_dtype)
    out = out if bias is None else out + bias
    return out if out_dtype is None else out.to(out_dtype)


def linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Maybe = None, options: Any = None, **loss: Any
) -> Tensor:
    """Plain, since the chunked form's second derivative is wrong."""
    given = {name: option for name, option in loss.items() if option is not None}
    return F.cross_entropy(F.linear(input, linear_weight, linear_bias), target, **given)


def multi_margin_loss(
    input: Tensor, target: Tensor, p: int = 1, margin: float = 1.0, weight: Maybe = None, *reduced: Any, **how: Any
) -> Tensor:
    rows, labels = torch.atleast_2d(input), torch.atleast_1d(target)
    violation = (margin - rows.gather(1, labels[:, None]) + rows).clamp(min=0) ** p
    if weight is not None:
        violation = violation * weight[labels][:, None]
    others = ~F.one_hot(labels, rows.shape[1]).bool()
    losses = (violation * others).sum(1) / rows.shape[1]
    return _reduced(losses.reshape(target.shape), *reduced, **how)


def multilabel_margin_loss(input: Tensor, target: Tensor, *reduced: Any, **how: Any) -> Tensor:
    """A row of targets is a list of labels that ends at its first -1."""
    rows, labels = torch.atleast_2d(input), torch.atleast_2d(target)
    listed = (labels >= 0).cumprod(1).to(rows.dtype)
    labels = labels.clamp(min=0)
    others = 1 - torch.zeros_like(rows).scatter_reduce(1, labels, listed, "amax")
    slack = (1 - rows.gather(1, labels).unsqueeze(2) + rows.unsqueeze(1)).clamp(min=0)
    losses = (listed.unsqueeze(2) * others.unsqueeze(1) * slack).sum((1, 2)) / rows.shape[1]
    return _reduced(losses.reshape(input.shape[:-1]), *reduced, **how)


def _reduced(
    losses: Tensor, size_average: bool | None = None, reduce: bool | None = None, reduction: str = "mean"
) -> Tensor:
    if size_average is not None or reduce is not None:
        reduction = torch.nn._reduction.legacy_get_string(size_average, reduce)
    return losses if reduction == "none" else losses.sum() if reduction == "sum" else losses.mean()


TABLE: dict[Any, Callable[..., Any]] = {
    F.hardsigmoid: hardsigmoid,
    torch._weight_norm: weight_norm,
    torch.norm_except_dim: norm_except_dim,
    F.batch_norm: batch_norm,
    F.instance_norm: instance_norm,
    F.scaled_dot_product_attention: attention,
    F.embedding: embedding,
    F.embedding_bag: embedding_bag,
    torch.cdist: cdist,
    torch.pdist: pdist,
    F.multi_margin_loss: multi_margin_loss,
    F.multilabel_margin_loss: multilabel_margin_loss,
    **NORMS,
}
for _owner, _name, _function in (  # not every version of PyTorch has them
    (F, "grouped_mm", grouped_mm),
    (torch, "_grouped_mm", grouped_mm),
    (F, "linear_cross_entropy", linear_cross_entropy),
):
    if hasattr(_owner, _name):
        TABLE[getattr(_owner, _name)] = _function
# cuDNN's recurrent layers have no second derivative, the native ones have
for _layer in (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu):
    TABLE[_layer] = switched("cuDNN", lambda: torch.backends.cudnn.flags(enabled=False))(_layer)
TABLE |= overloads(TABLE)


@cache
def opened(function: Any) -> Callable[..., Any]:
    """A copy of a Python function of PyTorch's whose body runs inside a function mode, which sees the operations.

    The original would hand the whole call back to the mode.
    """
    closed = {name: (lambda *_: False) for name in function.__globals__ if name.startswith("has_torch_function")}
    scope = {**function.__globals__, **closed}
    copy = types.FunctionType(function.__code__, scope, argdefs=function.__defaults__, closure=function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
