"""Spectral density of a symmetric matrix: how many of its eigenvalues lie where, with an error band."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from curvops.checkpoint import Checkpoint
from curvops.display import card
from curvops.matrix import Products, normal, seeded
from curvops.memory import budget
from curvops.spectrum.krylov import Map
from curvops.spectrum.pairs import EigenPairs
from curvops.spectrum.quadrature import SPENT, quadrature
from curvops.spectrum.saved import Saved

Scale = Literal["linear", "symlog"]
NOTHING = 1e-30  # a weight, a square, that rounding leaves where there is none


class Curve(NamedTuple):
    """Estimates at some points, with their errors: standard ones (NaN from one start vector), and what a method adds."""

    points: Tensor
    values: Tensor
    errors: Tensor


@dataclass(frozen=True)
class SpectralDensity:
    """The distribution of D eigenvalues, each with weight 1 / D: a bulk by quadrature, and outliers exactly.

    Attributes:
        nodes, weights: Of the bulk, for each of K start vectors, ``[K, m]``; each start's weights sum to 1. Where all
            eigenvalues were known, these (K = 1), or the ends of bins of them (K = 2).
        outliers: Eigenvalues that were deflated, ``[p]``.
        dim: D.
        products: Products of the quadrature; none where all eigenvalues are known.
        complete: Whether each start's Krylov space ended within its m steps, so that its nodes are all that it sees.
        rounding: How far rounding moves nodes.
    """

    nodes: Tensor
    weights: Tensor
    outliers: Tensor
    dim: int
    products: int
    complete: bool = False
    rounding: float = 0.0

    @classmethod
    def of(cls, eigenvalues: Tensor, bins: int = 4000) -> SpectralDensity:
        """The density of all eigenvalues ``[D]``, exact while no more than ``bins`` of them differ.

        More are put into bins, even on a symmetric logarithm down to 1e-12 of the largest |λ|, none with both signs; zeros
        have their own. A bin's eigenvalues are all taken for its smallest (one row of nodes) and all for its largest
        (another): the truth lies between, and errors are half the distance.

        Example:
            >>> import torch
            >>> found = SpectralDensity.of(torch.tensor([0.0, 1.0, 1.0, 5.0]))
            >>> [round(x, 4) for x in found.cumulative(torch.tensor([0.5, 1.0])).values.tolist()]
            [0.25, 0.75]
        """
        known, counts = eigenvalues.detach().double().cpu().unique(return_counts=True)
        rows = known[None]
        if len(known) > bins:
            places = (known / known.abs().max() * 1e12).asinh()
            index = (places * (bins / float(places[-1] - places[0]))).floor() + 0.5
            sizes = index.where(known != 0, 0).unique_consecutive(return_counts=True)[1]
            ends = sizes.cumsum(0)
            rows = torch.stack([known[ends - sizes], known[ends - 1]])
            counts = torch.cat([counts.new_zeros(1), counts.cumsum(0)[ends - 1]]).diff()
        size = eigenvalues.numel()
        return cls(rows, counts.double().expand_as(rows) / size, known[:0], size, 0)

    def density(
        self, points: Tensor | None = None, *, width: float | None = None, scale: Scale = "linear",
        threshold: float | None = None, outliers: bool = True,
    ) -> Curve:  # fmt: skip
        """Density smoothed by a Gaussian, which integrates to 1 over the scale's coordinate.

        Details between nodes are not resolved: a node stands for all eigenvalues near it, and errors are of the start
        vectors only. `cumulative` states both.

        Args:
            points: Eigenvalues to evaluate at. Default: 1,000 over the spectrum, even on the scale.
            width: Standard deviation of the Gaussian on the scale. Default: 1 % of the spectrum's extent.
            scale: ``"linear"``: per unit of λ. ``"symlog"``: per unit of asinh(λ / threshold), which is linear near zero
                and logarithmic on both sides.
            threshold: Where symmetric-log turns. Default: 1e-4 of the largest |λ|.
            outliers: Whether the deflated eigenvalues are drawn too.
        """
        largest = torch.cat([self.nodes.flatten(), self.outliers]).abs().max()
        turn = float(threshold or 1e-4 * largest or 1.0)

        def place(values: Tensor) -> Tensor:
            return (values / turn).asinh() if scale == "symlog" else values

        if scale not in ("linear", "symlog"):
            raise ValueError(f"scale: expected 'linear' or 'symlog', got {scale!r}.")
        for name, given in (("width", width), ("threshold", threshold)):
            if given is not None and not given > 0:
                raise ValueError(f"{name}: expected a positive number, got {given!r}.")
        seen = place(torch.cat([self.nodes[self.weights > 0], self.outliers if outliers else self.outliers[:0]]))
        low, high = float(seen.min()), float(seen.max())
        width = width or (high - low) / 100 or max(abs(high), 1.0) / 100
        if points is None:
            even = torch.linspace(low - 5 * width, high + 5 * width, 1000, dtype=torch.float64, device="cpu")
            points = turn * even.sinh() if scale == "symlog" else even
        at = place(points.double().cpu())

        def kernel(values: Tensor) -> Tensor:
            distance = (at - place(values).unsqueeze(-1)) / width
            return (-distance.square() / 2).exp() / (width * (2 * torch.pi) ** 0.5)

        by_start = torch.stack([w @ kernel(n) for n, w in zip(self.nodes, self.weights, strict=True)])
        return self._curve(points, by_start, kernel(self.outliers).sum(0) if outliers else 0.0)

    def cumulative(self, points: Tensor) -> Curve:
        """The part of the eigenvalues that are at most each point, from 0 to 1.

        From nodes θ with weights ω, a start's part F(x) for θₖ ≤ x < θₖ₊₁ is known to lie between ω₁ + … + ωₖ₋₁ and
        ω₁ + … + ωₖ₊₁ only (the Chebyshev–Markov–Stieltjes inequalities), and beyond all nodes within 1 / Σ pⱼ(x)² of 0
        or 1, with orthonormal polynomials p. Values are middles of these brackets. Errors are standard errors plus half
        the brackets, which more start vectors do not narrow, but a larger ``depth`` does. There is no bracket where all
        eigenvalues were known (but for the bin that a point is in, see `of`), or each Krylov space ended, except where a
        node is as near as rounding moves it.

        Source: Szegő 1939, section 3.41; Golub & Meurant 2010, Matrices, Moments and Quadrature.

        Example:
            >>> import torch
            >>> matrix = torch.diag(torch.arange(500.0))
            >>> found = spectral_density(matrix, depth=20).cumulative(torch.tensor([249.5]))
            >>> bool((found.values - 0.5).abs() <= found.errors), bool(found.errors < 0.1)
            (True, True)
        """
        at = points.double().cpu()
        brackets = [self._bracket(n, w, at) for n, w in zip(self.nodes, self.weights, strict=True)]
        low, high = (torch.stack(ends) for ends in zip(*brackets, strict=True))
        curve = self._curve(points, (low + high) / 2, (self.outliers <= at.unsqueeze(1)).double().sum(1))
        resolution = (high - low).mean(0) / 2 * (1 - len(self.outliers) / self.dim)
        return curve._replace(errors=curve.errors + resolution)

    def _bracket(self, nodes: Tensor, weights: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """Bounds of one start's part of eigenvalues at most each point."""
        seen = weights > NOTHING  # nodes of no weight bound nothing
        nodes, order = nodes[seen].sort()
        weights = weights[seen][order]
        sums = torch.cat([weights.new_zeros(1), weights.cumsum(0)])
        below, above = (torch.searchsorted(nodes, at + shift, right=True) for shift in (-self.rounding, self.rounding))
        if self.complete or not self.products:
            return sums[below], sums[above]
        low, high = sums[(below - 1).clamp(min=0)], sums[(above + 1).clamp(max=len(nodes))]
        beyond = _christoffel(nodes, weights, at)
        return (
            torch.where(below == len(nodes), torch.maximum(low, sums[-1] - beyond), low),
            torch.where(above == 0, torch.minimum(high, beyond), high),
        )

    def moments(self, degree: int) -> Curve:
        """tr(Aᵖ) / D for p = 0, …, degree."""
        powers = torch.arange(degree + 1, dtype=torch.float64, device="cpu")
        by_start = (self.weights.unsqueeze(-1) * self.nodes.unsqueeze(-1) ** powers).sum(1)
        return self._curve(powers, by_start, (self.outliers.unsqueeze(-1) ** powers).sum(0))

    def __repr__(self) -> str:
        return f"SpectralDensity({'; '.join(f'{name}: {value}' for name, value in self._facts())})"

    def _repr_html_(self) -> str:
        return card("Spectral density", self._facts())

    def _facts(self) -> list[tuple[str, str]]:
        seen = torch.cat([self.nodes[self.weights > 0].flatten(), self.outliers.to(self.nodes)])
        starts, depth = self.nodes.shape
        return [
            ("eigenvalues", f"{self.dim:,}, seen from {float(seen.min()):.4g} to {float(seen.max()):.4g}"),
            ("outliers", f"{len(self.outliers)}, exactly"),
            (
                "took",
                f"{self.products} products: {starts} start vectors, {depth} nodes each"
                if self.products
                else f"all are known{f', in {depth} bins' if starts > 1 else ''}",
            ),
        ]

    def _curve(self, points: Tensor, by_start: Tensor, outliers: Tensor | float) -> Curve:
        """Mean over starts, which are orthonormal: a sample without replacement from the bulk's dimensions.

        Without products the rows are bounds instead: the middle, and half the distance.
        """
        count, bulk = len(by_start), self.dim - len(self.outliers)
        share = bulk / self.dim
        known = torch.as_tensor(outliers, dtype=by_start.dtype, device=by_start.device)
        values = share * by_start.mean(0) + known / self.dim
        if not self.products:
            return Curve(points, values, (by_start.amax(0) - by_start.amin(0)) / 2)
        spread = by_start.std(0) if count > 1 else torch.full_like(by_start[0], torch.nan)
        errors = share * spread * ((bulk - count) / (bulk * count)) ** 0.5
        return Curve(points, values, torch.zeros_like(values) if count == bulk else errors)


def _christoffel(nodes: Tensor, weights: Tensor, at: Tensor) -> Tensor:
    """1 / Σ pⱼ(x)², the most that a measure of these Gauss nodes can have at x, by Lagrange's polynomials ℓ.

    Σ pⱼ(x)² = Σ ℓₖ(x)² / ωₖ, in logarithms, as products of many distances overflow.
    """
    tiny = torch.finfo(nodes.dtype).tiny
    apart = (nodes.unsqueeze(1) - nodes).abs().clamp(min=tiny).log().fill_diagonal_(0).sum(1)
    distances = (at.unsqueeze(1) - nodes).abs().clamp(min=tiny).log()
    lagrange = distances.sum(1, keepdim=True) - distances - apart
    return (-(2 * lagrange - weights.log()).logsumexp(1)).exp()


def spectral_density(
    matrix: Any,
    *,
    depth: int = 64,
    num_vectors: int = 8,
    deflate: EigenPairs | None = None,
    seed: int = 0,
    memory_budget: int | None = None,
    basis_device: torch.device | str | None = None,
    basis_dtype: torch.dtype | None = None,
    checkpoint: Checkpoint | None = None,
    progressbar: bool = False,
) -> SpectralDensity:
    """Spectral density by stochastic Lanczos quadrature (Ubaru, Chen & Saad 2017).

    Start vectors are orthonormal columns of a random rotation. So estimates have no bias but the quadrature's, which
    `SpectralDensity.cumulative` bounds and which ends where ``depth`` reaches the dimension of the Krylov space, and D start vectors have no variance.

    Args:
        matrix: Symmetric, see `curvops.matrix.Matrix`.
        depth: Lanczos steps for each start vector. Moments up to degree 2 depth - 1 have no bias.
        num_vectors: Start vectors, no more than D are taken. They are multiplied together.
        deflate: Eigenpairs that are taken out first: outliers, whose places are then exact.
        seed: Of the start vectors.
        memory_budget: Bytes for the bases; starts go in groups whose bases fit. Default: a quarter of what is free.
        basis_device: Where the bases live. Default: the matrix's device.
        basis_dtype: Their precision, to which orthogonality is kept. Default: that of the matrix, at least single.
        checkpoint: Where the state is kept, to go on from after the process was killed, as of `eigenpairs`.
        progressbar: Show a bar that counts products.

    Raises:
        TypeError, ValueError: If the matrix or an argument is not as described.

    Example:
        >>> import torch
        >>> matrix = torch.diag(torch.tensor([1.0, 1.0, 1.0, 5.0]))
        >>> found = spectral_density(matrix, num_vectors=4)
        >>> torch.testing.assert_close(found.cumulative(torch.tensor([2.0])).values, torch.tensor([0.75]).double())
    """
    with Products(matrix, "spectral density", symmetric=True, progressbar=progressbar) as products:
        size = products.shape[0]
        wide = torch.promote_types(products.dtype, torch.float32)  # half precisions know no QR decomposition
        vectors = deflate.vectors.to(products.device, wide) if deflate is not None else None
        if vectors is not None and not (len(vectors) == size and vectors.shape[1] < size):
            raise ValueError(f"deflate: expected fewer than {size} vectors of this length, got {tuple(vectors.shape)}.")
        if vectors is not None:
            gram, single = vectors.T @ vectors, torch.finfo(torch.float32).eps  # as of a basis of low precision
            identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
            if not (gram - identity).abs().max() <= max(torch.finfo(products.dtype).eps, single) ** 0.5:
                raise ValueError(
                    "deflate: expected orthonormal vectors. Those of A v = λ B v are not: leave the metric out."
                )
        bulk = size if vectors is None else size - vectors.shape[1]
        if not isinstance(num_vectors, int) or num_vectors < 1:
            raise ValueError(f"num_vectors: expected a positive integer, got {num_vectors!r}.")
        if not bulk:
            raise ValueError(f"spectral density: expected a matrix with columns, got shape {products.shape}.")

        def outside(columns: Tensor) -> Tensor:
            return columns if vectors is None else columns - vectors @ (vectors.T @ columns)

        def image(columns: Tensor) -> Tensor:
            return outside(products(columns.to(products.dtype)).to(wide))

        starts = normal((size, min(num_vectors, bulk)), seeded(seed), products).to(wide)
        starts = torch.linalg.qr(outside(torch.linalg.qr(outside(starts))[0]))[0]
        device, dtype = torch.device(basis_device or products.device), basis_dtype or wide
        together = max(1, budget(device, memory_budget) // (max(1, depth) * size * dtype.itemsize))
        asked = {"depth": depth, "seed": seed, "basis_dtype": dtype, "basis_device": device.type}
        saved = Saved(checkpoint, products, asked, starts, image)
        groups = starts.split(saved.about.get("together", together), dim=1)
        # what is outside of deflated vectors is so to single precision at least, see above
        precision = (
            products.dtype if vectors is None else min(products.dtype, torch.float32, key=lambda t: -torch.finfo(t).eps)
        )
        rules = _rules(image, groups, depth, device, dtype, precision, saved)
        nodes, weights, ended = (torch.cat(parts) for parts in zip(*rules, strict=True))
        outliers = torch.zeros(0, device="cpu") if deflate is None else deflate.values
        complete = bool(ended.all()) or depth >= bulk
        rounding = (
            SPENT
            * torch.finfo(products.dtype).eps
            * float(torch.cat([nodes.flatten(), outliers.to(nodes)]).abs().max())
        )
        outliers = outliers.to("cpu", torch.float64, copy=True)
        return SpectralDensity(nodes, weights, outliers, size, products.count, complete, rounding)


def _rules(
    image: Map,
    groups: Sequence[Tensor],
    depth: int,
    device: torch.device,
    dtype: torch.dtype,
    precision: torch.dtype,
    saved: Saved,
) -> list[tuple[Tensor, ...]]:
    """Quadratures at groups of starts, from the state that was saved on."""
    names, known = ("nodes", "weights", "ended"), saved.tensors
    rules = [tuple(known[f"{k}.{name}"] for name in names) for k in range(saved.about.get("rules", 0))]
    unfinished = known if "bases" in known else None

    def write(state: dict[str, Tensor], due: bool = False) -> None:
        finished = {f"{k}.{name}": t for k, rule in enumerate(rules) for name, t in zip(names, rule, strict=True)}
        saved.write(lambda: ({**finished, **state}, {"rules": len(rules), "together": groups[0].shape[1]}), due)

    if not saved.about:
        write({}, due=True)
    for starts in groups[len(rules) :]:
        rule = quadrature(
            image,
            starts,
            depth,
            basis_device=device,
            basis_dtype=dtype,
            precision=precision,
            state=unfinished,
            done=write,
        )
        rules, unfinished = [*rules, rule], None
        write({}, due=len(rules) == len(groups))
    return rules
