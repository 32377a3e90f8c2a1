"""Kronecker operators of models whose parameters are cut over two processes, killed and made again."""

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from curvops import Checkpoint, EKFACLinearOperator


class Stops:
    """Batches of several walks, of which one never comes."""

    def __init__(self, batches: Any, last: int) -> None:
        self.batches, self.left = batches, last

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            if not self.left:
                raise KeyError("killed")
            self.left -= 1
            yield batch


def attempt(call: Any) -> str:
    """What a call says."""
    try:
        return f"no error: {call()}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def resumed(
    model: nn.Module, loss: nn.Module, own: dict[str, Tensor], data: Any, *ends: tuple[int, int]
) -> dict[str, float]:
    """Differences from one that was not killed after so many batches; one process may not have written the last place."""
    passes: list[int] = []
    hook = model.register_forward_pre_hook(lambda *_: passes.append(0))
    make = partial(EKFACLinearOperator, model, loss, own, memory_budget=0, check_deterministic=False)
    expected, found = make(data).to_dense(), {}
    all_passes, rank = len(passes), dist.get_rank()
    with tempfile.TemporaryDirectory() as own_folder:
        for last, behind in ends:
            names: list[Any] = [f"{own_folder}/{last}-{behind}.safetensors"]
            dist.broadcast_object_list(names)
            file, folder = Checkpoint(names[0], every=1), Path(names[0]).parent
            said = attempt(partial(make, Stops(data, last), checkpoint=file))
            assert said == "KeyError: 'killed'", said
            mine = list(folder.glob(f"{last}-{behind}.{rank}-of-2.*"))
            assert len(mine) == (2 if last < len(data) else 4), mine
            if behind and rank:
                max(mine, key=lambda path: path.stat().st_mtime_ns).unlink()
            dist.barrier()
            passes.clear()
            op = make(data, checkpoint=file)
            assert len(passes) < all_passes, (last, behind, len(passes), all_passes)
            found[f"{last} batches, {behind} behind"] = float((op.to_dense() - expected).abs().max())
        said = attempt(partial(make, data, checkpoint=file, seed=5))
        assert "is a checkpoint of another computation: seed" in said, said
        if rank:  # damaged files of one process are an error in all
            for path in folder.glob(f"{last}-{behind}.{rank}-of-2.*"):
                path.write_bytes(path.read_bytes()[:-20])
        dist.barrier()
        said = attempt(partial(make, data, checkpoint=file))
        assert said.startswith(("RanksError: checkpoint: another process", "Unreadable: ")[rank]), said
        dist.barrier()
    hook.remove()
    return found
