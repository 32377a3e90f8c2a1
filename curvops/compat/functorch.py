"""Dense matrices by `torch.func` on all data at once, which the peer's examples compare with; no operator is used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, grad_and_value, jacrev, vjp, vmap
from torch.nn import Module

from curvops.compat.arguments import functional, problem

Data = Iterable[tuple[Any, Tensor]]
Function = Callable[[Tensor], Tensor]


def functorch_hessian(
    model_func: Any, loss_func: Module, params: Any, data: Data, input_key: str | None = None
) -> Tensor:
    """The Hessian, ``[D, D]``."""
    output, flat, y = _whole(model_func, params, data, input_key)
    return jacrev(grad(_loss(loss_func, y, output)))(flat)


def functorch_ggn(model_func: Any, loss_func: Module, params: Any, data: Data, input_key: str | None = None) -> Tensor:
    """The generalized Gauss-Newton matrix, ``[D, D]``."""
    output, flat, y = _whole(model_func, params, data, input_key)
    # products with the Hessian of the loss, which is symmetric
    curve = vjp(grad(_loss(loss_func, y)), output(flat))[1]
    jacobian = jacrev(output)(flat)
    curved = vmap(curve, in_dims=-1, out_dims=-1)(jacobian)[0]
    return jacobian.flatten(0, -2).T @ curved.flatten(0, -2)


def functorch_empirical_fisher(
    model_func: Any, loss_func: Any, params: Any, data: Data, input_key: str | None = None
) -> Tensor:
    """The empirical Fisher matrix, ``[D, D]``."""
    output, flat, y = _whole(model_func, params, data, input_key)
    unreduced = type(loss_func)(reduction="none")

    def terms(v: Tensor) -> Tensor:
        losses = unreduced(output(v), y)
        return losses.flatten() if isinstance(loss_func, torch.nn.CrossEntropyLoss) else losses.sum(-1).flatten()

    rows = jacrev(terms)(flat)
    return rows.T @ rows / (1 if loss_func.reduction == "sum" else y.numel())


def functorch_jacobian(model_func: Any, params: Any, data: Data, input_key: str | None = None) -> Tensor:
    """The Jacobian of all outputs, ``[entries, D]``."""
    output, flat, _ = _whole(model_func, params, data, input_key)
    return jacrev(lambda v: output(v).flatten())(flat)


def functorch_gradient_and_loss(
    model_func: Any, loss_func: Module, params: Any, data: Data, input_key: str | None = None
) -> tuple[list[Tensor], Tensor]:
    """The gradient, a list of the parameters' shapes, and the loss."""
    output, flat, y = _whole(model_func, params, data, input_key)
    gradient, loss = grad_and_value(_loss(loss_func, y, output))(flat)
    tensors = list(problem(model_func, params)[1].values())
    parts = gradient.split([t.numel() for t in tensors])
    return [part.view_as(t) for part, t in zip(parts, tensors, strict=True)], loss


def functorch_gradient(
    model_func: Any, loss_func: Module, params: Any, data: Data, input_key: str | None = None
) -> list[Tensor]:
    """The gradient, a list of the parameters' shapes."""
    return functorch_gradient_and_loss(model_func, loss_func, params, data, input_key)[0]


def _loss(loss_func: Module, y: Tensor, output: Function = lambda z: z) -> Function:
    def loss(v: Tensor) -> Tensor:
        found: Tensor = loss_func(output(v), y)
        return found

    return loss


def _whole(model_func: Any, params: Any, data: Data, input_key: str | None) -> tuple[Function, Tensor, Tensor]:
    """The output on all data as a function of the flat parameters, these, and all targets."""
    function, named = problem(model_func, params)
    function = functional(function) if isinstance(function, Module) else function
    device = next(iter(named.values())).device
    inputs, targets = zip(*data, strict=True)
    if isinstance(inputs[0], Mapping):
        whole: Any = {input_key: torch.cat([X[input_key] for X in inputs]).to(device)}
    else:
        whole = torch.cat(inputs).to(device)
    flat = torch.cat([tensor.detach().flatten() for tensor in named.values()])

    def output(v: Tensor) -> Tensor:
        parts = v.split([tensor.numel() for tensor in named.values()])
        return function({name: p.view_as(named[name]) for name, p in zip(named, parts, strict=True)}, whole)

    return output, flat, torch.cat(targets).to(device)
