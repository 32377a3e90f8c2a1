"""Lines of Python that compute the entries of a block which a coarse page knows by its norm."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import accumulate, pairwise
from typing import Any

from curvops.tour.coarse import operator_options
from curvops.tour.groups import shared_parts
from curvops.tour.matrices import OPERATORS

_NEEDED = {"mc_samples", "seed", "width"}


def operator_code(title: str, settings: Mapping[str, Any]) -> str | None:
    """Python for the operator of a title; None where a coarse tour has no such title, or its settings do not tell.

    Example:
        >>> operator_code("Monte-Carlo Fisher", {"mc_samples": 2, "seed": 0, "width": 10})
        'curvops.GGNLinearOperator(model, loss, params, data, mc_samples=2, seed=0)'
    """
    if title not in OPERATORS or not settings.keys() >= _NEEDED:
        return None
    options = [f"{name}={value!r}" for name, value in operator_options(title, settings).items()]
    return f"curvops.{OPERATORS[title][0].__name__}({', '.join(['model', 'loss', 'params', 'data', *options])})"


def group_code(parameters: Mapping[str, Sequence[int]], groups: Mapping[str, int]) -> list[dict[str, str]]:
    """For each group Python for its parameters, `names`, and for its `rows` among theirs, empty where it has them all.

    None for all of them if the parameters are not known.

    Example:
        >>> group_code({"a.weight": (2, 3), "a.bias": (2,), "b": (4,)}, {"1": 8, "2": 1, "3": 3})
        [{'names': "'a.*'", 'rows': ''}, {'names': "'b'", 'rows': '0:1'}, {'names': "'b'", 'rows': '1:4'}]
    """
    ends = list(accumulate(math.prod(shape) for shape in parameters.values()))
    places = {name: (end - math.prod(shape), end) for (name, shape), end in zip(parameters.items(), ends, strict=True)}
    found: list[dict[str, str]] = []
    if [sum(groups.values())] != ends[-1:] or not all(groups.values()):
        return found
    for begin, end in pairwise(accumulate(groups.values(), initial=0)):
        inside = {name: place for name, place in places.items() if max(place[0], begin) < min(place[1], end)}
        first, last = min(a for a, _ in inside.values()), max(b for _, b in inside.values())
        rows = "" if (first, last) == (begin, end) else f"{begin - first}:{end - first}"
        found.append({"names": _pattern(list(inside), list(parameters)), "rows": rows})
    return found


def _pattern(names: list[str], known: list[str]) -> str:
    """Names as `op[…]` takes them: one, the pattern that matches these and no other, or a list."""
    if len(names) == 1:
        return repr(names[0])
    paths = [name.split(".") for name in names]
    pattern = ".".join([*paths[0][: shared_parts(paths)], "*"])
    return repr(pattern if [name for name in known if fnmatchcase(name, pattern)] == names else names)
