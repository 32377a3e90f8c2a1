"""Hessian of the empirical risk, as a linear operator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.func import grad, jvp

from curvops.products.batches import Upgrade
from curvops.products.certify import Account, relative_difference
from curvops.products.held import JOINED, HeldMatrix
from curvops.products.judge import judge_hessian
from curvops.products.keep import Build
from curvops.products.layered import layered_hessian
from curvops.products.products import HessianProduct, HessianWays
from curvops.products.reference import GradientLinearization, tangents
from curvops.products.risk_operator import RiskOperator
from curvops.risk.data import Batch, joined_batches


class HessianLinearOperator(RiskOperator):
    """Hessian ∇² L(θ) of the empirical risk (Pearlmutter 1994 for its products).

    Example:
        >>> import torch
        >>> from curvops import HessianLinearOperator
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> data = [(torch.rand(5, 3), torch.randint(2, (5,)))]
        >>> params = dict(model.named_parameters())
        >>> hessian = HessianLinearOperator(model, torch.nn.CrossEntropyLoss(), params, data)
        >>> v = [torch.ones_like(p) for p in params.values()]
        >>> [tuple(t.shape) for t in hessian @ v]
        [(4, 3), (4,), (2, 4), (2,)]
    """

    dense_way = "forward over reverse by layer"

    def _judge(self) -> None:
        judge_hessian(self.risk)

    def _linearizer(self, account: Account) -> Build:
        ways = HessianWays(account)

        def build(batch: Batch) -> HessianProduct:
            leaves = self.risk.model.leaves()
            primals = {name: leaf.detach() for name, leaf in leaves.items()}

            def forward(v: Tensor) -> Tensor:
                directions = dict(zip(primals, tangents(v, self.domain), strict=True))
                slopes = jvp(grad(partial(self._value, batch=batch)), (primals,), (directions,))[1]
                return torch.cat([slope.flatten().to(self.dtype) for slope in slopes.values()])

            at = partial(self.risk.output_curvature, batch=batch)
            reference = GradientLinearization.of_loss(self.risk.forward(leaves, batch.X), at, leaves, self.domain)
            return HessianProduct(reference, forward, ways)

        return build

    def _value(self, params: Mapping[str, Tensor], batch: Batch) -> Tensor:
        return self.risk.output_curvature(self.risk.forward(params, batch.X), batch).value()

    def _held(self) -> Upgrade:
        def dense(sources: Sequence[Batch]) -> Tensor:
            return self._dense_of(joined_batches(sources, JOINED))[0]

        return HeldMatrix(self.domain, dense, self._budget)

    def _add_dense(self, batch: Batch, total: Tensor) -> float:
        params = {name: p.detach() for name, p in self.risk.model.params.items()}
        total += layered_hessian(partial(self._value, batch=batch), params, self.domain)
        return 0.0

    def _fast_dense(self, joined: int) -> tuple[Tensor, float]:
        dense, _ = super()._fast_dense(joined)
        probe = self.domain.random(torch.Generator().manual_seed(0), columns=1)
        return dense, relative_difference(dense @ probe, self._apply(probe))
