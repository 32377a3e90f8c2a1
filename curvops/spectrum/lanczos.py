"""Some eigenvalues and eigenvectors of a symmetric matrix that is known by its products."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from curvops.checkpoint import Checkpoint
from curvops.lengths import lengths_in
from curvops.matrix import Products, normal, seeded
from curvops.memory import budget
from curvops.spectrum.choice import Choice, Which
from curvops.spectrum.dense import DENSE, dense_pairs
from curvops.spectrum.krylov import ROUNDING, Krylov, Map, Ritz
from curvops.spectrum.pairs import CONVERGED, EigenPairs
from curvops.spectrum.saved import Saved, State

SUBSPACE = 20  # basis vectors for each wanted one, where memory allows; no restart is needed before
LEAST = 100  # but no fewer than so many in all
CHECKS = 50  # the projection is judged each time that it has grown by one part in so many
PROBE = 20  # products that look for copies outside of an invariant space
WARM = 10  # products that look for what a start lacks
FEW = 3  # with as many columns for each wanted pair the dense matrix takes no more products
BY_DENSE = "by the dense matrix"  # where the search ends and this begins


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
    ``memory_budget`` allows, up to 20 vectors a wanted pair or 100. The dense matrix is made, by D products, where D is at most
    thrice the pairs wanted; and, of up to 2,000 columns that fit ``memory_budget``, where D products did not converge, unless ``max_products`` is given.

    One Krylov space with one start has one vector of each eigenspace: copies of a multiple eigenvalue are found where
    the space ends, else with a ``block`` of as many columns as there are copies. Where gaps between eigenvalues are below
    the tolerance, others than those at the end may come, and some may be missed: a smaller tolerance tells them apart.

    Args:
        matrix: Symmetric, see `curvops.matrix.Matrix`.
        k: How many, from each end if ``which`` is ``"both"``.
        which: ``"largest"``, ``"smallest"``, ``"both"`` or ``"magnitude"`` (the largest |λ|).
        metric: B, symmetric and positive definite, for instance a damped KFAC. Its products are not counted.
        metric_inverse: Products with B⁻¹, for instance KFAC's ``.inverse()``.
        start: Vectors near those wanted: an `EigenPairs` of an earlier checkpoint, or columns in any format. At least 10
            products look for what they lack.
        block: Columns that are multiplied together.
        tolerance: Residuals are asked to be at most this times the largest |λ| seen. Errors of eigenvalues
            are about the squares of their residuals over the gaps to the others; the sign of a value below this bound is not told.
            Default: the square root of the dtype's precision in double (1.5e-8), its power 2/3 below (2.4e-5 in single).
        max_products: Stop after about so many products. Default: 20 times the subspace, or the dense matrix, see above.
        subspace: Basis vectors that are kept at most. Default: see above.
        memory_budget: Bytes for the basis, or the dense matrix. Default: a quarter of what is free where it lives.
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
        # roots of low precisions exceed whole ends of spectra
        power = 1 / 2 if products.dtype == torch.float64 else 2 / 3
        tolerance = torch.finfo(products.dtype).eps ** power if tolerance is None else tolerance
        if size <= FEW * choice.count and (max_products is None or max_products >= size):
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
        fits_dense = memory_budget is None or size * size * products.dtype.itemsize <= memory_budget
        dense, warm = max_products is None and size <= DENSE and fits_dense, start is not None
        ritz, reason = _iterate(space, products, choice, tolerance, most, dense, warm, saved)
        if reason == BY_DENSE:
            reason = f"{CONVERGED}, {BY_DENSE}, made after {products.count} products"
            return replace(dense_pairs(products, None if metric is None else weigh, choice), reason=reason)
        chosen = choice.of(ritz.values)
        values, residuals = (
            found[chosen].to(products.device, products.dtype) for found in (ritz.values, ritz.residuals)
        )
        vectors = space.vectors(ritz.coordinates[:, chosen])
        half = products.dtype in (torch.bfloat16, torch.float16)  # whose rounding the space's residuals leave out
        if dtype != products.dtype or half:
            vectors = vectors / _norms(vectors, weigh)
            residuals = _norms(unweigh(products(vectors)) - vectors * values, weigh)
            worst, bound = float(residuals.max()), tolerance * float(ritz.values.abs().max())
            if not reason and worst > bound:
                reason = _stopped(products.count, worst, bound, rounded=True)
        domain = getattr(matrix, "domain", None)
        return EigenPairs(values, vectors, residuals, products.count, not reason, reason or CONVERGED, domain)


def _iterate(
    space: Krylov,
    products: Products,
    choice: Choice,
    tolerance: float,
    most: int,
    dense: bool,
    warm: bool,
    saved: Saved,
) -> tuple[Ritz, str]:
    """Expand and restart until the chosen pairs converge; the reason is empty where they do."""
    # size when last judged; products and values when the space last ended: a start may be within an invariant one
    judged, begun, before = 0, (WARM if warm else 0) - PROBE, None
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
        settled = products.count - begun >= PROBE and (spent or _next_converged(ritz, choice, tolerance))
        if space.ended and space.block:  # what is outside of an invariant space may hold copies
            settled = before is not None and bool((ritz.values[chosen] - before).abs().max() <= bound)
            begun, before = products.count, ritz.values[chosen] if space.size >= choice.count else None
        if worst <= bound and space.size >= choice.count and (settled or not space.block):
            reason = ""
        elif dense and products.count >= space.dim:
            reason = BY_DENSE
        elif spent or not space.block:
            rounded = bool(worst <= ROUNDING * space.eps * ritz.values.abs().max())
            reason = _stopped(products.count, float(worst), float(bound), rounded)
        elif full:
            space.restart(ritz, choice.ranked(ritz.values)[: (choice.count + space.room) // 2])
            judged = 0
        if reason is not None:
            saved.write(state, due=True)
            return ritz, reason


def _next_converged(ritz: Ritz, choice: Choice, tolerance: float) -> bool:
    """Whether the next values within the root of the tolerance have converged, too: where one was skipped, they move."""
    ranked = choice.ranked(ritz.values)
    wanted, others = ranked[: choice.count], ranked[choice.count :][: 1 + (choice.which == "both")]
    if not len(others):
        return True
    largest = ritz.values.abs().max()
    gaps = (ritz.values[others].unsqueeze(1) - ritz.values[wanted]).abs().amin(1)
    near = gaps <= tolerance**0.5 * largest
    return bool((ritz.residuals[others][near] <= tolerance * largest).all())


def _stopped(count: int, worst: float, bound: float, rounded: bool) -> str:
    helps = (
        "That is rounding: raise tolerance, or take a higher dtype or basis_dtype."
        if rounded
        else "Raise max_products, subspace or tolerance, or give an earlier result as start."
    )
    return f"stopped after {count} products: the largest residual is {worst:.1e}, asked {bound:.1e}. {helps}"


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
