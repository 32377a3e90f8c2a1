"""The matrices c Σ Jᵀ S Sᵀ J: GGN, Monte-Carlo Fisher and empirical Fisher, as linear operators."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

from torch import Tensor
from torch.func import jvp, linearize
from torch.nn import Module

from curvops.gram import add_gram, mirrored
from curvops.losses import Factor, Noise, OutputCurvature
from curvops.products import per_datum
from curvops.products.batches import LinearizedForward, Upgrade
from curvops.products.certify import Account
from curvops.products.held import HeldRows
from curvops.products.judge import judge_jacobian
from curvops.products.keep import Build
from curvops.products.per_datum import CertifiedRows, term_cotangents
from curvops.products.products import OutputProduct, OutputWays
from curvops.products.reference import OutputLinearization, tangents
from curvops.products.risk_operator import RiskOperator
from curvops.risk.data import Batch
from curvops.risk.model import ModelFunction


class OutputFactorOperator(RiskOperator):
    """c Σ_n J_nᵀ S_n S_nᵀ J_n; subclasses say what the output factor S is."""

    dense_way = "per-datum Jacobian and one matrix product"

    def _judge(self) -> None:
        judge_jacobian(self.risk)

    @abstractmethod
    def _factor(self, curvature: OutputCurvature, start: int) -> Factor:
        """The output factor S of a batch whose first datum is the ``start``-th of the data set."""

    def _output_product(self, curvature: OutputCurvature, start: int) -> Callable[[Tensor], Tensor]:
        """The product u ↦ S Sᵀ u of a batch, both of the output's shape."""
        factor = self._factor(curvature, start)
        return lambda u: curvature.outputs(factor.product(curvature.rows(u)))

    def _upgrades(self) -> list[Upgrade]:
        account = Account()
        build = self._linearizer(account, traced=True)
        return [*super()._upgrades(), LinearizedForward(build, account, self._budget, self._accept)]

    def _linearizer(self, account: Account, traced: bool = False) -> Build:
        ways = OutputWays(account, cache(dict if traced else self.risk.certificates))

        def build(batch: Batch) -> OutputProduct:
            leaves = self.risk.model.leaves()
            jacobian = OutputLinearization(self.risk.forward(leaves, batch.X), leaves, self.domain)
            curvature = self.risk.output_curvature(jacobian.z.detach(), batch)
            primals = {name: leaf.detach() for name, leaf in leaves.items()}

            def output(params: dict[str, Tensor]) -> Tensor:
                return self.risk.forward(params, batch.X)

            program = linearize(output, primals)[1] if traced else None

            def forward(v: Tensor) -> Tensor:
                directions = dict(zip(primals, tangents(v, self.domain), strict=True))
                pushed = jvp(output, (primals,), (directions,))[1] if program is None else program(directions)
                return pushed.to(jacobian.z.dtype)

            matrix = self._output_product(curvature, batch.start)
            return OutputProduct(jacobian, matrix, forward, ways, batch.start, curvature)

        return build

    def _held(self) -> Upgrade:
        return HeldRows(self.domain, self._rows, self._budget, self.account)

    def _dense_of(self, batches: Iterable[Batch]) -> tuple[Tensor, float]:
        total, difference = super()._dense_of(batches)
        return mirrored(total.unsqueeze(0))[0], difference

    def _add_dense(self, batch: Batch, total: Tensor) -> float:
        """Add to the upper half."""
        found = self._rows(batch, 3 * self.domain.dim)
        for rows in found:
            add_gram(total, rows.to(total.dtype))
        return found.difference

    def _rows(self, batch: Batch, most: float) -> CertifiedRows:
        """Rows Sᵀ J of a batch.

        Raises:
            ValueError: If they are more than ``most`` a datum, or more than the memory budget allows.
        """
        leaves = self.risk.model.leaves()
        jacobian = OutputLinearization(self.risk.forward(leaves, batch.X), leaves, self.domain)
        curvature = self.risk.output_curvature(jacobian.z.detach(), batch)
        factor = self._factor(curvature, batch.start)
        if curvature.terms_per_datum is None:
            raise ValueError("the number of loss terms is not a multiple of the number of data")
        if curvature.terms_per_datum * factor.num_columns > most:
            raise ValueError("so many loss terms and outputs that columns are cheaper")
        needed = batch.size * (curvature.terms_per_datum * factor.num_columns) ** 2 * curvature.width
        if needed * self.dtype.itemsize > self._budget():
            raise ValueError("the cotangents of all loss terms would take more than the memory budget")
        cotangents = term_cotangents(curvature.outputs, factor.dense(), batch.size)
        params = {name: leaf.detach() for name, leaf in leaves.items()}
        rows = per_datum.pulled_rows(self.risk.forward, params, batch.X, cotangents, self.domain, self._budget())
        return CertifiedRows(rows, cotangents, jacobian)


class GGNLinearOperator(OutputFactorOperator):
    """Generalized Gauss-Newton matrix (Schraudolph 2002), or its Monte-Carlo approximation.

    For losses that are negative log-likelihoods the GGN is the Fisher matrix (Martens 2020, arXiv
    1412.1193), and with ``mc_samples`` labels sampled from the model's likelihood the operator is the
    Monte-Carlo Fisher. That is a fixed matrix: the noise belongs to the datum and the seed, not to the batch.

    Args:
        mc_samples: Number of sampled labels a loss term; 0 for the exact matrix.
        seed: Seed of the samples.

    Raises:
        ValueError: If ``mc_samples`` is negative.

    Example:
        >>> import torch
        >>> from curvops import GGNLinearOperator
        >>> model = torch.nn.Linear(3, 2)
        >>> data = [(torch.rand(5, 3), torch.randint(2, (5,)))]
        >>> params = dict(model.named_parameters())
        >>> fisher = GGNLinearOperator(model, torch.nn.CrossEntropyLoss(), params, data, mc_samples=1)
        >>> fisher.to_dense().shape
        torch.Size([8, 8])
    """

    def __init__(
        self,
        model_func: Module | ModelFunction,
        loss_func: Callable[[Any, Any], Tensor],
        params: Mapping[str, Tensor],
        data: Iterable[tuple[Any, Any]],
        *,
        progressbar: bool = False,
        check_deterministic: bool = True,
        num_data: int | None = None,
        batch_size_fn: Callable[[Any], int] | None = None,
        mc_samples: int = 0,
        seed: int = 2147483647,
        reduction: str | None = None,
        memory_budget: int | None = None,
    ) -> None:
        if not isinstance(mc_samples, int) or mc_samples < 0:
            raise ValueError(f"mc_samples: expected a number ≥ 0 (0 for the exact GGN), got {mc_samples!r}.")
        self.mc_samples, self.seed = mc_samples, seed
        super().__init__(
            model_func,
            loss_func,
            params,
            data,
            progressbar=progressbar,
            check_deterministic=check_deterministic,
            num_data=num_data,
            batch_size_fn=batch_size_fn,
            reduction=reduction,
            memory_budget=memory_budget,
        )

    def _is_psd(self) -> bool:
        return self.mc_samples > 0 or self.risk.loss.psd

    def _factor(self, curvature: OutputCurvature, start: int) -> Factor:
        if self.mc_samples:
            return curvature.factor("mc", self.mc_samples, Noise(self.seed, start))
        return curvature.factor("type-2")

    def _output_product(self, curvature: OutputCurvature, start: int) -> Callable[[Tensor], Tensor]:
        # the exact product needs no factor, so it exists for losses that are not convex in the output too
        return super()._output_product(curvature, start) if self.mc_samples else curvature.hessian_product


class EFLinearOperator(OutputFactorOperator):
    """Empirical Fisher: the outer products of the loss terms' gradients at the true labels.

    It is not the Fisher matrix (Kunstner et al. 2019, arXiv 1905.12558).

    Example:
        >>> import torch
        >>> from curvops import EFLinearOperator
        >>> model = torch.nn.Linear(3, 2)
        >>> data = [(torch.rand(5, 3), torch.randint(2, (5,)))]
        >>> ef = EFLinearOperator(model, torch.nn.CrossEntropyLoss(), dict(model.named_parameters()), data)
        >>> ef.psd
        True
    """

    def _is_psd(self) -> bool:
        return True

    def _factor(self, curvature: OutputCurvature, start: int) -> Factor:
        return curvature.factor("empirical")
