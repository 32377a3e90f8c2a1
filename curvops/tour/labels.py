"""Names of groups along a panel's sides: none overlaps another, however small the groups are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from curvops.tour.groups import shared_parts

LONGEST = 19  # letters of a name


@dataclass(frozen=True)
class Label:
    """A name for the groups `first` to `last`, in the middle of them at `centre` and written at `place` (points)."""

    text: str
    first: int
    last: int
    centre: float
    place: float


def placed_labels(
    names: Sequence[str], edges: Sequence[float], height: float, *, reach: float | None = None
) -> list[Label]:
    """Place names beside groups, so that each has room; small neighbours share one, such as `3–7`.

    Args:
        names: One for each group.
        edges: Where groups begin and end along the side, in points from its beginning, ascending.
        height: Room that a name takes, in points.
        reach: How far a name may be moved from the middle of its groups, by default its height.

    Returns:
        Labels in order, at least `height` apart, within the side but for half a height at its ends.

    Example:
        >>> [label.text for label in placed_labels("abcd", [0, 50, 51, 52, 80], height=7)]
        ['a', 'b', 'c', 'd']
        >>> [label.text for label in placed_labels(["n.1", "n.2", "n.3", "n.4"], [0, 9, 10, 11, 20], height=10, reach=5)]
        ['n.1', 'n.2–3', 'n.4']
    """
    names = [" ".join(name.split()) for name in names]
    reach = height if reach is None else reach
    runs = [(k, k) for k in range(len(names))]
    low, high = edges[0], edges[-1]
    while True:
        centres = [(edges[a] + edges[b + 1]) / 2 for a, b in runs]
        # the larger a group, the less its name is moved
        places = spread(centres, [edges[b + 1] - edges[a] for a, b in runs], height, low, high)
        moved = [abs(place - centre) for place, centre in zip(places, centres, strict=True)]
        if len(runs) <= 1 or (max(moved) <= reach and len(runs) * height <= high - low + height):
            break
        runs = _joined(names, runs, edges, moved, reach)
    texts = [_run_label(names[a], names[b]) if b > a else shortened(names[a]) for a, b in runs]
    found = zip(texts, runs, centres, places, strict=True)
    return [Label(text, a, b, centre, place) for text, (a, b), centre, place in found]


def spread(centres: Sequence[float], weights: Sequence[float], height: float, low: float, high: float) -> list[float]:
    """Places at least `height` apart that are nearest to ascending centres, by the weighted squares of the distances.

    They stay between `low` and `high`, as far as there is room.

    Example:
        >>> spread([0.0, 10.0, 11.0, 30.0], [1, 1, 3, 1], height=5, low=0.0, high=30.0)
        [0.0, 7.0, 12.0, 30.0]
    """
    # with k · height taken off, the places only have to ascend: pools of equal ones are at their mean
    pools: list[tuple[float, float, int]] = []
    for k, (centre, weight) in enumerate(zip(centres, weights, strict=True)):
        pools.append((centre - k * height, weight, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (a, v, m), (b, w, n) = pools[-2:]
            pools[-2:] = [((a * v + b * w) / (v + w), v + w, m + n)]
    shifted = [value for value, _, number in pools for _ in range(number)]
    top = max(low, high - (len(centres) - 1) * height)
    return [min(max(value, low), top) + k * height for k, value in enumerate(shifted)]


def spaced_edges(edges: Sequence[float], gap: float) -> list[int]:
    """Which of the inner edges have room for a line: at least `gap` apart, those between the largest groups first.

    Example:
        >>> spaced_edges([0, 10, 11, 12, 30], gap=3)
        [3]
    """
    sizes = [b - a for a, b in pairwise(edges)]
    kept: list[int] = []
    for k in sorted(range(1, len(edges) - 1), key=lambda k: -max(sizes[k - 1], sizes[k])):
        if all(abs(edges[k] - edges[other]) >= gap for other in kept):
            kept.append(k)
    return sorted(kept)


def run_name(first: str, last: str) -> str:
    """The name of all groups from the first to the last one.

    Example:
        >>> run_name("layer.3", "layer.12"), run_name("h.0.mlp", "h.5.mlp"), run_name("conv", "head")
        ('layer.3–12', 'h.0–5.mlp', 'conv–head')
    """
    a, b = first.split("."), last.split(".")
    ahead = shared_parts([a[:-1], b[:-1]])
    behind = shared_parts([a[ahead + 1 :][::-1], b[ahead + 1 :][::-1]])
    middle = f"{'.'.join(a[ahead : len(a) - behind])}–{'.'.join(b[ahead : len(b) - behind])}"
    return ".".join([*a[:ahead], middle, *a[len(a) - behind :]])


def shortened(name: str) -> str:
    """The last parts of a module's name, as many as fit; of a long part the middle is left out.

    Example:
        >>> shortened("encoder.layer.11.attention"), shortened("bert.embeddings.position_embeddings")
        ('…layer.11.attention', '…posit…n_embeddings')
    """
    name = " ".join(name.split())  # in one line
    if len(name) <= LONGEST:
        return name
    parts = name.split(".")
    kept = next((".".join(parts[k:]) for k in range(1, len(parts)) if len(".".join(parts[k:])) < LONGEST), parts[-1])
    cut = kept if len(kept) < LONGEST else f"{kept[:5]}…{kept[7 - LONGEST :]}"
    return cut if len(parts) == 1 else f"…{cut}"


def _run_label(first: str, last: str) -> str:
    """The name of a run, short: both ends stay, since one alone would name a single group."""
    name = run_name(first, last)
    short = shortened(name)
    if name == short or ("–" in short and "…" not in short[1:]):
        return short
    a, b = first.split(".")[-1], last.split(".")[-1]
    if a == b:  # they differ further ahead
        middle = next(part for part in name.split(".") if "–" in part)
        return f"…{middle}…{_cut(a, LONGEST - 2 - len(middle))}"
    half = (LONGEST - 1) // 2
    return f"{_cut(a, max(half, LONGEST - 1 - len(b)))}–{_cut(b, max(half, LONGEST - 1 - len(a)))}"


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: max(length - 1, 1)]}…"


def _joined(
    names: Sequence[str],
    runs: Sequence[tuple[int, int]],
    edges: Sequence[float],
    moved: Sequence[float],
    reach: float,
) -> list[tuple[int, int]]:
    """The runs with two neighbours joined: the smallest two together, one of which is moved too far if any is.

    Neighbours in different modules count twice, so that a name rather stands for parts of one module.
    """
    far = max(moved) > reach
    sizes = [edges[b + 1] - edges[a] for a, b in runs]
    modules = [{names[end].rpartition(".")[0] for end in run} for run in runs]
    pairs = [k for k in range(len(runs) - 1) if not far or max(moved[k], moved[k + 1]) > reach]

    def cost(k: int) -> float:
        return (sizes[k] + sizes[k + 1]) * len(modules[k] | modules[k + 1])

    k = min(pairs or range(len(runs) - 1), key=cost)
    return [*runs[:k], (runs[k][0], runs[k + 1][1]), *runs[k + 2 :]]
