"""PyTorch's functions by what they do to a tensor that the taps follow."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from curvops.substitutions import TABLE, embedding, grouped_mm, linear_cross_entropy, opened


def named(names: str) -> set[Any]:
    """The functions and the methods with some names."""
    return {getattr(owner, name) for name in names.split() for owner in (torch, Tensor) if hasattr(owner, name)}


# what applies parameters by operations inside: to be run so that a mode sees them
OPENED = {F.multi_head_attention_forward: opened(F.multi_head_attention_forward)} | {
    func: substitute
    for func, substitute in TABLE.items()
    if substitute in (embedding, grouped_mm, linear_cross_entropy)
}
# give an entry several times if asked to
INDEXING = {Tensor.__getitem__} | named("index_select gather take take_along_dim repeat_interleave unfold")
# give a part or a rearrangement of a tensor
VIEWS = (
    INDEXING
    | {descriptor.__get__ for descriptor in (Tensor.T, Tensor.mT, Tensor.H, Tensor.mH)}  # type: ignore[attr-defined]
    | named(
        "t transpose permute view reshape flatten unflatten ravel chunk split unbind narrow select squeeze unsqueeze "
        "contiguous movedim moveaxis swapaxes swapdims view_as reshape_as tensor_split split_with_sizes adjoint "
        "diagonal flip roll"
    )
)
CASTS = named("to float double half bfloat16 type type_as clone")
# add or broadcast, followed for what is looked up in a table, too
EXPANDS = named("expand expand_as broadcast_to")
ADDS = named("add add_ __add__ __radd__ __iadd__") | EXPANDS
# read a tensor without its values, or without a gradient
ATTRIBUTES = {
    *("shape", "dtype", "device", "ndim", "requires_grad", "is_cuda", "layout", "grad", "is_leaf", "grad_fn", "data"),
    *("itemsize", "nbytes", "names", "is_sparse", "is_nested", "is_quantized", "is_meta"),
}
QUERIES = named(
    "size dim numel stride is_contiguous __len__ __hash__ is_floating_point is_complex is_tensor storage_offset "
    "untyped_storage data_ptr element_size get_device detach is_autocast_enabled ndimension "
    "_has_compatible_shallow_copy_type"  # asked by a module's `to` and its like, which routers call as they run
)
# arrange rows by the data's values: their layout must be proved for each batch
DATA_DEPENDENT = {F.one_hot} | named(
    "nonzero masked_select argwhere sort argsort unique unique_consecutive topk argmax argmin multinomial index_select "
    "gather take take_along_dim scatter scatter_ scatter_add scatter_add_ scatter_reduce scatter_reduce_ index_add "
    "index_add_ index_copy index_copy_ index_put index_put_ masked_scatter masked_scatter_ searchsorted bucketize "
    "index_reduce index_reduce_ segment_reduce repeat_interleave put put_"
    " cummax cummin logcumsumexp kthvalue mode msort"
)

# leave an axis out
REDUCTIONS = {Tensor.__getitem__} | named(
    "select mean sum amax amin max min prod std var std_mean var_mean norm logsumexp median nanmean nansum quantile"
)


def is_query(func: Any) -> bool:
    """Whether a function reads a tensor without its values, or without a gradient."""
    return func in QUERIES or getattr(getattr(func, "__self__", None), "__name__", "") in ATTRIBUTES


def is_data_dependent(func: Any, args: Any) -> bool:
    """Whether a function may arrange rows by the data's values."""
    if func in (Tensor.__getitem__, Tensor.__setitem__):
        parts = args[1] if isinstance(args[1], tuple) else (args[1],)
        return any(getattr(p, "ndim", 0) > 0 for p in parts)  # tensors, or arrays
    return func in DATA_DEPENDENT or (func is torch.where and len(args) <= 1)
