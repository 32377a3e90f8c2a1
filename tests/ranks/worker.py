"""Started in three processes: computes each case with the data shared, and reports the differences from what one process found."""

import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from problems import PROBLEMS
from ranks.cases import BATCHES, SHARES, cases, others, spread, values, wanted

from curvops import EKFACLinearOperator, KFACLinearOperator, KFOCLinearOperator


def difference(found: Any, expected: Any, group: Any) -> float | str:
    """The largest difference relative to the largest entry, or what is wrong."""
    if isinstance(found, str) or isinstance(expected, str):
        # other batches may be the first to be refused
        return 0.0 if str(found).split(":")[0] == str(expected).split(":")[0] else f"{found}, alone {expected}"
    errors = [0.0]
    for key, tensor in found.items():
        if tensor.shape != expected[key].shape:
            return f"{key}: {tuple(tensor.shape)}, alone {tuple(expected[key].shape)}"
        scale = float(expected[key].abs().max()) or 1.0
        errors.append(float((tensor - expected[key]).abs().max().nan_to_num(1.0)) / scale)
        same = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
        dist.all_gather(same, tensor.contiguous(), group=group)
        if not all(torch.equal(other, tensor) for other in same):
            return f"{key}: other bits in another process"
    return max(errors)


def share(group: Any) -> float | str:
    """The blocks of all processes are those of the whole operator, each once."""
    p = PROBLEMS["mlp"]()
    whole = KFACLinearOperator(p.model, p.loss, p.params, p.data(), fisher_type="type-2")
    mine = KFACLinearOperator(
        p.model, p.loss, p.params, p.data() if dist.get_rank() == 0 else [], fisher_type="type-2", process_group=group
    ).share()
    names: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(names, mine.domain.names, group=group)
    if sorted(name for some in names for name in some) != sorted(p.params):
        return f"shares {names}"
    return float((mine.to_dense() - whole[list(mine.domain.names)].to_dense()).abs().max())


def spilled(group: Any) -> float | str:
    """Sums and eigenvectors in files have the bits of those in memory."""
    p = PROBLEMS["mlp"]()
    data = p.data() if dist.get_rank() == 0 else []
    found = []
    for files in ({}, {"spill": tempfile.gettempdir()}):
        options: Any = {"process_group": group, "memory_budget": 0, **files}
        ops = [make(p.model, p.loss, p.params, data, **options) for make in (EKFACLinearOperator, KFOCLinearOperator)]
        found.append(torch.cat([op.to_dense() for op in ops]))
        notes = [note for op in ops for note in op.explain().notes if note.startswith("taken in files of spill=")]
        if len(notes) != 2 * bool(files):
            return f"notes {notes}"
    return 0.0 if torch.equal(*found) else "other bits in files"


def compared(number: int, group: Any, expected: dict[str, Any]) -> dict[str, float | str]:
    """What so many processes compute."""
    found: dict[str, float | str] = {}
    for how, shares in SHARES[number].items():
        own = shares[dist.get_rank()]
        for name, make, p in cases():
            if wanted(name, how):
                data = [p.data(*BATCHES)[k] for k in own]
                found[f"{how}: {name}"] = difference(
                    values(name, make, p, data, process_group=group), expected[name], group
                )
        p = PROBLEMS["mlp"]()
        data = [p.data(*BATCHES)[k] for k in own]
        found[f"{how}: others"] = difference(others(p, data, process_group=group), expected["others"], group)
    found["spread"] = difference(spread(PROBLEMS["mlp"](), group), expected["spread"], group)
    found["share"] = share(group)
    found["spill"] = spilled(group)
    return found


def main(references: Path) -> dict[int, dict[str, float | str]]:
    """What groups of one, two and all three processes compute, one after the other, of those that have this one."""
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    groups = {1: dist.new_group([0]), 2: dist.new_group([0, 1]), 3: dist.group.WORLD}
    expected = torch.load(references, weights_only=True)
    found = {}
    for number, group in groups.items():
        if dist.get_rank() < number:
            found[number] = compared(number, group, expected)
        dist.barrier()
    return found
