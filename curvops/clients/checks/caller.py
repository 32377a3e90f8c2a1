"""What is the caller's own, bit for bit."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from curvops.risk.empirical_risk import EmpiricalRisk


def state_of(risk: EmpiricalRisk) -> Mapping[str, Any]:
    """All of the caller's that no operator may change: copies of tensors, modes, random states."""
    tensors = risk.model.tensors
    numpy: Any = sys.modules.get("numpy.random")
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    return {
        "tensors": {name: (id(t), t.detach().clone()) for name, t in tensors.items()},
        "gradients": {n: (id(t.grad), t.grad.clone()) for n, t in tensors.items() if t.is_leaf and t.grad is not None},
        "requires_grad": {name: t.requires_grad for name, t in tensors.items()},
        "modes": [id(module) for module in risk.model.training_modules],
        "random state": [torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices), random.getstate()],
        **({} if numpy is None else {"NumPy's random state": [torch.from_numpy(numpy.get_state()[1].copy())]}),
    }


def same(a: Any, b: Any) -> bool:
    """Whether two states are equal bit for bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b) or (a.shape == b.shape and torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)
