"""What repeated work on small operators leaves behind: tensors, and memory of the process."""

from __future__ import annotations

import gc
import resource
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.fuzz_operators import problems


def live() -> int:
    """Tensors that Python knows of."""
    gc.collect()
    return sum(issubclass(type(each), Tensor) for each in gc.get_objects())


def memory(repeats: int) -> dict[str, tuple[int, int]]:
    """For each kind of work on small operators, tensors and KiB at its peak that repeating it left behind."""
    hessian, ggn, _, kfac, jacobian = (made.op for made in problems(torch.float64))
    v, outputs, names = torch.ones(10, dtype=torch.float64), torch.ones(5, dtype=torch.float64), "0.*"
    needing = v.clone().requires_grad_()
    work: dict[str, Callable[[], Any]] = {
        "product": lambda: hessian @ v,
        "sum and product": lambda: (2 * ggn + kfac).damped(0.1) @ v,
        "slice": lambda: hessian[names] @ v[:6],
        "block off the diagonal": lambda: ggn[names, "2.*"] @ v[6:],
        "Jacobian": lambda: jacobian.T @ (jacobian @ v) + jacobian.T @ outputs,
        "linearized": lambda: _inside(ggn, v),
        "solve": lambda: ggn.solve(v, 1.0).x,
        "structured solve": lambda: kfac.solve(v, 1.0).x,
        "trace": lambda: ggn.trace(num_products=6, method="hutchinson"),
        "gradient": lambda: torch.autograd.grad((hessian @ needing).sum(), needing),
        "refresh": lambda: kfac.refresh(decay=0.5),
    }
    left = {}
    for name, call in work.items():
        for _ in range(3):
            call()
        tensors, peak = live(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(repeats):
            call()
        left[name] = live() - tensors, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    return left


def _inside(operator: Any, v: Tensor) -> Tensor:
    with operator.linearized():
        return operator @ v
