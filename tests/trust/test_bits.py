"""No clock decides: the same bits and the same passes, whatever else the machine does."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from oracles import IMPLICIT, Case, real
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from trust.support import CE, Model, labels

MODELS = ["linear", "mlp", "cnn", "attention"]


def attended(net, X):
    q, k, v = net.qkv(X).chunk(3, -1)
    return net.head(net.norm(X + F.scaled_dot_product_attention(q, k, v)).mean(1))


def case(name):
    torch.manual_seed(0)
    net = Model(attended)
    net.qkv, net.norm, net.head = nn.Linear(8, 24), nn.LayerNorm(8), nn.Linear(8, 3)
    mlp = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))
    cnn = nn.Sequential(nn.Conv2d(2, 6, 3), nn.GroupNorm(2, 6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3))
    models = {"linear": (nn.Linear(8, 3), 8), "mlp": (mlp, 8), "cnn": (cnn, 2, 6, 6), "attention": (net, 5, 8)}
    model, *shape = models[name]
    return Case(model, CE, [(real(n, *shape, seed=n), labels(n)) for n in (8, 8, 5)])


def results():
    for name in MODELS:
        for kind in ("Hessian", "GGN", "EKFAC" if name in ("linear", "cnn") else "KFAC"):
            op = case(name).make(kind)
            v = real(op.shape[1], 6, seed=3)
            found = [op @ v[:, k] for k in range(6)] + [op @ v, op.to_dense() @ v]
            with op.linearized():
                found += [op @ v[:, k] for k in range(6)] + [op @ v]
            for k, result in enumerate(found):
                ramp = torch.arange(result.numel(), dtype=torch.float64).cos()
                yield f"{name} {kind} {k} {float(result.flatten() @ ramp).hex()} {float(result.abs().max()).hex()}"


SCRIPT = """
import sys, threading, torch
sys.path[:0] = sys.argv[1:]
from trust import test_bits
torch.set_default_dtype(torch.float64)

def burn():
    while running:
        torch.ones(300, 300) @ torch.ones(300, 300)

running = [1]
threading.Thread(target=burn).start()
print(*test_bits.results(), sep="\\n")
running.clear()
"""


def test_two_runs_of_one_script_give_the_same_bits():
    tests = Path(__file__).resolve().parents[1]
    script = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tests.parent), str(tests)]
    loaded = subprocess.run(script, capture_output=True, text=True, check=True).stdout.splitlines()
    idle = list(results())
    assert len(idle) == 4 * 3 * 15
    assert [a for a, b in zip(idle, loaded, strict=True) if a != b] == []


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", MODELS[1:])
@pytest.mark.parametrize("kind", IMPLICIT)
def test_each_product_makes_the_same_passes(name, kind):
    c = case(name)
    op, v, forwards = c.make(kind), real(sum(p.numel() for p in c.params.values())), []
    c.model.register_forward_hook(lambda *_: forwards.append(1))

    def passes(number):
        for _ in range(number):
            forwards.clear()
            with Count() as count:
                op @ v
            yield count.calls, len(forwards)

    outside = list(passes(4))
    assert outside[2:] == outside[1:-1]
    with op.linearized():
        inside = list(passes(8))
    assert inside[2:] == inside[1:-1]
    assert inside[1][0].total() < outside[1][0].total()
    assert [*passes(1)] == outside[-1:]
