"""Groups of a matrix's rows and columns: its diagonal blocks, by tensor, by module, or as the user says."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from curvops.estimators.estimate import Estimate
from curvops.matrix import Products

Rows = slice | Tensor
Groups = Mapping[str, Rows | str | list[str]] | str | None


def resolve(groups: Groups, products: Products) -> dict[str, Rows]:
    """Rows of each group by name; without groups one that holds all rows, under the empty name.

    Args:
        groups: A dict name → slice or tensor of indices ``[n]``. For a matrix with a ``domain`` of named tensors, as those
            of ``curvops`` have, also ``"tensors"`` or ``"modules"``, and in the dict names or patterns of tensors, such as
            ``"*.attention.*"``, or a list of these.
        products: Of the matrix.

    Raises:
        ValueError: If the groups are of no such form, or reach outside of the matrix.
        KeyError: If a pattern matches no name.
    """
    size = products.shape[0]
    if groups is None:
        return {"": slice(0, size)}
    if isinstance(groups, str):
        return _named(groups, products)
    if not isinstance(groups, Mapping) or not groups:
        raise ValueError(
            f"groups: expected 'tensors', 'modules' or a dict of slices, indices or names, got {groups!r}."
        )
    return {name: _checked(name, _rows_of(rows, products), size, products.device) for name, rows in groups.items()}


def by_name(found: Estimate, groups: Groups, names: Mapping[str, Rows]) -> Any:
    """An estimate per group ``[G]`` as a dict, or without groups as the one that it is."""
    return found.part(0) if groups is None else {name: found.part(i) for i, name in enumerate(names)}


def sums(left: Tensor, right: Tensor, groups: Mapping[str, Rows]) -> Tensor:
    """Scalar products of columns within each group, ``[G, K]``."""
    return torch.stack([torch.einsum("rk,rk->k", left[rows], right[rows]) for rows in groups.values()])


def _named(kind: str, products: Products) -> dict[str, Rows]:
    if kind not in ("tensors", "modules"):
        raise ValueError(f"groups: expected 'tensors', 'modules' or a dict of slices, indices or names, got {kind!r}.")
    domain = _domain(kind, products)
    slices = {name: domain.slice(name) for name in domain.names}
    if kind == "tensors":
        return slices
    modules: dict[str, list[slice]] = {}
    for name, rows in slices.items():
        modules.setdefault(name.rpartition(".")[0], []).append(rows)
    return {name: _union(parts, products.device) for name, parts in modules.items()}


def _rows_of(given: Any, products: Products) -> Any:
    """The rows of the tensors that names or patterns stand for; what else is given stays."""
    several = isinstance(given, list) and given and all(isinstance(each, str) for each in given)
    if not (several or isinstance(given, str)):
        return given
    domain = _domain(given, products)
    return _union([domain.slice(name) for name in domain.match(given)], products.device)


def _domain(asked: Any, products: Products) -> Any:
    """The names and places of the matrix's tensors."""
    domain: Any = getattr(products.matrix, "domain", None)
    if domain is None:
        raise ValueError(
            f"groups: {products.name} has no named tensors (no 'domain'), so {asked!r} means nothing. Pass a dict name → "
            "slice or indices."
        )
    return domain


def _union(parts: list[slice], device: torch.device) -> Rows:
    """One slice where the parts follow each other, else indices."""
    if all(a.stop == b.start for a, b in pairwise(parts)):
        return slice(parts[0].start, parts[-1].stop)
    return torch.cat([torch.arange(rows.start, rows.stop, device=device) for rows in parts])


def _checked(name: str, rows: Any, size: int, device: torch.device) -> Rows:
    if isinstance(rows, slice):
        first, last = (0 if rows.start is None else rows.start), (size if rows.stop is None else rows.stop)
        if rows.step not in (None, 1) or not 0 <= first < last <= size:
            raise ValueError(f"groups[{name!r}]: expected a slice within 0 and {size} that is not empty, got {rows}.")
        return slice(first, last)
    if not isinstance(rows, Tensor) or rows.ndim != 1 or rows.dtype != torch.int64 or not len(rows):
        got = f"{rows.dtype} {tuple(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
        raise ValueError(
            f"groups[{name!r}]: expected a slice, a tensor of indices [n] (torch.int64) or names, got {got}."
        )
    if rows.min() < 0 or rows.max() >= size or len(rows.unique()) < len(rows):
        raise ValueError(f"groups[{name!r}]: expected different indices between 0 and {size - 1}.")
    return rows.to(device)
