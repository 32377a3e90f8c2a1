"""Kronecker operators of several processes: what they learn of the model together, sums of entries, eigenproblems."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from curvops.kronecker.groups import Group, Grouping, Key
from curvops.kronecker.state import Entry
from curvops.operators.eigen import eigh, has_basis
from curvops.ranks import Ranks
from curvops.space import describe
from curvops.spill import Spill


def agree(ranks: Ranks, grouping: Grouping, whole: dict[str, str]) -> bool:
    """Take over what the processes' passes have shown; whether all of them see the parameters in the same way.

    Where they do not, the data must be walked again with what was learnt: see `Grouping.again`. Afterwards all have the
    same groups in the same order, those too that their own data never reached.

    Args:
        ranks: The processes, which have met.
        grouping: The groups that the own data have shown.
        whole: Parameters that are known by whole gradients only, and why.
    """
    if ranks.alone:
        return True
    several = ranks.gather((whole, grouping.refuted, grouping.partners, grouping.groups))
    same = all(one[0].keys() == several[0][0].keys() and one[1].keys() == several[0][1].keys() for one in several)
    partners: dict[Key, object] = {}
    for its_whole, its_refuted, its_partners, _ in several:
        for mine, its in ((whole, its_whole), (grouping.refuted, its_refuted)):
            mine.update({name: why for name, why in its.items() if name not in mine})
        same = same and all(partners.setdefault(one, partner) == partner for one, partner in its_partners.items())
        grouping.learn(its_partners)
    if not same:
        return False
    grouping.restart()
    for group in (group for *_, groups in several for group in groups.values()):
        grouping.add(group)
    return not grouping.again


def summed(
    ranks: Ranks,
    groups: Mapping[Key, Group],
    entries: Mapping[Key, Entry],
    data: dict[str, int],
    reduces: bool,
    spill: Spill,
) -> dict[Key, Entry]:
    """Entries of the groups, each the sum of what the processes have, of which some may have none.

    Args:
        ranks: The processes, which have met.
        groups: The groups, the same for all.
        entries: What this process has.
        data: For each parameter its number of data, which becomes that of all processes.
        reduces: Whether A is divided by the number of data, those included that never reached the layer.
        spill: Where the sums lie.
    """
    if ranks.alone:
        return dict(entries)
    several = ranks.gather(({key: _outline(entry) for key, entry in entries.items()}, data))
    found: dict[Key, Entry] = {}
    for key in groups:
        # of each process, and how many rows it has where none was seen
        outlines = [(own.get(key), its_data[groups[key].names[0]] if reduces else 0) for own, its_data in several]
        if known := [outline for outline, _ in outlines if outline is not None]:
            found[key] = _own(entries.get(key), known, groups[key], spill)
            for s in sorted({side for one in known for side in one.rows}):
                found[key].rows[s] = sum(rows if one is None else one.rows.get(s, rows) for one, rows in outlines)
    data.update({name: sum(its_data[name] for _, its_data in several) for name in data})
    ranks.add_all([t for entry in found.values() if entry.kind != "identity" for t in entry.tensors.values()])
    return found


def _outline(entry: Entry) -> Entry:
    return replace(entry, tensors={name: torch.empty_like(t, device="meta") for name, t in entry.tensors.items()})


def _own(entry: Entry | None, known: Sequence[Entry], group: Group, spill: Spill) -> Entry:
    """What this process adds, in tensors of its own; zeros where its data never reached the group."""
    kinds, outlines = {one.kind for one in known}, dict[str, Tensor]()
    for one in known:
        for name, t in one.tensors.items():
            like = outlines.setdefault(name, t)
            if (like.shape, like.dtype) != (t.shape, t.dtype) or len(kinds) > 1:
                raise ValueError(
                    f"{describe(group.names)}: the data of the processes give blocks of different kinds or shapes, which do not add. "
                    "Pass rule=BlockRule(…) so that all factors are dense or all are diagonal."
                )
    (kind,), mine = kinds, entry.tensors if entry is not None else {}
    # copies: a bias has its weight's outputs, and each would be summed
    own = {name: spill.zeros(tuple(t.shape), t.dtype) for name, t in outlines.items()}
    for name, tensor in own.items():
        if name in mine:
            tensor.copy_(mine[name])
        elif kind == "identity":
            tensor.fill_(1)
    return Entry(kind, own)


def assigned(costs: Sequence[float], number: int) -> list[int]:
    """For each job the process that does it: the dearest first, each to the one with the least to do.

    Example:
        >>> assigned([1.0, 5.0, 3.0, 2.0], 2)
        [0, 0, 1, 1]
    """
    loads, owners = [0.0] * number, [0] * len(costs)
    for job in sorted(range(len(costs)), key=lambda job: -costs[job]):
        owners[job] = loads.index(min(loads))
        loads[owners[job]] += costs[job]
    return owners


def decompositions(ranks: Ranks, factors: list[tuple[Tensor, str]], spill: Spill) -> list[tuple[Tensor, Tensor | None]]:
    """Eigenvalues and eigenvectors of factors with labels (see `eigh`), which are given up one by one.

    Processes divide dense ones among them by their numbers of operations.
    """

    def decomposed(factor: Tensor, label: str) -> tuple[Tensor, Tensor | None]:
        values, vectors = eigh(factor, label)
        if vectors is not None:
            vectors = spill.put(vectors if ranks.alone else vectors.contiguous())
        return values, vectors

    owners = assigned(
        [len(f) * float(f.shape[-1]) ** 3 if has_basis(f.shape) else 0.0 for f, _ in factors], ranks.number
    )
    shapes = [(factor.shape, factor.dtype, factor.device) for factor, _ in factors]
    factors.reverse()
    found = [
        decomposed(*one) if not has_basis(one[0].shape) or owner == ranks.rank else None
        for owner in owners
        for one in [factors.pop()]
    ]
    if ranks.alone:
        return [one for one in found if one is not None]
    ranks.meet(f"{len(owners)} eigendecompositions")
    results: list[tuple[Tensor, Tensor | None]] = []
    for owner, one, (shape, dtype, device) in zip(owners, found, shapes, strict=True):
        values, vectors = one or (
            torch.empty(shape[:-1], dtype=dtype, device=device),
            spill.zeros(tuple(shape), dtype),
        )
        if vectors is not None:
            values, vectors = ranks.send(values.contiguous(), owner), ranks.send(vectors, owner)
        results.append((values, vectors))
    return results
