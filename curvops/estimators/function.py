"""The trace of a function of a symmetric matrix, and its log-determinant, by stochastic Lanczos quadrature."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from curvops.checkpoint import Checkpoint
from curvops.estimators.estimate import Estimate
from curvops.estimators.probes import Distribution, Probes, mean_and_error
from curvops.estimators.rounds import Budget, Sampler, run
from curvops.lengths import size_of
from curvops.matrix import Matrix, Products
from curvops.memory import check_fits
from curvops.spectrum.quadrature import quadrature


def trace_function(
    matrix: Matrix,
    function: Callable[[Tensor], Tensor],
    *,
    depth: int = 30,
    num_products: int = 300,
    tolerance: float | None = None,
    max_products: int = 10000,
    distribution: Distribution = "rademacher",
    seed: int = 0,
    checkpoint: Checkpoint | None = None,
    progressbar: bool = False,
) -> Estimate:
    """Estimate tr f(A) = Σ f(λ) of a symmetric matrix (Ubaru, Chen & Saad 2017).

    Hutchinson's estimate of tr f(A), where vᵀ f(A) v comes from a Gauss quadrature of ``depth`` products with A, which
    is exact for polynomials of degree 2·depth − 1. The standard error is that of the random vectors; the quadrature
    adds a bias that falls geometrically with the depth, the faster the smoother f is over the spectrum. Where there are
    as many products as columns, f of the eigenvalues of the dense matrix is summed, and the result is exact.

    Args:
        matrix: Symmetric; a `LinearOperator`, a tensor, SciPy's, or anything with a shape and products.
        function: f, from eigenvalues to values of the same shape; the result is differentiable in what it captures.
        depth: Lanczos steps for each random vector.
        num_products: Products with the matrix; ``num_products // depth`` random vectors, at least two. With a
            tolerance those of the first round, of ten vectors at least.
        tolerance: Wanted standard error relative to the estimate: rounds double the products until it is reached.
        max_products: Products after which a warning says that it was not.
        distribution: Of the random vectors' entries, which are then scaled to the length √D.
        seed: Seed of the random vectors. The global random state is neither used nor changed.
        checkpoint: Where the state is kept, to go on from after the process was killed: see `curvops.Checkpoint`. It is
            the quadratures' at the random vectors, and the same for any function.
        progressbar: Show products as they are taken (needs ``tqdm``).

    Returns:
        An `Estimate` without axes.

    Raises:
        TypeError, ValueError: If an argument is not as described, or f gives values that are not finite; if the dense
            matrix, where it is made, is not symmetric.

    Example:
        >>> import torch
        >>> trace_function(torch.diag(torch.tensor([1.0, 2.0, 3.0])), torch.square)
        Estimate(14, exact, 3 products)
    """
    if not isinstance(depth, int) or isinstance(depth, bool) or depth < 1:
        raise ValueError(f"depth: expected a positive integer, got {depth!r}.")
    with Products(matrix, "trace of a function", symmetric=True, progressbar=progressbar) as products:
        sampler = _Quadrature(Probes(products, seed, distribution), function, min(depth, products.shape[0]))
        budget = Budget(num_products, tolerance, max_products)
        return run(sampler, budget, checkpoint=checkpoint, seed=seed, distribution=distribution).part(0)


def logdet(
    matrix: Matrix,
    *,
    damping: float | Tensor = 0.0,
    depth: int = 30,
    num_products: int = 300,
    tolerance: float | None = None,
    max_products: int = 10000,
    distribution: Distribution = "rademacher",
    seed: int = 0,
    checkpoint: Checkpoint | None = None,
    progressbar: bool = False,
) -> Estimate:
    """Estimate log det(A + τI) of a matrix that is positive definite with its damping τ.

    See `trace_function`, whose arguments it takes. The random vectors and the quadrature do not depend on the damping,
    so that the estimate is a smooth function of τ for a given seed, whose derivative estimates tr (A + τI)⁻¹. Small
    damping needs much depth: the error of the quadrature falls by about exp(−4 depth √(τ/‖A‖)).

    Args:
        matrix: Symmetric.
        damping: τ; a tensor without axes may require a gradient, which flows to it.

    Raises:
        ValueError: If A + τI is not positive definite, beyond rounding.

    Example:
        >>> import torch
        >>> damping = torch.tensor(1.0, requires_grad=True)
        >>> found = logdet(torch.diag(torch.tensor([0.0, 1.0])), damping=damping)
        >>> found.backward()
        >>> found, damping.grad  # log 1 + log 2, and 1/1 + 1/2
        (Estimate(0.693147, exact, 2 products), tensor(1.5000))
    """

    def logarithm(eigenvalues: Tensor) -> Tensor:
        shifted = eigenvalues + damping
        # what is smaller is zero but for rounding, and its logarithm anything
        rounding = 10 * torch.finfo(eigenvalues.dtype).eps * eigenvalues.abs().max()
        if not (shifted > rounding).all():
            raise ValueError(
                f"logdet: expected a positive definite matrix, got an eigenvalue of {eigenvalues.min():.3g} with a "
                f"damping of {float(damping):.3g}, beside one of {eigenvalues.max():.3g}. Raise the damping, or take a positive "
                "semi-definite matrix (GGN, Fisher, KFAC)."
            )
        return shifted.log()

    return trace_function(
        matrix,
        logarithm,
        depth=depth,
        num_products=num_products,
        tolerance=tolerance,
        max_products=max_products,
        distribution=distribution,
        seed=seed,
        checkpoint=checkpoint,
        progressbar=progressbar,
    )


class _Quadrature(Sampler):
    least, known = 2, ("nodes", "weights")

    def __init__(self, probes: Probes, function: Callable[[Tensor], Tensor], depth: int) -> None:
        self.probes, self.function = probes, function
        self.cost = self.apart = depth  # the quadrature keeps as many vectors as it takes products
        self.method = f"Lanczos quadrature of depth {depth}"
        self.nodes = self.weights = probes.empty().new_zeros(0, depth)

    def add(self, count: int) -> None:
        probes = self.probes
        for start in range(0, count, self.step):
            starts = torch.nn.functional.normalize(probes.draw(min(self.step, count - start)), dim=0)
            rule = quadrature(probes.times, starts, self.cost)[:2]
            nodes, weights = (part.to(starts.device, starts.dtype) for part in rule)
            self.nodes, self.weights = torch.cat([self.nodes, nodes]), torch.cat([self.weights, weights])

    def result(self) -> tuple[Tensor, Tensor]:
        return mean_and_error(self.probes.size * (self.weights * self._values(self.nodes)).sum(1)[None])

    def exact(self) -> Tensor:
        products, probes = self.probes.products, self.probes
        check_fits(*products.shape, probes.dtype, products.device, products.title)
        dense = torch.cat([product for _, product in probes.identity()], 1)
        if size_of(dense - dense.mT) > 10 * torch.finfo(products.dtype).eps ** 0.5 * size_of(dense):
            raise ValueError(f"{products.title}: products with {products.name} are not symmetric.")
        return self._values(torch.linalg.eigvalsh((dense + dense.mT) / 2)).sum(0, keepdim=True)

    def _values(self, eigenvalues: Tensor) -> Tensor:
        values = self.function(eigenvalues)
        if not isinstance(values, Tensor) or values.shape != eigenvalues.shape:
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"function: expected values of shape {tuple(eigenvalues.shape)}, got {got}.")
        if not values.isfinite().all():
            low, high = eigenvalues.min(), eigenvalues.max()
            raise ValueError(f"function: expected finite values at eigenvalues between {low:.3g} and {high:.3g}.")
        return values
