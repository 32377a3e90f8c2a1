"""What is asked of an operator: exact where its structure gives it, else estimated from products."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import wraps
from inspect import signature
from math import prod
from typing import Any, cast

import torch
from torch import Tensor

from curvops import estimators, spectrum
from curvops.context import SomeMethod, own_precision
from curvops.estimators import BlockNorms, Estimate
from curvops.estimators.groups import Groups, Rows, by_name, resolve
from curvops.estimators.norm import frobenius_norm
from curvops.lengths import lengths
from curvops.matrix import Products
from curvops.operators.damping import Damping, by_parameter, numbers, requires_gradient
from curvops.solvers import SOLVERS, Solution
from curvops.solvers.direct import direct
from curvops.space import TensorSpace, describe
from curvops.spectrum import EigenPairs, SpectralDensity, Which
from curvops.spectrum.choice import Choice
from curvops.spectrum.dense import DENSE


def in_step(method: SomeMethod) -> SomeMethod:
    """The method in our own precision, of which processes that share data learn where it fails in one of them, as by an argument."""

    @wraps(method)
    def call(self: Any, *args: Any, **options: Any) -> Any:
        with self._in_step(), own_precision(self.device):
            return method(self, *args, **options)

    return cast(SomeMethod, call)


class Quantities(ABC):
    """The methods of a `LinearOperator` that give numbers; subclasses say what they know exactly.

    "Exact" is but for rounding. Estimates come from as few products as are stated, from the random vectors of a ``seed``, and carry their standard
    error; within one call batches' graphs are kept (`LinearOperator.linearized`).
    """

    shape: tuple[int, int]
    domain: TensorSpace
    device: torch.device
    symmetric: bool
    psd: bool

    @abstractmethod
    def __matmul__(self, other: Any) -> Any:
        """Products."""

    @abstractmethod
    def damped(self, damping: Damping) -> Any:
        """The operator plus a damping on the diagonal."""

    @abstractmethod
    def _in_step(self) -> AbstractContextManager[None]:
        """A context in which other processes, if there are any, learn of an error."""

    @in_step
    def trace(self, **options: Any) -> Any:
        """The trace, an `Estimate` without axes: exact where the structure gives it.

        Args:
            options: As of `curvops.estimators.trace`: ``method``, ``num_products``, ``tolerance``, ``groups``, ``seed``, ….

        Raises:
            ValueError: If the operator is not square.

        Example:
            >>> import torch
            >>> from curvops import HessianLinearOperator, KFACLinearOperator
            >>> _ = torch.manual_seed(0)
            >>> model, data = torch.nn.Linear(3, 2), [(torch.rand(5, 3), torch.rand(5, 2))]
            >>> problem = model, torch.nn.MSELoss(), dict(model.named_parameters()), data
            >>> KFACLinearOperator(*problem, fisher_type="type-2").trace().exact
            True
            >>> HessianLinearOperator(*problem).trace(groups="tensors")
            {'weight': Estimate(1.58679, exact, 8 products), 'bias': Estimate(2, exact, 8 products)}
        """
        _check_names("trace", options, estimators.trace)
        diagonal = self._exact_diagonal() if options.get("groups") is not None else None
        if diagonal is not None:
            rows = resolve(options["groups"], Products(self, "trace"))
            return by_name(_exact(torch.stack([diagonal[own].sum() for own in rows.values()])), options["groups"], rows)
        known = self._exact_trace()
        return estimators.trace(self, **options) if known is None else _exact(known)

    @in_step
    def diagonal(self, **options: Any) -> Any:
        """The diagonal, an `Estimate` ``[D]``: exact where the structure gives it.

        Args:
            options: As of `curvops.estimators.diagonal`: ``method``, ``num_products``, ``tolerance``, ``groups``, ``seed``, ….

        Raises:
            ValueError: If the operator is not square.
        """
        _check_names("diagonal", options, estimators.diagonal)
        known = self._exact_diagonal()
        if known is None:
            return estimators.diagonal(self, **options)
        if options.get("groups") is None:
            return _exact(known)
        rows = resolve(options["groups"], Products(self, "diagonal"))
        return {name: _exact(known[own].clone()) for name, own in rows.items()}

    @in_step
    def frobenius_norm(self, **options: Any) -> Estimate:
        """The Frobenius norm, an `Estimate` without axes: exact where the structure gives it.

        Args:
            options: As of `curvops.estimators.squared_norm`, whose root this is, without ``groups``.
        """
        _check_names("frobenius_norm", options, estimators.squared_norm)
        if "groups" in options:
            raise TypeError(
                "frobenius_norm: it has no groups. Take the root of curvops.estimators.squared_norm(op, groups=…)."
            )
        known = self._exact_norm()
        if known is not None:
            return _exact(known)
        return frobenius_norm(self, **options)

    @in_step
    def block_norms(self, groups: Groups = "modules", **options: Any) -> BlockNorms:
        """Frobenius norms of all blocks, and traces of those on the diagonal: exact where the structure gives them.

        Args:
            groups: ``"modules"``, ``"tensors"``, or a dict of them, see `curvops.estimators.trace`.
            options: As of `curvops.estimators.block_norms`.

        Raises:
            ValueError: If the operator is not square.

        Example:
            >>> import torch
            >>> from curvops import KFACLinearOperator
            >>> model, data = torch.nn.Linear(3, 2), [(torch.rand(5, 3), torch.rand(5, 2))]
            >>> kfac = KFACLinearOperator(model, torch.nn.MSELoss(), dict(model.named_parameters()), data)
            >>> found = kfac.block_norms("tensors")
            >>> found.names, found.norms.exact, bool(found.norms[0, 1] == 0)
            (('weight', 'bias'), True, True)
        """
        _check_names("block_norms", options, estimators.block_norms)
        rows = resolve(groups, Products(self, "block norms"))
        known, diagonal = self._exact_block_norms(rows), self._exact_diagonal()
        if known is None or diagonal is None:
            return estimators.block_norms(self, groups, **options)
        squares, scale = known
        traces = torch.stack([diagonal[own].sum() for own in rows.values()])
        both, each = ((found, torch.zeros_like(found)) for found in (squares, traces))
        return BlockNorms.of(rows, both, each, scale, products=0, method="structure", exact=True)

    @in_step
    def logdet(self, damping: Damping = 0.0, **options: Any) -> Estimate:
        """Logarithm of the determinant of the matrix plus ``damping`` times the identity, an `Estimate` without axes.

        Exact where the structure gives it or the dense matrix is made, and then −∞ for a singular matrix, as every
        curvature with an unused parameter is without damping; else by Lanczos quadrature, whose error with little damping
        is stated, and much smaller with a larger ``depth``. Differentiable in a damping that is one tensor, and where the
        structure gives it in one for each parameter: a marginal likelihood is tuned by it.

        Args:
            damping: δ ≥ 0, or one for each parameter by name.
            options: As of `curvops.estimators.logdet`.

        Raises:
            TypeError: If dampings of the parameters require gradients, and the structure does not give it.
            ValueError: If an eigenvalue is negative, a damping is negative, or names do not fit.

        Example:
            >>> import torch
            >>> from curvops import DiagonalOperator
            >>> tau = torch.tensor(1.0, requires_grad=True)
            >>> (4 * DiagonalOperator(torch.tensor([0.25, 0.75]))).logdet(tau).backward()
            >>> tau.grad  # 1 / 2 + 1 / 4
            tensor(0.7500)
        """
        _check_names("logdet", options, estimators.logdet)
        by_parameter(damping, self.domain)
        known = self._exact_logdet(damping)
        if known is not None:
            return _exact(known)
        if isinstance(damping, Mapping):
            if any(map(requires_gradient, damping.values())):
                raise TypeError(
                    "logdet: this operator's is not known from its structure (Kronecker, diagonal, low rank), and is differentiable in one "
                    "damping only. Pass one tensor for all parameters, or numbers without a gradient, damping.detach()."
                )
            return estimators.logdet(self.damped(damping), **options)
        return estimators.logdet(self, damping=damping, **options)

    @in_step
    def eigenpairs(self, k: int, which: Which = "largest", **options: Any) -> EigenPairs:
        """Eigenvalues and eigenvectors at the ends of the spectrum, `EigenPairs`, which unpack to ``values, vectors``.

        Exact where the structure gives them, else by block Lanczos, which for up to 2,000 columns ends in the dense matrix.

        Args:
            k: How many, from each end if ``which`` is ``"both"``.
            which: ``"largest"``, ``"smallest"``, ``"both"`` or ``"magnitude"``.
            options: As of `curvops.spectrum.eigenpairs`: ``tolerance``, ``max_products``, ``start``, ``metric``, ….

        Raises:
            ValueError: If the operator is not symmetric, or ``k`` does not fit.

        Example:
            >>> import torch
            >>> from curvops import HessianLinearOperator
            >>> model, data = torch.nn.Linear(3, 2), [(torch.rand(5, 3), torch.rand(5, 2))]
            >>> hessian = HessianLinearOperator(model, torch.nn.MSELoss(), dict(model.named_parameters()), data)
            >>> pairs = hessian.eigenpairs(1)
            >>> pairs.values.shape, pairs.vectors.shape, {name: t.shape for name, t in pairs.named(0).items()}
            (torch.Size([1]), torch.Size([8, 1]), {'weight': torch.Size([2, 3]), 'bias': torch.Size([2])})
        """
        _check_names("eigenpairs", options, spectrum.eigenpairs)
        if "metric" not in options and (values := self._exact_eigenvalues()) is not None:
            chosen = Choice(which, k, len(values)).of(values)
            values, vectors = values[chosen], self._exact_eigenvectors(chosen)
            residuals = lengths(self @ vectors - vectors * values).to(values)  # what rounding leaves
            return EigenPairs(values, vectors, residuals, 0, True, "structure", self.domain)
        return spectrum.eigenpairs(self, k, which, **options)

    @in_step
    def spectral_density(self, **options: Any) -> SpectralDensity:
        """How many eigenvalues lie where: exact where the structure gives them, or few products do, else with an error band.

        That is by stochastic Lanczos quadrature, from ``depth`` × ``num_vectors`` products; where the matrix has no more
        columns, and at most 2,000, these are multiplied instead, and the eigenvalues of the dense matrix are exact.

        Args:
            options: As of `curvops.spectrum.spectral_density`: ``depth``, ``num_vectors``, ``deflate``, ``seed``, ….

        Raises:
            ValueError: If the operator is not symmetric.
        """
        _check_names("spectral_density", options, spectrum.spectral_density)
        if options.get("deflate") is None and (known := self._exact_eigenvalues()) is not None:
            return SpectralDensity.of(known)
        dim, asked = self.shape[0], {**_defaults(spectrum.spectral_density), **options}
        counts, plain = (asked["depth"], asked["num_vectors"]), asked["deflate"] is asked["checkpoint"] is None
        counted = all(isinstance(count, int) and count > 0 for count in counts)
        if self.symmetric and plain and counted and dim <= min(prod(counts), DENSE):
            return SpectralDensity.of(spectrum.eigenpairs(self, dim, progressbar=asked["progressbar"]).values)
        return spectrum.spectral_density(self, **options)

    @in_step
    def solve(self, b: Any, damping: Damping = 0.0, *, solver: str | None = None, **options: Any) -> Solution:
        """Solve (A + δI) x = b: by the inverse where the structure gives it, to the tolerance, else by iteration.

        Args:
            b: Right-hand side or sides, in any format.
            damping: δ ≥ 0, or one for each parameter by name.
            solver: ``"cg"``, ``"minres"``, ``"lsmr"`` or ``"neumann"``. If not given: conjugate gradients for a psd
                operator, MINRES for another symmetric one, else LSMR (least squares).
            options: The solver's: ``tolerance``, ``preconditioner``, ``x0``, ``max_iterations``, ….

        Returns:
            A `Solution`: ``x`` in the format of b, its relative residual, products, and why the solver stopped.

        Raises:
            ValueError: If an option or a format does not fit, or a solver does not cover such a matrix.

        Example:
            >>> import torch
            >>> from curvops import GGNLinearOperator, KFACLinearOperator
            >>> model, data = torch.nn.Linear(3, 2).double(), [(torch.rand(5, 3).double(), torch.rand(5, 2).double())]
            >>> problem = model, torch.nn.MSELoss(), dict(model.named_parameters()), data
            >>> ggn, kfac = GGNLinearOperator(*problem), KFACLinearOperator(*problem, fisher_type="type-2")
            >>> solution = ggn.solve(torch.ones(8).double(), 1e-2, preconditioner=kfac.inverse(1e-2))
            >>> solution.converged, bool(solution.residual < 1e-5)
            (True, True)
        """
        _check_names("solve", options, *([SOLVERS[solver]] if solver in SOLVERS else SOLVERS.values()))
        damped = self._damped_by(damping)
        inverse = self._exact_inverse(damping) if solver is None else None
        if inverse is not None:
            found = direct(damped, b, inverse, tolerance=options.get("tolerance"))
            return replace(found, reason="the structure gives the inverse") if found.converged else found
        matrix, solver, shift = self._to_solve(damping, solver)
        return SOLVERS[solver](matrix, b, **shift, **options)

    def _damped_by(self, damping: Damping) -> Any:
        return self.damped(damping) if any(numbers(damping, self.domain).values()) else self

    def _to_solve(self, damping: Damping, solver: str | None) -> tuple[Any, str, dict[str, Any]]:
        """What is to be solved, by which solver, and the damping where that takes it."""
        damped = self._damped_by(damping)
        if solver is None:
            solver = "cg" if self.psd else "minres" if self.symmetric else "lsmr"
        if solver not in SOLVERS:
            raise ValueError(f"solver: expected one of {', '.join(map(repr, SOLVERS))}, got {solver!r}.")
        if solver in ("cg", "minres") and not isinstance(damping, Mapping):
            return self, solver, {"damping": float(damping)}
        return damped, solver, {}

    def _exact_trace(self) -> Tensor | None:
        diagonal = self._exact_diagonal()
        return None if diagonal is None else diagonal.sum()

    def _exact_diagonal(self) -> Tensor | None:
        return None

    def _exact_norm(self) -> Tensor | None:
        return None

    def _exact_block_norms(self, groups: Mapping[str, Rows]) -> tuple[Tensor, Tensor] | None:
        """‖A_ij‖² over a scale² of all pairs of groups, ``[G, G]``, and the scale."""
        return None

    def _exact_logdet(self, damping: Damping) -> Tensor | None:
        return None

    def _exact_eigenvalues(self) -> Tensor | None:
        """All eigenvalues ``[D]``, in ascending order."""
        return None

    def _exact_eigenvectors(self, chosen: Tensor) -> Tensor:
        """The eigenvectors ``[D, k]`` of some of them, where these are known."""
        raise NotImplementedError

    def _exact_inverse(self, damping: Damping) -> Any:
        return None


def _check_names(what: str, options: Mapping[str, Any], *functions: Callable[..., Any]) -> None:
    """Refuse options that no function has, also where the structure gives the answer and nobody else looks at them."""
    parameters = {name: each for function in functions for name, each in signature(function).parameters.items()}
    known = {name for name, each in parameters.items() if each.kind is each.KEYWORD_ONLY} - {"damping"}
    if unknown := options.keys() - known:
        raise TypeError(f"{what}: unknown options {describe(sorted(unknown))}; there are {', '.join(sorted(known))}.")


def _defaults(function: Callable[..., Any]) -> dict[str, Any]:
    return {name: each.default for name, each in signature(function).parameters.items()}


def _exact(value: Tensor) -> Estimate:
    return Estimate.of(value, torch.zeros_like(value), products=0, method="structure", exact=True)
