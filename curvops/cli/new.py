"""`curvops new`: a file with a problem that runs as it is."""

from __future__ import annotations

from pathlib import Path

from curvops.cli.failures import Failure
from curvops.cli.session import Session
from curvops.files import replace_atomically

TEMPLATE = '''"""A problem for curvops: a model, a loss and data. Try it: curvops check {file}:problem"""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def problem():
    """Return model, loss and data; the command has seeded PyTorch (--seed) before it calls this."""
    # YOUR MODEL: any module that is called as model(X), with its weights loaded
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))
    # model.load_state_dict(torch.load("weights.pt", map_location="cpu"))
    model.eval()  # dropout and batch norm in train mode have no one curvature

    # YOUR LOSS: called as loss(model(X), y)
    loss = nn.CrossEntropyLoss()

    # YOUR DATA: batches (X, y) that come in the same order each time, so no shuffle and no random augmentation;
    # X may be a tensor, a tuple or a dict of tensors
    X = torch.randn(96, 4)
    y = (X @ torch.randn(4, 3)).argmax(1)
    data = DataLoader(TensorDataset(X, y), batch_size=32)

    return model, loss, data
    # of some parameters only: return model, loss, data, {{name: p for name, p in model.named_parameters() if …}}
    # with a loss that is a function, say what it does: return {{"model": …, "loss": …, "data": …, "reduction": "mean"}};
    # and where the size of a batch cannot be seen, "batch_size_fn": lambda X: X["input_ids"].shape[0]
'''


def run(session: Session, *, file: str, force: bool) -> None:
    """Write the template; a file that is there stays, unless ``force``."""
    path = Path(file)
    if path.suffix != ".py":
        raise Failure(f"'{path}' must end in .py, for instance '{path.with_suffix('.py')}'")
    if path.exists() and not force:
        raise Failure(f"'{path}' is there; --force overwrites it")
    if not path.parent.is_dir():
        raise Failure(f"there is no folder '{path.parent}'; make it first")
    try:
        replace_atomically(path, lambda partial: partial.write_text(TEMPLATE.format(file=path), encoding="utf-8"))
    except OSError as error:
        raise Failure(f"cannot write '{path}': {error.strerror}") from None
    target = f"{path}:problem"
    session.say(f"Wrote {path}. Put your model in, and then:\n  curvops check {target}\n  curvops tour {target}")
    session.answer({"file": str(path), "problem": target})
