"""Gauss quadrature of a symmetric matrix's spectral measure at given vectors, by Lanczos' three-term recurrence."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from curvops.lengths import lengths

SPENT = 10  # roundoffs: what orthogonalisation leaves below this share of an image is rounding, so the space has ended


def quadrature(
    products: Callable[[Tensor], Tensor],
    starts: Tensor,
    depth: int,
    *,
    basis_device: torch.device | None = None,
    basis_dtype: torch.dtype | None = None,
    state: Mapping[str, Tensor] | None = None,
    done: Callable[[dict[str, Tensor]], None] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes and weights with ``sᵀ f(A) s ≈ Σ weights f(nodes)`` for each start s.

    Exact for polynomials f up to degree 2 depth - 1, and for every f where the Krylov space of s has no more than
    ``depth`` dimensions. All starts take each step together, in one product with a block, and each is
    reorthogonalised against all of its own basis, twice.

    Source: Golub & Welsch 1969; Golub & Meurant 2010, chapter 6.

    Args:
        products: Products of a symmetric matrix with columns, for instance `curvops.matrix.Products`.
        starts: Unit vectors, ``[D, K]``.
        depth: Steps. No more than D are taken.
        basis_device: Where the bases, K · depth · D numbers, are kept. Default: with the starts.
        basis_dtype: Their precision, which bounds the orthogonality. Default: that of the starts.
        state: Where to go on from, as an earlier call had told.
        done: Told the state after each step.

    Returns:
        Nodes and weights, both ``[K, min(depth, D)]`` in double precision on the CPU. Where a start's Krylov space ends earlier,
        weights are zero, and the nodes sᵀ A s. And whether each space ended within these steps, ``[K]``.

    Raises:
        ValueError: If ``depth`` is not positive, or a product is not finite.

    Example:
        >>> import torch
        >>> from curvops.matrix import Products
        >>> matrix = torch.diag(torch.tensor([1.0, 2.0, 3.0]))
        >>> nodes, weights, _ = quadrature(Products(matrix, "trace of logarithm"), torch.eye(3), 2)
        >>> torch.testing.assert_close((weights * nodes.log()).sum(), torch.tensor(6.0).double().log())
    """
    size, count = starts.shape
    if depth < 1:
        raise ValueError(f"depth: expected a positive number of steps, got {depth}.")
    depth = min(depth, size)
    bases = torch.zeros(count, depth, size, device=basis_device or starts.device, dtype=basis_dtype or starts.dtype)
    diagonal, beside = (torch.zeros(count, depth, dtype=torch.float64, device="cpu") for _ in range(2))
    going = torch.arange(count, device="cpu")
    previous, current, norms = torch.zeros_like(starts), starts, starts.new_zeros(count)
    first = 0
    if state is not None:
        diagonal, beside, going, filled = (state[name] for name in ("diagonal", "beside", "going", "bases"))
        previous, current, norms = (state[name].to(starts.device) for name in ("previous", "current", "norms"))
        first, bases = filled.shape[1], bases[: len(going)]
        bases[:, :first] = filled
    for step in range(first, depth):
        bases[:, step] = current.T.to(bases)
        image = products(current)
        if not image.isfinite().all():
            raise ValueError("Lanczos: a product with the matrix is not finite. Look for overflow in the model.")
        before = lengths(image)
        overlap = (current * image).sum(0)
        diagonal[going, step] = overlap.double().cpu()
        # the recurrence in full precision, so that a basis in a lower one corrects only what rounding left
        image = image - current * overlap - previous * norms
        for _ in range(2):
            image = image - _projected(bases[:, : step + 1], image)
        norms = lengths(image).to(image.dtype)
        kept = norms > SPENT * torch.finfo(image.dtype).eps * before
        if not kept.all():
            bases, going, norms = bases[kept.to(bases.device)], going[kept.cpu()], norms[kept]
            current, image = current[:, kept], image[:, kept]
        if not len(going):
            break
        beside[going, step] = norms.double().cpu()
        previous, current = current, image / norms
        if done is not None:
            known = {"diagonal": diagonal, "beside": beside, "going": going, "bases": bases[:, : step + 1]}
            done({**known, "previous": previous, "current": current, "norms": norms})
    return *_rule(diagonal, beside[:, :-1]), (beside[:, -1] == 0) | (depth == size)


def _projected(bases: Tensor, columns: Tensor) -> Tensor:
    """The part of columns ``[D, K]`` within bases ``[K, m, D]``, one for each."""
    rows = columns.T.unsqueeze(1).to(bases)
    return ((rows @ bases.mT) @ bases).squeeze(1).T.to(columns)


def _rule(diagonal: Tensor, beside: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues of tridiagonal matrices and the squares of their eigenvectors' first entries."""
    taken = (beside != 0).sum(1, keepdim=True) + 1
    steps = torch.arange(diagonal.shape[1], device="cpu")
    diagonal = torch.where(steps < taken, diagonal, diagonal[:, :1])
    matrices = torch.diag_embed(diagonal)
    if len(steps) > 1:
        matrices += torch.diag_embed(beside, 1) + torch.diag_embed(beside, -1)
    nodes, vectors = torch.linalg.eigh(matrices)
    return nodes, vectors[:, 0].square()
