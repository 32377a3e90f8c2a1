"""Peak memory of curvature on a GPT-2 with its vocabulary of 50,257, beside a training step of the same batch.

Usage: python benchmarks/gpt2_memory.py [--layers 12] [--width 768] [--tokens 128] [--batch 2] [--only NAME] [--at-most 2]
The model has random weights, and its head is tied to the embedding. Each piece of work runs in a process of its own and
is measured from the model's construction to the process' high-water mark. Exit status 1 if KFAC-MC takes more than
--at-most training steps.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from curvops import EFLinearOperator, GGNLinearOperator, HessianLinearOperator, KFACLinearOperator
from curvops.operators.linear_operator import LinearOperator
from curvops.tour.meter import measured

VOCABULARY = 50_257
MIB = 2**20


class NextToken(nn.Module):
    """GPT-2 with its logits `[batch, vocabulary, tokens]`, as the cross-entropy takes them."""

    def __init__(self, model: GPT2LMHeadModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits."""
        return self.model(ids).logits.movedim(-1, 1)


Problem = tuple[NextToken, nn.Module, dict[str, nn.Parameter], list[tuple[Tensor, Tensor]]]


def gpt2(layers: int, width: int, tokens: int, batch: int, vocabulary: int = VOCABULARY) -> Problem:
    """Make the model, its loss, its parameters and one batch of random text."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocabulary, n_layer=layers, n_embd=width, n_head=max(width // 64, 1), bos_token_id=0, eos_token_id=0
    )
    model = NextToken(GPT2LMHeadModel(config)).eval()
    text = torch.randint(vocabulary, (batch, tokens + 1))
    return model, nn.CrossEntropyLoss(), dict(model.named_parameters()), [(text[:, :-1], text[:, 1:])]


def training_step(problem: Problem) -> None:
    """Forward, loss, backward and a step of SGD."""
    model, loss, params, data = problem
    optimizer = torch.optim.SGD(params.values(), lr=0.1)
    for X, y in data:
        loss(model(X), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def kfac_mc(problem: Problem) -> dict[str, float]:
    """KFAC with one Monte-Carlo sample, and its trace."""
    kfac = KFACLinearOperator(*problem, fisher_type="mc", separate_weight_and_bias=False)
    kfac.trace()
    return {"factors": kfac.explain().memory / MIB}


def product(kind: Callable[..., LinearOperator]) -> Callable[[Problem], object]:
    """One product with a vector, which is the caller's and was there before."""
    return lambda problem: kind(*problem) @ VECTOR


WORK: dict[str, Callable[[Problem], object]] = {
    "training step": training_step,
    "KFAC-MC": kfac_mc,
    "GGN product": product(GGNLinearOperator),
    "EF product": product(EFLinearOperator),
    "Hessian product": product(HessianLinearOperator),
}
VECTOR = torch.empty(0)


def measure(name: str, size: tuple[int, int, int, int]) -> dict[str, float]:
    """Measure one piece of work in this process."""
    global VECTOR
    for problem in (gpt2(1, 64, 4, 1, vocabulary=11), gpt2(*size)):  # the first loads what is loaded lazily
        if "product" in name:
            VECTOR = torch.ones(sum(p.numel() for p in problem[2].values()))
        cpu = time.process_time()
        with measured(torch.device("cpu")) as cost:
            more = WORK[name](problem)
    if cost.peak_bytes is None:
        raise SystemExit("the high-water mark of this process' memory cannot be seen here")
    cpu = time.process_time() - cpu
    return {
        "peak": cost.peak_bytes / MIB,
        "seconds": cost.seconds,
        "cpu": cpu,
        **(more if isinstance(more, dict) else {}),
    }


def main() -> int:
    """Measure everything, each in a process of its own, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for option, default in (("layers", 12), ("width", 768), ("tokens", 128), ("batch", 2)):
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--only", action="append", choices=list(WORK), help="besides the training step")
    parser.add_argument("--at-most", type=float, default=2.0)
    parser.add_argument("--work", choices=list(WORK), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        size = options.layers, options.width, options.tokens, options.batch
        print(json.dumps(measure(options.work, size)))
        return 0
    kept = sum(p.numel() * p.itemsize for p in gpt2(options.layers, options.width, 1, 1)[2].values()) / MIB
    print(
        f"{options.layers} layers of width {options.width}, {options.batch} × {options.tokens} tokens: {kept:,.0f} MiB"
    )
    print(f"{'':<18}{'peak MiB':>10}{'in steps':>10}{'CPU s':>8}")
    step, ratios = 0.0, {}
    for name in WORK:
        if options.only and name not in ("training step", *options.only):
            continue
        command = [sys.executable, *sys.argv, "--work", name]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        if ran.returncode:
            raise SystemExit(f"{name} failed:\n{ran.stderr}")
        found = json.loads(ran.stdout.splitlines()[-1])
        step = step or found["peak"]
        ratios[name] = found["peak"] / step
        factors = f"   of it the factors: {found['factors']:,.0f}" if "factors" in found else ""
        print(f"{name:<18}{found['peak']:>10,.0f}{ratios[name]:>10.2f}{found['cpu']:>8.1f}{factors}", flush=True)
    return int(ratios.get("KFAC-MC", 0.0) > options.at_most)


if __name__ == "__main__":
    raise SystemExit(main())
