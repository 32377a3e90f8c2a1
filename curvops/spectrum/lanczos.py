"""Some eigenvalues and eigenvectors of a symmetric matrix that is known by its products."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from curvops.checkpoint import Checkpoint
from curvops.lengths import lengths_in
from curvops.matrix import Products, normal, seeded
from curvops.memory import budget
from curvops.spectrum.choice import Choice, Which
from curvops.spectrum.dense import dense_pairs
from curvops.spectrum.krylov import Krylov, Map, Ritz
from curvops.spectrum.pairs import CONVERGED, EigenPairs
from curvops.spectrum.saved import Saved, State

SUBSPACE = 20  # basis vectors for each wanted one, where memory allows; no restart is needed before
LEAST = 100  # but no fewer than so many in all
CHECKS = 50  # the projection is judged each time that it has grown by one part in so many
PROBE = 20  # products that look for copies outside of an invariant space
DENSE = 3  # with as many columns for each wanted pair the dense matrix takes no more products


def eigenpairs(
    matrix: Any,
    k: int,
    which: Which = "largest",
    *,
    metric: Any = None,
    metric_inverse: Any = None,
    start: Any = None,
    block: int = 1,
    tolerance: float | None = None,
    max_products: int | None = None,
    subspace: int | None = None,
    memory_budget: int | None = None,
    basis_device: torch.device | str | None = None,
    basis_dtype: torch.dtype | None = None,
    seed: int = 0,
    checkpoint: Checkpoint | None = None,
    progressbar: bool = False,
) -> EigenPairs:
    """Eigenpairs A v = λ v at the ends of the spectrum, or A v = λ B v with a metric B.

    Thick-restart Lanczos (Wu & Simon 2000; in blocks Zhou & Saad 2008) with full reorthogonalisation. Both ends come
    from one Krylov space. Without a restart no method takes fewer products, so the basis is as large as
    ``memory_budget`` allows, up to 20 vectors a wanted pair or 100. Where the products would exceed D, the dense matrix is made.

    One Krylov space with one start has one vector of each eigenspace: copies of a multiple eigenvalue are found where
    the space ends, else with a ``block`` of as many columns as there are copies.

    Args:
        matrix: Symmetric, see `curvops.matrix.Matrix`.
        k: How many, from each end if ``which`` is ``"both"``.
        which: ``"largest"``, ``"smallest"``, ``"both"`` or ``"magnitude"`` (the largest |λ|).
        metric: B, symmetric and positive definite, for instance a damped KFAC. Its products are not counted.
        metric_inverse: Products with B⁻¹, for instance KFAC's ``.inverse()``.
        start: Vectors near those wanted: an `EigenPairs` of an earlier checkpoint, or columns in any format.
        block: Columns that are multiplied together.
        tolerance: Residuals are asked to be at most this times the largest |λ| seen. Errors of eigenvalues
            are about the squares of their residuals. Default: the square root of the dtype's precision.
        max_products: Stop after about so many products. Default: 20 times the subspace.
        subspace: Basis vectors that are kept at most. Default: see above.
        memory_budget: Bytes for the basis. Default: a quarter of what is free where it lives.
        basis_device: Where the basis lives, such as ``"cpu"`` for a small GPU. Default: the matrix's device.
        basis_dtype: Precision of the basis, which bounds the residuals. Default: that of the matrix.
        seed: Of the random start.
        checkpoint: Where the state is kept, to go on from after the process was killed: see `curvops.Checkpoint`. Where
            several processes multiply together it is one file, which all of them see. The dense matrix has no state.
        progressbar: Show a bar that counts products.

    Returns:
        Pairs by ascending eigenvalue, with their residuals; where they did not converge the reason says what helps.

    Raises:
        TypeError, ValueError: If the matrix or an argument is not as described, or products are not symmetric.
        MemoryError: If the smallest basis does not fit.

    Example:
        >>> import torch
        >>> matrix = torch.diag(torch.arange(100, dtype=torch.float64))
        >>> values, vectors = eigenpairs(matrix, 2, "both")
        >>> torch.testing.assert_close(values, torch.tensor([0, 1, 98, 99], dtype=torch.float64))
    """
    with ExitStack() as stack:
        products = stack.enter_context(Products(matrix, "eigenpairs", symmetric=True, progressbar=progressbar))
        size, choice = products.shape[0], Choice(which, k, products.shape[0])
        weigh, unweigh = (
            (lambda v: v)
            if other is None
            else stack.enter_context(Products(other, f"eigenpairs, {name}", symmetric=True))
            for name, other in (("metric", metric), ("metric_inverse", metric_inverse))
        )
        if (metric is None) != (metric_inverse is None):
            raise ValueError("eigenpairs: expected 'metric' and 'metric_inverse' together, got only one of them.")
        for other in (metric, metric_inverse):
            if other is not None and tuple(other.shape) != products.shape:
                raise ValueError(f"metric: expected shape {products.shape}, got {tuple(other.shape)}.")
        if isinstance(weigh, Products) and isinstance(unweigh, Products):
            _check_inverse(weigh, unweigh, normal((size, 1), seeded(seed), products))
        if max_products is not None and not (isinstance(max_products, int) and max_products >= choice.count):
            raise ValueError(f"max_products: expected at least the {choice.count} pairs asked, got {max_products!r}.")
        if tolerance is not None and not (isinstance(tolerance, (int, float)) and tolerance >= 0):
            raise ValueError(f"tolerance: expected a number ≥ 0, got {tolerance!r}.")
        tolerance = torch.finfo(products.dtype).eps ** 0.5 if tolerance is None else tolerance
        if size <= DENSE * choice.count and (max_products is None or max_products >= size):
            return dense_pairs(products, None if metric is None else weigh, choice)
        device, dtype = torch.device(basis_device or products.device), basis_dtype or products.dtype
        generator = seeded(seed)
        first = _first(products, start, block, generator)
        asked = {"k": k, "which": which, "block": block, "tolerance": tolerance, "max_products": max_products}
        asked |= {"subspace": subspace, "basis_dtype": dtype, "basis_device": device.type, "seed": seed}
        asked |= {"metric": metric is not None}
        saved = Saved(checkpoint, products, asked, first, lambda v: torch.cat([unweigh(products(v)), weigh(v)], 1))
        fits = budget(device, memory_budget) // (size * dtype.itemsize)
        room = saved.about.get("room") or _room(subspace, choice.count, block, size, fits)
        space = Krylov(
            products, lambda v: unweigh(products(v)), weigh, first, room, tolerance, device, dtype, generator
        )
        most = 20 * room if max_products is None else max_products
        ritz, reason = _iterate(space, products, choice, tolerance, most, saved)
        chosen = choice.of(ritz.values)
        values, residuals = (
            found[chosen].to(products.device, products.dtype) for found in (ritz.values, ritz.residuals)
        )
        vectors = space.vectors(ritz.coordinates[:, chosen])
        if dtype != products.dtype:  # the residuals of the space are not those of its rounded vectors
            vectors = vectors / _norms(vectors, weigh)
            residuals = _norms(unweigh(products(vectors)) - vectors * values, weigh)
        domain = getattr(matrix, "domain", None)
        return EigenPairs(values, vectors, residuals, products.count, not reason, reason or CONVERGED, domain)


def _iterate(
    space: Krylov, products: Products, choice: Choice, tolerance: float, most: int, saved: Saved
) -> tuple[Ritz, str]:
    """Expand and restart until the chosen pairs converge; the reason is empty where they do."""
    judged, begun, before = 0, -PROBE, None  # size when last judged; products and values when the space last ended
    reason: str | None = None  # why it is through, once it is
    if saved.about:
        space.resume(saved.tensors, saved.about)
        judged, begun, reason = (saved.about[name] for name in ("judged", "begun", "reason"))
        before = saved.tensors.get("before")
        if reason is not None:
            return space.ritz(), reason

    def state() -> State:
        tensors, numbers = space.state()
        known = {} if before is None else {"before": before}
        return {**tensors, **known}, {**numbers, "judged": judged, "begun": begun, "reason": reason}

    while True:
        saved.write(state, due=not products.count)
        space.expand()
        full, spent = space.size + space.block > space.room, products.count + space.block > most
        due = space.size > max(choice.count - 1, judged + judged // CHECKS)
        if not (full or spent or due or space.ended or not space.block):
            continue
        judged, ritz = space.size, space.ritz()
        _check_symmetry(space, products)
        chosen = choice.of(ritz.values)
        worst, bound = ritz.residuals[chosen].max(), tolerance * ritz.values.abs().max()
        settled = products.count - begun >= PROBE
        if space.ended and space.block:  # what is outside of an invariant space may hold copies
            settled = before is not None and bool((ritz.values[chosen] - before).abs().max() <= bound)
            begun, before = products.count, ritz.values[chosen] if space.size >= choice.count else None
        if worst <= bound and space.size >= choice.count and (settled or not space.block):
            reason = ""
        elif spent or not space.block:
            reason = (
                f"stopped after {products.count} products: the largest residual is {worst:.1e}, asked {bound:.1e}. "
                "Raise max_products, subspace or tolerance, or give an earlier result as start."
            )
        elif full:
            space.restart(ritz, choice.ranked(ritz.values)[: (choice.count + space.room) // 2])
            judged = 0
        if reason is not None:
            saved.write(state, due=True)
            return ritz, reason


def _check_symmetry(space: Krylov, products: Products) -> None:
    if space.asymmetry() > 10 * space.eps**0.5:
        raise ValueError(
            f"eigenpairs: products with {products.name} are not symmetric. For the singular values of such a "
            "matrix use AᵀA; a metric must be positive definite, and metric_inverse its inverse: an InverseOperator needs a smaller "
            "tolerance."
        )


def _check_inverse(weigh: Products, unweigh: Products, x: Tensor) -> None:
    """A ValueError where B̃, given for B⁻¹, is seen to be another: xᵀB B̃ B x must be xᵀB x."""
    image = weigh(x)
    energy, expected = ((image * other).sum() for other in (unweigh(image), x))
    if not expected > 0:
        raise ValueError("eigenpairs: the metric is not positive definite. Damp it.")
    eps = max(torch.finfo(own.dtype).eps for own in (x, weigh, unweigh))
    if not abs(energy - expected) <= 10 * eps**0.5 * abs(expected):
        raise ValueError(
            f"metric_inverse: expected the inverse of the metric; for a random x, xᵀB metric_inverse(B x) is {float(energy):g}, and "
            f"xᵀB x is {float(expected):g}."
        )


def _room(subspace: int | None, wanted: int, block: int, size: int, fits: int) -> int:
    """Basis vectors that are kept: as asked, or as many as fit."""
    least = min(size, wanted + 2 * block + 1)
    room = min(size, max(LEAST, SUBSPACE * wanted), fits - 2 * block) if subspace is None else min(size, subspace)
    if room >= least:
        return room
    if subspace is not None:
        raise ValueError(f"subspace: expected at least {least} vectors for {wanted} pairs, got {subspace}.")
    raise MemoryError(
        f"eigenpairs: the memory budget holds a basis of {fits} vectors of length {size}, {least + 2 * block} are needed. "
        "Raise memory_budget, keep the basis elsewhere (basis_device='cpu') or in a lower basis_dtype, or ask for fewer pairs."
    )


def _first(products: Products, start: Any, block: int, generator: torch.Generator) -> Tensor:
    """The first block: random, or sums of the start's columns, from which a Krylov space tells them apart."""
    if not isinstance(block, int) or not 1 <= block <= products.shape[0]:
        raise ValueError(f"block: expected an integer from 1 to {products.shape[0]}, got {block!r}.")
    random = normal((products.shape[0], block), generator, products)
    if start is None:
        return random
    columns = products.given(start.vectors if isinstance(start, EigenPairs) else start).columns
    for j in range(min(block, columns.shape[1])):
        random[:, j] = columns[:, j::block].sum(1)
    return random


def _norms(columns: Tensor, weigh: Map) -> Tensor:
    return lengths_in(weigh, columns).to(columns)
