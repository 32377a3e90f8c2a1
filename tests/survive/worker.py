"""Computes one thing after another, each from its checkpoint, and waits to be killed at a step of one of them."""

import time
from pathlib import Path

import torch
from survive.cases import COMPUTATIONS, STOPS

from curvops import Checkpoint


def main(folder: Path, stopped: str = "", at: int = 0) -> None:
    """Everything, until it is killed at a step of what is to be stopped."""
    found, steps = {}, {}
    for name, compute in ((name, COMPUTATIONS[name]) for name in STOPS):

        def stop(count: int, name: str = name) -> None:
            steps[name] = count + 1
            if name == stopped and count == at:
                (folder / "here").touch()
                time.sleep(600)

        found[name] = compute(stop, Checkpoint(folder / f"{name}.safetensors", every=3))
    torch.save((found, steps), folder / "found.pt")
