"""Eigenpairs of small matrices, by making them dense."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from curvops.lengths import lengths, size_of
from curvops.matrix import Products
from curvops.memory import check_fits
from curvops.spectrum.choice import Choice
from curvops.spectrum.pairs import CONVERGED, EigenPairs

DENSE = 2000  # columns up to which a matrix is made where that is not asked for: seconds, and 32 MB
COLUMNS = 256  # of the identity that are multiplied together


def dense_pairs(products: Products, metric: Callable[[Tensor], Tensor] | None, choice: Choice) -> EigenPairs:
    """Eigenpairs from D products, with all that a dense eigendecomposition gives.

    Args:
        products: Products with a symmetric A.
        metric: Products with B of A v = λ B v, symmetric and positive definite, or None.
        choice: Which pairs.

    Raises:
        ValueError: If a product is not finite, or the metric is not positive definite.
        MemoryError: If the dense matrix does not fit.
    """
    dense, factor = _symmetric(_dense(products, products), products.name), None
    matrix = dense
    if metric is not None:
        factor, failed = torch.linalg.cholesky_ex(_symmetric(_dense(products, metric), "the metric"))
        if failed:
            raise ValueError("eigenpairs: the metric is not positive definite. Damp it.")
        matrix = _solved(factor, _solved(factor, dense).T)
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    chosen = choice.of(values)
    values, vectors = values[chosen], vectors[:, chosen]
    residuals = lengths(matrix @ vectors - vectors * values)
    if factor is not None:
        vectors = torch.linalg.solve_triangular(factor.T, vectors, upper=True)
    kind = (products.device, products.dtype)
    found = [part.to(*kind) for part in (values, vectors, residuals)]
    domain = getattr(products.matrix, "domain", None)
    return EigenPairs(found[0], found[1], found[2], products.count, True, CONVERGED, domain)


def _dense(products: Products, product: Callable[[Tensor], Tensor]) -> Tensor:
    size = products.shape[0]
    check_fits(size, size, products.dtype, products.device, products.title)
    parts = []
    for begin in range(0, size, COLUMNS):
        columns = torch.zeros(size, min(COLUMNS, size - begin), dtype=products.dtype, device=products.device)
        columns.diagonal(-begin).fill_(1)
        parts.append(product(columns).clone())  # another's operator may use the memory again
    return torch.cat(parts, 1).to(torch.promote_types(products.dtype, torch.float32))


def _symmetric(matrix: Tensor, name: str) -> Tensor:
    if not matrix.isfinite().all():
        raise ValueError(f"eigenpairs: a product with {name} is not finite.")
    if size_of(matrix - matrix.T) > 10 * torch.finfo(matrix.dtype).eps ** 0.5 * size_of(matrix):
        raise ValueError(f"eigenpairs: products with {name} are not symmetric. For singular values use AᵀA.")
    return (matrix + matrix.T) / 2


def _solved(factor: Tensor, columns: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(factor, columns, upper=False)
