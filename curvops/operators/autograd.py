"""Products as PyTorch differentiates them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Product(torch.autograd.Function):
    """A product whose derivative is a product with the adjoint."""

    @staticmethod
    def forward(ctx: Any, columns: Tensor, operator: Any) -> Tensor:
        ctx.operator = operator
        # so that autograd refuses a backward pass once one of them has changed: it would take another matrix
        ctx.save_for_backward(*(tensor for tensor in operator._leaves() if not tensor.is_inference()))
        return operator._product(columns)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, None]:
        _ = ctx.saved_tensors
        return ctx.operator.adjoint() @ gradient, None
