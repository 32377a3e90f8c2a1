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

from trust.support import CE, labels


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.norm, self.head = nn.Linear(8, 24), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, X):
        q, k, v = self.qkv(X).chunk(3, -1)
        return self.head(self.norm(X + F.scaled_dot_product_attention(q, k, v)).mean(1))


def models():
    torch.manual_seed(0)
    return {
        "linear": (nn.Linear(8, 3), (8,)),
        "mlp": (nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 3)), (8,)),
        "cnn": (nn.Sequential(nn.Conv2d(2, 6, 3), nn.GroupNorm(2, 6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3)), (2, 6, 6)),
        "attention": (Attention(), (5, 8)),
    }  # fmt: skip


def case(name):
    model, shape = models()[name]
    return Case(model, CE, [(real(n, *shape, seed=n), labels(n)) for n in (8, 8, 5)])


def results():
    """Lines of a name and the bits of a number that sums up a result."""
    for name in models():
        for kind in ("Hessian", "GGN", "KFAC", "EKFAC"):
            op = case(name).make(kind)
            v = real(op.shape[1], 16, seed=3)
            found = [op @ v[:, k % 16] for k in range(4)] + [op @ v, op.to_dense() @ v]
            with op.linearized():
                found += [op @ v[:, k % 16] for k in range(8)] + [op @ v]
            for k, result in enumerate(found):
                ramp = torch.arange(result.numel(), dtype=torch.float64).cos()
                total, largest = float((result.flatten() * ramp).sum()), float(result.abs().max())
                yield f"{name} {kind} {k} {total.hex()} {largest.hex()}"


SCRIPT = """
import sys, threading, torch
sys.path[:0] = [{root!r}, {tests!r}]
from trust import test_bits
torch.set_default_dtype(torch.float64)

def burn():
    a = torch.randn(300, 300)
    while not stop.is_set():
        a = (a @ a).tanh()

stop = threading.Event()
threading.Thread(target=burn).start()
print(*test_bits.results(), sep="\\n")
stop.set()
"""


def test_two_runs_of_one_script_give_the_same_bits():
    """Here, and in a process of which another thread keeps a core busy."""
    tests = Path(__file__).resolve().parents[1]
    script = SCRIPT.format(root=str(tests.parent), tests=str(tests))
    loaded = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True)
    idle = list(results())
    assert len(idle) == 4 * 4 * 15
    assert [a for a, b in zip(idle, loaded.stdout.splitlines(), strict=True) if a != b] == []


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["mlp", "cnn", "attention"])
@pytest.mark.parametrize("kind", IMPLICIT)
def test_each_product_makes_the_same_passes(name, kind):
    c = case(name)
    op, v = c.make(kind), real(sum(p.numel() for p in c.params.values()))
    forwards = []
    c.model.register_forward_hook(lambda *_: forwards.append(1))

    def passes(number):
        found = []
        for _ in range(number):
            forwards.clear()
            with Count() as count:
                op @ v
            found.append((count.calls, len(forwards)))
        return found

    outside = passes(4)
    assert outside[2:] == outside[1:-1]
    with op.linearized():
        inside = passes(8)
    assert inside[2:] == inside[1:-1]
    assert inside[1][0].total() < outside[1][0].total()
    assert passes(1)[0] == outside[-1]
