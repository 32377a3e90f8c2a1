"""Backends for laplace-torch: full, diagonal and Kronecker posteriors of any model. Needs the extra `laplace`."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from itertools import count
from typing import Any

import torch
from torch import Tensor

from curvops.clients.laplace_kron import BlockKron, entries
from curvops.extras import extra
from curvops.kronecker.diagonal import GGNDiagonalLinearOperator
from curvops.kronecker.kfac import KFACLinearOperator
from curvops.kronecker.operator import KroneckerOperator
from curvops.operators.linear_operator import LinearOperator
from curvops.operators.submatrix import SubmatrixLinearOperator
from curvops.products.ggn import EFLinearOperator, GGNLinearOperator
from curvops.products.hessian import HessianLinearOperator
from curvops.products.jacobian import JacobianLinearOperator
from curvops.risk.empirical_risk import EmpiricalRisk

_curvature = extra("laplace.curvature", "curvops.clients.laplace", "laplace-torch")
CurvatureInterface: Any = _curvature.CurvatureInterface
GGNInterface: Any = _curvature.GGNInterface
EFInterface: Any = _curvature.EFInterface


class CurvopsInterface(CurvatureInterface):
    """What the backends share: laplace-torch asks for one batch at a time, and sums.

    As in laplace-torch's own backends, matrices are those of the summed loss times `factor` (½ for regression, whose
    loss is the squared error).

    Args:
        model: The model, or laplace-torch's feature extractor.
        likelihood: ``"classification"`` or ``"regression"``.
        problem: ``last_layer``, ``subnetwork_indices``, ``dict_key_x``, ``dict_key_y``, as laplace-torch gives them.
        seed: Seed of samples; each batch draws its own.
        options: Options of `KFACLinearOperator`, such as ``kfac_approx`` or ``rule``, for `kron`.
    """

    def __init__(self, model: Any, likelihood: str, *problem: Any, seed: int = 0, **options: Any) -> None:
        names = ("last_layer", "subnetwork_indices", "dict_key_x", "dict_key_y", "stochastic", "num_samples")
        own = {name: options.pop(name) for name in names if name in options}
        super().__init__(model, likelihood, *problem, **own)
        self._options, self._seeds = options, count(seed)
        self._known: dict[type[KroneckerOperator], KroneckerOperator] = {}
        self._known_risk: EmpiricalRisk | None = None

    def full(self, x: Any, y: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        """The batch's loss, and its matrix ``[D, D]`` (of ``subnetwork_indices`` only, if there are any)."""
        operator = self._operator(self._risk(x, y))
        if self.subnetwork_indices is not None:
            operator = SubmatrixLinearOperator(operator, self.subnetwork_indices)
        return self._loss(), self.factor * operator.to_dense()

    def diag(self, x: Any, y: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        """The batch's loss, and the diagonal ``[D]`` of its matrix (of ``subnetwork_indices`` only)."""
        diagonal = self.factor * self._diagonal(x, y)
        return self._loss(), diagonal if self.subnetwork_indices is None else diagonal[self.subnetwork_indices]

    def kron(self, x: Any, y: Tensor, N: int, **options: Any) -> tuple[Tensor, BlockKron]:
        """The batch's loss, and KFAC as laplace-torch adds it up: Σ B over batches, and A as a mean over all ``N`` data.

        Raises:
            ValueError: If a parameter's blocks are none that laplace-torch can hold; the message names it.
        """
        kfac = self._kronecker(KFACLinearOperator, x, y, **self._options, **options)
        share = self._size(x) / N
        return self._loss(), BlockKron(*entries(kfac, share, self.factor))

    def jacobians(self, x: Any, enable_backprop: bool = False) -> tuple[Tensor, Tensor]:
        """Jacobians ``[N, C, D]`` of the outputs, and the outputs ``[N, C]``; laplace-torch's own to differentiate them."""
        if enable_backprop:
            return super().jacobians(x, enable_backprop=True)
        operator = JacobianLinearOperator(
            self.model, self.params_dict, [(x, None)], check_deterministic=False, batch_size_fn=self._size
        )
        with torch.no_grad():
            f = self.model(x)
        rows = operator.to_dense().view(*f.shape, -1)
        return rows if self.subnetwork_indices is None else rows[..., self.subnetwork_indices], f

    def _operator(self, risk: EmpiricalRisk) -> LinearOperator:
        """The matrix of `full`."""
        raise NotImplementedError

    @property
    def _fisher(self) -> dict[str, Any]:
        """What `KFACLinearOperator` and `GGNDiagonalLinearOperator` are told."""
        raise NotImplementedError

    def _diagonal(self, x: Any, y: Tensor) -> Tensor:
        return self._kronecker(GGNDiagonalLinearOperator, x, y).diagonal()

    def _kronecker(self, kind: type[KroneckerOperator], x: Any, y: Tensor, **options: Any) -> KroneckerOperator:
        """An operator of a batch; what was certified of the model for an earlier batch serves again."""
        risk, seed, known = self._risk(x, y), next(self._seeds), self._known.get(kind)
        if known is None:
            self._known[kind] = kind.of(risk, seed=seed, **self._fisher, **options)
        else:
            self._known[kind] = known.refresh([(x, y)], seed=seed)
        return self._known[kind]

    def _risk(self, x: Any, y: Tensor) -> EmpiricalRisk:
        if self._known_risk is None:
            params, size = self.params_dict, self._size
            self._known_risk = EmpiricalRisk(self.model, self.lossfunc, params, [(x, y)], batch_size_fn=size)
        else:
            self._known_risk = self._known_risk.of_data([(x, y)])
        return self._known_risk

    def _loss(self) -> Tensor:
        assert self._known_risk is not None
        return self.factor * self._known_risk.value()

    def _size(self, x: Any) -> int:
        values: Sized = x[self.dict_key_x] if isinstance(x, Mapping) else x
        return len(values)


class CurvopsGGN(CurvopsInterface, GGNInterface):
    """Generalized Gauss-Newton; with ``stochastic=True`` the Monte-Carlo Fisher of ``num_samples`` labels.

    Example:
        >>> import torch
        >>> from laplace import Laplace
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from curvops.clients.laplace import CurvopsGGN
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 3))
        >>> data = TensorDataset(torch.rand(20, 4), torch.randint(3, (20,)))
        >>> la = Laplace(model, "classification", "all", "kron", backend=CurvopsGGN)
        >>> la.fit(DataLoader(data, batch_size=5))
        >>> la(torch.rand(2, 4)).shape
        torch.Size([2, 3])
    """

    def _operator(self, risk: EmpiricalRisk) -> LinearOperator:
        samples = self.num_samples if self.stochastic else 0
        return GGNLinearOperator.of(risk, mc_samples=samples, seed=next(self._seeds))

    @property
    def _fisher(self) -> dict[str, Any]:
        return {"fisher_type": "mc", "mc_samples": self.num_samples} if self.stochastic else {"fisher_type": "type-2"}


class CurvopsEF(CurvopsInterface, EFInterface):
    """Empirical Fisher, in laplace-torch's scale: for regression twice the Gaussian log-likelihood's.

    (The gradient of the squared error is twice that of the log-likelihood, and its square is halved.)
    """

    def _operator(self, risk: EmpiricalRisk) -> LinearOperator:
        return EFLinearOperator.of(risk)

    @property
    def _fisher(self) -> dict[str, Any]:
        return {"fisher_type": "empirical"}


class CurvopsHessian(CurvopsInterface):
    """The Hessian, full or its diagonal; a posterior needs it positive definite with the prior."""

    def _operator(self, risk: EmpiricalRisk) -> LinearOperator:
        return HessianLinearOperator.of(risk)

    def _diagonal(self, x: Any, y: Tensor) -> Tensor:
        return self._operator(self._risk(x, y)).to_dense().diagonal()

    def kron(self, *_: Any, **__: Any) -> tuple[Tensor, BlockKron]:
        """A Hessian has no Kronecker factors."""
        raise NotImplementedError(
            "CurvopsHessian: a Hessian has no Kronecker factors. Use backend=CurvopsGGN, or the structure 'full' or 'diag'."
        )
