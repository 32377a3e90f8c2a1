"""Hessian of the empirical risk, as a linear operator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

from curvops.losses import OutputCurvature
from curvops.products import rules
from curvops.products.batch import BatchProduct, HessianProduct
from curvops.products.judge import judge_hessian
from curvops.products.layered import layered_hessian
from curvops.products.record import Recorder
from curvops.products.reference import GradientLinearization, tangents
from curvops.products.risk_operator import Cross, Fast, RiskOperator
from curvops.risk.data import Batch, joined_batch
from curvops.space import TensorSpace


class HessianLinearOperator(RiskOperator):
    """Hessian ∇² L(θ) of the empirical risk (Pearlmutter 1994 for its products).

    Args:
        model_func: Module called as ``model(X)``, or a function ``(params, X)``.
        loss_func: Loss ``(output, y)``: a module, or a function together with ``reduction``.
        params: Parameters by name: the module's own tensors, any subset of them.
        data: Iterable of ``(X, y)`` that can be walked again.
        check_deterministic: Compare two passes over the data, and the derivatives of second order with
            central differences on a few data, before anything is computed.
        memory_budget: Bytes that intermediate results may take, and graphs inside `linearized`; a quarter of the
            free memory if not given. Where it is given, a batch whose graph takes more is cut into pieces, if the model
            does not mix its data (`explain()` says so); inside `linearized` batches are whole.
        options: ``reduction`` (``"mean"`` or ``"sum"``, for losses that do not say it themselves), ``progressbar``
            (over the batches; needs ``tqdm``), ``num_data`` (compared with what the loader yields),
            ``batch_size_fn`` (number of data in ``X`` where it cannot be seen), ``process_group`` (processes of
            `torch.distributed` that pass a share of the data each, see `EmpiricalRisk`).

    Raises:
        TypeError, ValueError: If an argument does not fit; the message says which and how.
        RuntimeError: If two passes over the data differ.

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

    def _judge(self) -> tuple[str, str]:
        return judge_hessian(self.risk).account

    def _linearize(self, batch: Batch, curvature: OutputCurvature, z: Tensor, record: Recorder) -> BatchProduct:
        gradient = GradientLinearization.of_loss(z, curvature, self.risk.params, self.domain)
        self.account.note("products", "reverse over reverse", "about 3 gradients, 2 inside linearized()")
        return HessianProduct(batch, curvature, record, gradient)

    def _cross(
        self, batch: Batch, curvature: OutputCurvature, z: Tensor, rows: TensorSpace, columns: TensorSpace
    ) -> Cross:
        params, own = ({name: self.risk.params[name] for name in space.names} for space in (rows, columns))
        gradient = GradientLinearization.of_loss(z, curvature, own, columns)
        return lambda v: gradient.parts(v, params=params)

    def _fast(self, product: BatchProduct, rows: Tensor | None) -> tuple[str, Fast] | None:
        if self._columns_together([product]) < rules.TOGETHER:
            return None
        if rows is None:
            return "forward over reverse by layer", self._matrix
        if rules.together_pays(len(rows), product.record):
            return "forward over reverse by vmap", lambda products: self._columns(products, rows)
        return None

    def _matrix(self, products: Sequence[BatchProduct]) -> Tensor:
        batch = joined_batch([p.batch for p in products])
        primals = {name: p.detach() for name, p in self.risk.params.items()}
        columns = max(1, self._columns_together(products))
        return layered_hessian(lambda params: self._value(params, batch), primals, self.domain, columns)

    def _columns(self, products: Sequence[BatchProduct], rows: Tensor) -> Tensor:
        batch = joined_batch([p.batch for p in products])
        primals = {name: p.detach() for name, p in self.risk.params.items()}
        slopes = grad(lambda params: self._value(params, batch))
        found = []
        for some in rows.split(max(1, self._columns_together(products))):
            directions = dict(zip(primals, tangents(some, self.domain), strict=True))
            parts = vmap(lambda t: jvp(slopes, (primals,), (t,))[1])(directions)
            found.append(torch.cat([part.detach().unsqueeze(-1).flatten(1) for part in parts.values()], 1))
        return torch.cat(found)

    def _value(self, params: Mapping[str, Tensor], batch: Batch) -> Tensor:
        return self.risk.loss.curvature(
            self.risk.functional(params, batch.X), batch.y, batch.size, checked=False
        ).value()
