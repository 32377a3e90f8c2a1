"""Plot of eigenvectors by layer: in which part of the model each eigenvalue lives."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from curvops.estimators.groups import Groups, resolve
from curvops.matrix import Products
from curvops.operators.diagonal import IdentityOperator
from curvops.plots.axes import SEQUENTIAL, drawn_on
from curvops.space import TensorSpace
from curvops.spectrum import EigenPairs

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_eigenvectors_by_layer(pairs: EigenPairs, *, groups: Groups = "modules", ax: Axes | None = None) -> Axes:
    """Plot the mass of each eigenvector in each layer, Σ v_i² over the layer's parameters, as a heat map.

    Args:
        pairs: From ``op.eigenpairs(k)``; the largest eigenvalue is drawn on the left.
        groups: ``"modules"``, ``"tensors"``, or a dict of them, see `curvops.estimators.trace`.
        ax: Axes to draw on. Default: new ones.

    Returns:
        The axes. The colour bar has its own, at their side.

    Raises:
        TypeError: If they are no `EigenPairs`.
        ValueError: If the groups are of no such form, or the matrix knows no names.

    Example:
        >>> import torch
        >>> from curvops.spectrum import eigenpairs
        >>> pairs = eigenpairs(torch.diag(torch.arange(30.0)), 3)
        >>> ax = plot_eigenvectors_by_layer(pairs, groups={"first": slice(0, 15), "second": slice(15, 30)})
        >>> ax.images[0].get_array().round(3).tolist()
        [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]
    """
    if not isinstance(pairs, EigenPairs):
        raise TypeError(
            f"plot_eigenvectors_by_layer: expected EigenPairs, from op.eigenpairs(k), got {type(pairs).__name__}."
        )
    mass = mass_by_group(pairs, groups)
    shares = torch.stack(list(mass.values())).flip(1).double().cpu()
    with drawn_on(ax, "plot_eigenvectors_by_layer") as ax:
        image = ax.imshow(shares.numpy(), vmin=0, vmax=1, cmap=SEQUENTIAL, aspect="auto", interpolation="none")
        ax.set_yticks(range(len(mass)), list(mass), parse_math=False)
        ax.set_xticks(range(len(pairs)), [f"{float(value):.3g}" for value in pairs.values.flip(0)], rotation=90)
        ax.set_xlabel("Eigenvalue")
        ax.set_ylabel("Layer")
        bar = ax.figure.colorbar(image, ax=ax)
        bar.set_label("Mass of the eigenvector")
        return ax


def mass_by_group(pairs: EigenPairs, groups: Groups = "modules") -> dict[str, Tensor]:
    """The part of each eigenvector's squared length that lies in each group of rows, ``[k]`` by name."""
    space = pairs.domain
    if isinstance(groups, str) and not isinstance(space, TensorSpace):
        raise ValueError(
            f"groups: the matrix of these pairs has no named tensors (no 'domain'), so {groups!r} means nothing. "
            "Pass a dict name → slice or indices."
        )
    if not isinstance(space, TensorSpace):
        space = TensorSpace.flat(len(pairs.vectors), device=pairs.vectors.device)
    rows = resolve(groups, Products(IdentityOperator(space), "plot_eigenvectors_by_layer"))
    squares = pairs.vectors.square()
    return {name or "model": squares[own].sum(0) / squares.sum(0) for name, own in rows.items()}
