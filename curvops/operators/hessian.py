"""Hessian of the empirical risk, as a linear operator."""

from __future__ import annotations

from torch import Tensor

from curvops.linearize.judge import judge_hessian
from curvops.linearize.layered import layered_hessian
from curvops.linearize.reference import GradientLinearization
from curvops.operators.risk_operator import RiskOperator
from curvops.risk.data import Batch


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

    def _linearize(self, batch: Batch) -> GradientLinearization:
        leaves = self.risk.model.leaves()
        value = self.risk.output_curvature(self.risk.forward(leaves, batch.X), batch).value()
        return GradientLinearization(value, leaves, self.domain)

    def _add_dense(self, batch: Batch, total: Tensor) -> None:
        def value(params: dict[str, Tensor]) -> Tensor:
            return self.risk.output_curvature(self.risk.forward(params, batch.X), batch).value()

        params = {name: p.detach() for name, p in self.risk.model.params.items()}
        total += layered_hessian(value, params, self.domain)
