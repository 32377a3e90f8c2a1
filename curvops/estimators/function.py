"""The trace of a function of a symmetric matrix, and its log-determinant, by stochastic Lanczos quadrature."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from curvops.checkpoint import Checkpoint
from curvops.estimators.estimate import Estimate
from curvops.estimators.probes import Distribution, Probes, mean_and_error
from curvops.estimators.rounds import Budget, Sampler, run
from curvops.lengths import size_of
from curvops.matrix import Matrix, Products
from curvops.memory import check_fits
from curvops.spectrum.quadrature import Recurrence, recurrence


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

    Hutchinson's estimate of tr f(A), where vᵀ f(A) v comes from ``depth`` products with A, as the middle between a Gauss
    and a Gauss–Radau quadrature, both exact for polynomials of degree 2·depth − 1. The error is that of the random vectors
    plus half of what is between the two, which more vectors do not narrow, but more depth does: geometrically, the faster
    the smoother f is over the spectrum. For logarithm, powers below 1 and inverse of a psd matrix that are damped, the
    truth is between them. Where there are as many products as columns, f of the eigenvalues of the dense matrix is
    summed, and the result is exact.

    Radau's added node is 0 where no negative eigenvalue is seen and f is finite there, else what the vectors see none
    below. Source: Golub & Meurant 2010, chapter 6.

    Args:
        matrix: Symmetric; a `LinearOperator`, a tensor, SciPy's, or anything with a shape and products.
        function: f, from eigenvalues to values of the same shape; the result is differentiable in what it captures. It is
            also asked at the added node, where a value that is not finite says that it has none.
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
    budget = Budget(num_products, tolerance, max_products)
    sampler = partial(_Quadrature, function=function)
    return _run(matrix, sampler, budget, depth, seed, distribution, checkpoint, progressbar)


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
    damping needs much depth: the error of the quadrature, which is stated, falls by about exp(−4 depth √(τ/‖A‖)). A dense
    matrix that is declared psd and singular but for rounding has −∞.

    Args:
        matrix: Symmetric.
        damping: τ; a tensor without axes may require a gradient, which flows to it.

    Raises:
        ValueError: If A + τI is not positive definite, beyond rounding; if products are not symmetric.

    Example:
        >>> import torch
        >>> damping = torch.tensor(1.0, requires_grad=True)
        >>> found = logdet(torch.diag(torch.tensor([0.0, 1.0])), damping=damping)
        >>> found.backward()
        >>> found, damping.grad  # log 1 + log 2, and 1/1 + 1/2
        (Estimate(0.693147, exact, 2 products), tensor(1.5000))
    """

    sampler = partial(_LogDeterminant, damping=damping, psd=bool(getattr(matrix, "psd", False)))
    budget = Budget(num_products, tolerance, max_products)
    return _run(matrix, sampler, budget, depth, seed, distribution, checkpoint, progressbar)


def _run(
    matrix: Matrix,
    make: Callable[..., _Quadrature],
    budget: Budget,
    depth: int,
    seed: int,
    distribution: Distribution,
    checkpoint: Checkpoint | None,
    progressbar: bool,
) -> Estimate:
    if not isinstance(depth, int) or isinstance(depth, bool) or depth < 1:
        raise ValueError(f"depth: expected a positive integer, got {depth!r}.")
    with Products(matrix, "trace of a function", symmetric=True, progressbar=progressbar) as products:
        sampler = make(Probes(products, seed, distribution), min(depth, products.shape[0]))
        found = run(sampler, budget, checkpoint=checkpoint, seed=seed, distribution=distribution).part(0)
        sampler.tell(found)
        return found


class _Quadrature(Sampler):
    least, known = 2, ("diagonal", "beside")

    def __init__(self, probes: Probes, depth: int, function: Callable[[Tensor], Tensor]) -> None:
        self.probes, self.function = probes, function
        self.cost = self.apart = depth  # the quadrature keeps as many vectors as it takes products
        self.method = f"Lanczos quadrature of depth {depth}"
        self.diagonal = self.beside = torch.zeros(0, depth, dtype=torch.float64, device="cpu")
        self.between = 0.0  # half of what is between the two quadratures, of the whole trace

    def add(self, count: int) -> None:
        probes = self.probes
        for start in range(0, count, self.step):
            starts = torch.nn.functional.normalize(probes.draw(min(self.step, count - start)), dim=0)
            found = recurrence(probes.times, starts, self.cost, precision=probes.products.dtype)
            self.diagonal = torch.cat([self.diagonal, found.diagonal])
            self.beside = torch.cat([self.beside, found.beside])

    def result(self) -> tuple[Tensor, Tensor]:
        known = Recurrence(self.diagonal, self.beside, self.probes.size)
        upper = self._sums(*known.gauss())
        lower = self._lower(known)
        half = (lower - upper) / 2
        sure = bool(half.isfinite().all())
        value, error = mean_and_error((upper + half if sure else upper)[None])
        self.between = float(half.detach().abs().mean()) if sure else math.inf
        return value, error + self.between

    def tell(self, found: Estimate) -> None:
        """Warn where more vectors would not help."""
        error = float(found.standard_error)
        some = torch.finfo(found.dtype).eps ** 0.5 * abs(found.item())
        if not found.exact and (error == math.inf or self.between > max(error / 2, some)):
            warnings.warn(
                f"{self.probes.products.title}: of the error of {error:.2g}, {self.between:.2g} are the quadrature's, which more "
                f"vectors do not narrow, but a depth above {self.cost} or a larger damping does.",
                stacklevel=4,
            )

    def exact(self) -> Tensor:
        return self._values(self._eigenvalues()).sum(0, keepdim=True)

    def refused(self, eigenvalues: Tensor) -> str:
        """What is said where f is not finite."""
        low, high = eigenvalues.min(), eigenvalues.max()
        return f"function: expected finite values at eigenvalues between {low:.3g} and {high:.3g}."

    def _lower(self, known: Recurrence) -> Tensor:
        """The sums of a quadrature with a node at the lower end; not finite where f is not at any such end."""
        low = known.lowest()
        for end in (0.0, low) if known.gauss()[0].min() >= 0 else (low,):
            nodes, weights = (part.to(self.probes.products.device, self.probes.dtype) for part in known.radau(end))
            values = self.function(nodes)
            if values.isfinite().all():
                return self.probes.size * (weights * values).sum(1)
        return torch.full((len(nodes),), math.nan, dtype=self.probes.dtype, device=nodes.device)

    def _sums(self, nodes: Tensor, weights: Tensor) -> Tensor:
        nodes, weights = (part.to(self.probes.products.device, self.probes.dtype) for part in (nodes, weights))
        return self.probes.size * (weights * self._values(nodes)).sum(1)

    def _eigenvalues(self) -> Tensor:
        products, probes = self.probes.products, self.probes
        check_fits(*products.shape, probes.dtype, products.device, products.title)
        dense = torch.cat([product for _, product in probes.identity()], 1)
        if size_of(dense - dense.mT) > 10 * torch.finfo(products.dtype).eps ** 0.5 * size_of(dense):
            raise ValueError(f"{products.title}: products with {products.name} are not symmetric.")
        return torch.linalg.eigvalsh((dense + dense.mT) / 2)

    def _values(self, eigenvalues: Tensor) -> Tensor:
        values = self.function(eigenvalues)
        if not isinstance(values, Tensor) or values.shape != eigenvalues.shape:
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"function: expected values of shape {tuple(eigenvalues.shape)}, got {got}.")
        if not values.isfinite().all():
            raise ValueError(self.refused(eigenvalues))
        return values


class _LogDeterminant(_Quadrature):
    def __init__(self, probes: Probes, depth: int, damping: float | Tensor, psd: bool) -> None:
        super().__init__(probes, depth, self._logarithm)
        self.damping, self.psd = damping, psd

    def _logarithm(self, eigenvalues: Tensor) -> Tensor:
        shifted = eigenvalues + self.damping
        # what is smaller is zero but for rounding, and its logarithm anything
        rounding = 10 * torch.finfo(eigenvalues.dtype).eps * eigenvalues.abs().max()
        return torch.where(shifted > rounding, shifted, math.nan).log()

    def exact(self) -> Tensor:
        eigenvalues = self._eigenvalues()
        values = self.function(eigenvalues)
        if self.psd and not values.isfinite().all():
            return values.new_full((1,), -math.inf)
        return self._values(eigenvalues).sum(0, keepdim=True)

    def refused(self, eigenvalues: Tensor) -> str:
        return (
            f"logdet: expected a positive definite matrix, got an eigenvalue of {eigenvalues.min():.3g} with a "
            f"damping of {float(self.damping):.3g}, beside one of {eigenvalues.max():.3g}. Raise the damping"
            f"{'' if self.psd else ', or take a positive semi-definite matrix (GGN, Fisher, KFAC)'}."
        )
