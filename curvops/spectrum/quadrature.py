"""Gauss quadrature of a symmetric matrix's spectral measure at given vectors, by Lanczos' three-term recurrence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from curvops.lengths import lengths

SPENT = 10  # roundoffs: what orthogonalisation leaves below this share of an image is rounding, so the space has ended


class Recurrence(NamedTuple):
    """The three-term recurrences of some starts: tridiagonal matrices whose eigenvalues are the nodes.

    Args:
        diagonal: Their diagonals ``[K, m]``, in double precision on the CPU.
        beside: What stands beside them, ``[K, m]``; the last of each leads beyond. Zeros from where a Krylov space ended.
        size: D.
    """

    diagonal: Tensor
    beside: Tensor
    size: int

    @property
    def ended(self) -> Tensor:
        """Whether each start's Krylov space ended within these steps, ``[K]``."""
        return (self.beside[:, -1] == 0) | (self.diagonal.shape[1] == self.size)

    def gauss(self) -> tuple[Tensor, Tensor]:
        """Nodes and weights ``[K, m]``; where a space ended earlier, weights are zero, and the nodes sᵀ A s."""
        nodes, vectors = torch.linalg.eigh(self._matrices())
        return nodes, vectors[:, 0].square()

    def radau(self, end: float) -> tuple[Tensor, Tensor]:
        """Nodes and weights ``[K, m + 1]`` of which the first node is ``end``, below all others; Gauss' where a space ended.

        For functions whose odd derivatives are positive and even ones negative, as the logarithm's, and an end that no
        eigenvalue is below, the sum is too small, and Gauss' too large.

        Source: Golub 1973; Golub & Meurant 2010, section 6.2.
        """
        last = self.beside[:, -1:]
        nodes, vectors = torch.linalg.eigh(self._matrices())
        apart = (nodes - end).clamp(min=_rounding(nodes))  # a node that has converged may stand at the end
        added = end + last * (last * vectors[:, -1].square() / apart).sum(1, keepdim=True)
        going = ~self.ended.unsqueeze(1)
        diagonal = torch.cat([self.diagonal, torch.where(going, added, self.diagonal[:, :1])], 1)
        longer = Recurrence(
            diagonal, torch.cat([torch.where(going, self.beside, self._inner()), last * 0], 1), self.size
        )
        nodes, weights = longer.gauss()
        nodes[:, 0] = torch.where(going[:, 0], end, nodes[:, 0])  # exactly, as a function may have a pole next to it
        return nodes, weights

    def lowest(self) -> float:
        """A number that the starts see no eigenvalue below: the smallest node, less its residual and rounding."""
        nodes, vectors = torch.linalg.eigh(self._matrices())
        residuals = torch.where(self.ended, 0.0, self.beside[:, -1] * vectors[:, -1, 0].abs())
        return float((nodes[:, 0] - residuals).min()) - _rounding(nodes)

    def _inner(self) -> Tensor:
        return torch.cat([self.beside[:, :-1], torch.zeros_like(self.beside[:, :1])], 1)

    def _matrices(self) -> Tensor:
        beside = self.beside[:, :-1]
        taken = (beside != 0).sum(1, keepdim=True) + 1
        steps = torch.arange(self.diagonal.shape[1], device="cpu")
        matrices = torch.diag_embed(torch.where(steps < taken, self.diagonal, self.diagonal[:, :1]))
        if len(steps) > 1:
            matrices += torch.diag_embed(beside, 1) + torch.diag_embed(beside, -1)
        return matrices


def quadrature(
    products: Callable[[Tensor], Tensor], starts: Tensor, depth: int, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes and weights with ``sᵀ f(A) s ≈ Σ weights f(nodes)`` for each start s, by `recurrence`, whose arguments it takes.

    Exact for polynomials f up to degree 2 depth - 1, and for every f where the Krylov space of s has no more than
    ``depth`` dimensions.

    Source: Golub & Welsch 1969; Golub & Meurant 2010, chapter 6.

    Returns:
        Nodes and weights, both ``[K, min(depth, D)]`` in double precision on the CPU. Where a start's Krylov space ends earlier,
        weights are zero, and the nodes sᵀ A s. And whether each space ended within these steps, ``[K]``.

    Example:
        >>> import torch
        >>> from curvops.matrix import Products
        >>> matrix = torch.diag(torch.tensor([1.0, 2.0, 3.0]))
        >>> nodes, weights, _ = quadrature(Products(matrix, "trace of logarithm"), torch.eye(3), 2)
        >>> torch.testing.assert_close((weights * nodes.log()).sum(), torch.tensor(6.0).double().log())
    """
    found = recurrence(products, starts, depth, **options)
    return *found.gauss(), found.ended


def recurrence(
    products: Callable[[Tensor], Tensor],
    starts: Tensor,
    depth: int,
    *,
    basis_device: torch.device | None = None,
    basis_dtype: torch.dtype | None = None,
    precision: torch.dtype | None = None,
    state: Mapping[str, Tensor] | None = None,
    done: Callable[[dict[str, Tensor]], None] | None = None,
) -> Recurrence:
    """Lanczos' three-term recurrence of each start.

    All starts take each step together, in one product with a block, and each is reorthogonalised against all of its own
    basis, twice.

    Args:
        products: Products of a symmetric matrix with columns, for instance `curvops.matrix.Products`.
        starts: Unit vectors, ``[D, K]``.
        depth: Steps. No more than D are taken.
        basis_device: Where the bases, K · depth · D numbers, are kept. Default: with the starts.
        basis_dtype: Their precision, which bounds the orthogonality. Default: that of the starts.
        precision: That of the products, if it is lower than the starts'.
        state: Where to go on from, as an earlier call had told.
        done: Told the state after each step.

    Raises:
        ValueError: If ``depth`` is not positive, a product is not finite, or products are not symmetric.
    """
    size, count = starts.shape
    if depth < 1:
        raise ValueError(f"depth: expected a positive number of steps, got {depth}.")
    depth = min(depth, size)
    bases = torch.zeros(count, depth, size, device=basis_device or starts.device, dtype=basis_dtype or starts.dtype)
    diagonal, beside = (torch.zeros(count, depth, dtype=torch.float64, device="cpu") for _ in range(2))
    going = torch.arange(count, device="cpu")
    previous, current, norms = torch.zeros_like(starts), starts, starts.new_zeros(count)
    eps = max(torch.finfo(dtype).eps for dtype in (precision or starts.dtype, starts.dtype, bases.dtype))
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
        earlier = _projected(bases[:, : step + 1], image)
        largest = max(float(before.max()), float(diagonal.abs().max()), float(beside.max()))
        if float(lengths(earlier).max()) > 10 * eps**0.5 * largest:  # of a symmetric matrix it is rounding
            raise ValueError("Lanczos: products with the matrix are not symmetric. Take AᵀA, or (A + Aᵀ) / 2.")
        image = image - earlier
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
    return Recurrence(diagonal, beside, size)


def _projected(bases: Tensor, columns: Tensor) -> Tensor:
    """The part of columns ``[D, K]`` within bases ``[K, m, D]``, one for each."""
    rows = columns.T.unsqueeze(1).to(bases)
    return ((rows @ bases.mT) @ bases).squeeze(1).T.to(columns)


def _rounding(nodes: Tensor) -> float:
    """How far rounding moves nodes."""
    return max(SPENT * torch.finfo(nodes.dtype).eps * float(nodes.abs().max()), torch.finfo(nodes.dtype).tiny)
