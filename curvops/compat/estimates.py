"""Estimators under the peer's names and arguments, of its functions and of its older classes."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from curvops import estimators
from curvops.estimators.probes import Distribution

TraceMethod = Literal["xtrace", "hutch++", "hutchinson"]
DiagonalMethod = Literal["xdiag", "hutchinson"]
# products without which ours have no standard error
LEAST = {"hutchinson": 2, "hutch++": 6, "xtrace": 6, "xdiag": 6}


def hutchinson_trace(A: Any, num_matvecs: int, distribution: Distribution = "rademacher") -> Tensor:
    """Trace by Hutchinson's estimator."""
    return _trace("hutchinson", A, num_matvecs, distribution)


def hutchpp_trace(A: Any, num_matvecs: int, distribution: Distribution = "rademacher") -> Tensor:
    """Trace by Hutch++."""
    return _trace("hutch++", A, num_matvecs, distribution)


def xtrace(A: Any, num_matvecs: int, distribution: Distribution = "rademacher") -> Tensor:
    """Trace by XTrace."""
    return _trace("xtrace", A, num_matvecs, distribution)


def hutchinson_diag(A: Any, num_matvecs: int, distribution: Distribution = "rademacher") -> Tensor:
    """Diagonal by Hutchinson's estimator; the vectors are random signs, whatever the distribution."""
    return _diagonal("hutchinson", A, num_matvecs)


def xdiag(A: Any, num_matvecs: int) -> Tensor:
    """Diagonal by XDiag."""
    return _diagonal("xdiag", A, num_matvecs)


def hutchinson_squared_fro(A: Any, num_matvecs: int, distribution: Distribution = "rademacher") -> Tensor:
    """Squared Frobenius norm by Hutchinson's estimator."""
    products = max(int(num_matvecs), LEAST["hutchinson"])
    return _plain(estimators.squared_norm(A, num_products=products, distribution=distribution, seed=new_seed()))


class HutchinsonTraceEstimator:
    """Trace by Hutchinson's estimator, sample by sample."""

    def __init__(self, A: Any) -> None:
        self.A = A

    def sample(self, distribution: Distribution = "rademacher") -> float:
        """A new estimate."""
        return float(hutchinson_trace(self.A, 1, distribution))


class HutchPPTraceEstimator(HutchinsonTraceEstimator):
    """Trace by Hutch++, sample by sample."""

    def __init__(self, A: Any, basis_dim: int = 2, basis_distribution: str = "rademacher") -> None:
        super().__init__(A)
        self.basis_dim = basis_dim

    def sample(self, distribution: Distribution = "rademacher") -> float:
        """A new estimate, from three times ``basis_dim`` products."""
        return float(hutchpp_trace(self.A, 3 * self.basis_dim, distribution))


class HutchinsonDiagonalEstimator(HutchinsonTraceEstimator):
    """Diagonal by Hutchinson's estimator, sample by sample."""

    def sample(self, distribution: Distribution = "rademacher") -> Any:
        """A new estimate, a NumPy array."""
        return hutchinson_diag(self.A, 1, distribution).cpu().numpy()


class HutchinsonSquaredFrobeniusNormEstimator(HutchinsonTraceEstimator):
    """Squared Frobenius norm by Hutchinson's estimator, sample by sample."""

    def sample(self, distribution: Distribution = "rademacher") -> float:
        """A new estimate."""
        return float(hutchinson_squared_fro(self.A, 1, distribution))


def _trace(method: TraceMethod, A: Any, num_matvecs: int, distribution: Distribution) -> Tensor:
    products = max(int(num_matvecs), LEAST[method])
    return _plain(estimators.trace(A, method=method, num_products=products, distribution=distribution, seed=new_seed()))


def _diagonal(method: DiagonalMethod, A: Any, num_matvecs: int) -> Tensor:
    return _plain(
        estimators.diagonal(A, method=method, num_products=max(int(num_matvecs), LEAST[method]), seed=new_seed())
    )


def _plain(estimate: Any) -> Tensor:
    found: Tensor = estimate.as_subclass(Tensor)
    return found


def new_seed() -> int:
    """A new seed from the global random state, which the peer draws from."""
    return int(torch.randint(2**62, (), device="cpu"))
