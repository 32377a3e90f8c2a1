"""Numbers of PyTorch, NumPy and Python, and what other libraries multiply with."""

from __future__ import annotations

from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from curvops.extras import extra


def scipy_view(operator: Any, dtype: Any) -> Any:
    """A ``scipy.sparse.linalg.LinearOperator`` of an operator, on NumPy arrays of a dtype, by default its own."""
    np, linalg = extra("numpy", "to_scipy()"), extra("scipy.sparse.linalg", "to_scipy()")
    own = torch.promote_types(operator.dtype, torch.float32)  # NumPy has no bfloat16
    numpy_dtype = np.dtype(dtype if dtype is not None else torch.empty(0, dtype=own, device="cpu").numpy().dtype)
    if numpy_dtype.kind not in "fc":
        raise TypeError(
            f"to_scipy: expected a floating-point or complex dtype, got {numpy_dtype}: products would be rounded to whole numbers."
        )

    def product(factor: Any, array: Any) -> Any:
        if np.iscomplexobj(array):
            return product(factor, array.real) + 1j * product(factor, array.imag)
        vector = torch.from_numpy(np.array(array)).to(factor.device, factor.dtype)
        return (factor @ vector).to("cpu", own).numpy().astype(numpy_dtype)

    forward, backward = partial(product, operator), partial(product, operator.adjoint())
    return linalg.LinearOperator(
        operator.shape, matvec=forward, rmatvec=backward, matmat=forward, rmatmat=backward, dtype=numpy_dtype
    )


def as_scalar(value: Any) -> float | None:
    """The number, or ``None`` of what is none."""
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        if value.requires_grad:
            raise TypeError(
                "s * A: the operator's multiple is a number without a gradient. Take s * (A @ v), or s.detach()."
            )
        return float(value)
    # an array without axes is a number, too
    array = not isinstance(value, Tensor) and getattr(value, "shape", None) == () and value.dtype.kind in "fiu"
    return float(value) if array or isinstance(value, Real) else None
