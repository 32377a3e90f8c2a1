"""Groups of parameters: consecutive rows that belong together, by default those of a module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, chain, count, groupby, takewhile
from math import prod
from typing import Any, TypeAlias

from torch.nn import Module

Groups: TypeAlias = Mapping[str, int] | Sequence[int] | Module | int | str
NAMED = ("modules", "tensors")
MOST = 16  # groups by default: as many as have room for their names at a figure's side


def module_groups(
    parameters: Mapping[str, Sequence[int]], depth: int | None = None, *, most: int = MOST
) -> dict[str, int]:
    """Group consecutive parameters by the module that owns them: from name to number of entries.

    Args:
        parameters: Shapes by name, in the order of a matrix's rows, as of `dict(model.named_parameters())`.
        depth: Parts of a module's name that count, so that 1 gives the model's children. By default as many as
            give at most `most` groups, and 1 where that is more.
        most: Number of groups that the default depth stays below.

    Returns:
        Groups in the order of the rows. What begins all names is left out of the labels; a module whose parameters are
        not consecutive comes once for each stretch.

    Raises:
        ValueError: If the depth is not positive.

    Example:
        >>> shapes = {"net.0.a.weight": (3, 2), "net.0.a.bias": (3,), "net.0.b.weight": (3,), "net.1.weight": (1, 3)}
        >>> module_groups(shapes)
        {'0.a': 9, '0.b': 3, '1': 3}
        >>> module_groups(shapes, depth=2)
        {'0': 12, '1': 3}
    """
    if depth is not None and depth < 1:
        raise ValueError(f"groups: expected a depth of at least 1, got {depth}.")
    paths = [_owner(name) for name in parameters]
    shared = shared_parts(paths)
    deepest = max(map(len, paths), default=1)
    depths = range(deepest, 0, -1) if depth is None else [depth]
    sizes = [prod(shape) for shape in parameters.values()]
    found: list[tuple[tuple[str, ...], int]] = []
    for kept in depths:
        stretches = groupby(zip(paths, sizes, strict=True), key=lambda both: both[0][:kept])
        found = [(path, sum(size for _, size in both)) for path, both in stretches]
        if len(found) <= most:
            break
    groups: dict[str, int] = {}
    for path, size in found:
        groups[_untaken(".".join(path[min(shared, len(path) - 1) :]), groups)] = size
    return groups


def sizes_of(
    groups: Groups | None, side: int, shapes: Mapping[str, Sequence[int]] | None, *, most: int = MOST
) -> dict[str, int]:
    """Return sizes of the non-empty groups of `side` rows by label; without groups, none.

    Sizes alone are labelled 1, 2, …. A model, "modules" or a depth of module names stand for `module_groups`, "tensors" for
    a group each; without a model these need the `shapes` of the parameters.

    Raises:
        TypeError: If the groups are of no such form.
        ValueError: If the sizes do not sum to `side`, or shapes are not known.

    Example:
        >>> sizes_of("tensors", 8, {"0.weight": (2, 3), "0.bias": (2,)})
        {'0.weight': 6, '0.bias': 2}
    """
    if groups is None:
        return {}
    if isinstance(groups, Module):
        groups = _of_model(groups, side)
    elif (isinstance(groups, str) and groups in NAMED) or (isinstance(groups, int) and not isinstance(groups, bool)):
        if shapes is None:
            raise ValueError(f"groups: {groups!r} needs names, and tensors have none. Pass operators, or groups=model.")
        if groups == "tensors":
            groups = {name: prod(shape) for name, shape in shapes.items()}
        else:
            groups = module_groups(shapes, groups if isinstance(groups, int) else None, most=most)
    if not isinstance(groups, Mapping | Sequence) or isinstance(groups, str):
        raise TypeError(
            "groups: expected sizes, a mapping from label to size, a module, 'modules', 'tensors', or a depth of module names, got "
            f"{groups!r}."
        )
    sizes = list(groups.values()) if isinstance(groups, Mapping) else list(groups)
    if any(size < 0 for size in sizes) or sum(sizes) != side:
        raise ValueError(f"groups: the group sizes {sizes} sum to {sum(sizes)}, the matrices have {side} rows.")
    if isinstance(groups, Mapping):
        return {str(label): size for label, size in groups.items() if size}
    return {str(k): size for k, size in enumerate(filter(None, sizes), 1)}


def shapes_of(matrix: Any) -> dict[str, tuple[int, ...]] | None:
    """The shapes by name of the parameters that an operator's rows belong to, None if it does not tell."""
    shapes = getattr(getattr(matrix, "domain", None), "shapes", None)
    return None if shapes is None else {name: tuple(shape) for name, shape in shapes.items()}


def edges_of(sizes: Mapping[str, int]) -> list[int]:
    """Where each group begins, and where the last one ends."""
    return list(accumulate(sizes.values(), initial=0))


def shared_parts(paths: Iterable[Sequence[str]]) -> int:
    """How many parts all names begin with."""
    return len(list(takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))))


def _of_model(model: Module, side: int) -> dict[str, int]:
    """Groups of all parameters of a model, or of those that are trained, whichever are as many as there are rows."""
    named = dict(model.named_parameters())
    trained = {name: p for name, p in named.items() if p.requires_grad}
    for some in (named, trained):
        if sum(p.numel() for p in some.values()) == side:
            return module_groups({name: tuple(p.shape) for name, p in some.items()})
    total = sum(p.numel() for p in named.values())
    raise ValueError(
        f"groups: the model has {total} parameters, the matrices {side} rows. Pass operators with groups=depth, or "
        "groups=module_groups({name: p.shape for name, p in params.items()}) for the parameters that the rows belong to."
    )


def _owner(name: str) -> tuple[str, ...]:
    """The parts of the name of the module that owns a parameter; a parameter without one owns itself."""
    parts = name.split(".")
    if "parametrizations" in parts[1:]:
        return tuple(parts[: parts.index("parametrizations", 1)])
    return tuple(parts[:-1] or parts)


def _untaken(name: str, taken: Mapping[str, int]) -> str:
    return next(label for label in chain([name], (f"{name} ({k})" for k in count(2))) if label not in taken)
