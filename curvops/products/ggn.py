"""The matrices c Σ Jᵀ S Sᵀ J: GGN, Monte-Carlo Fisher and empirical Fisher, as linear operators."""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap
from torch.nn import Module
from typing_extensions import Unpack

from curvops.gram import add_gram, mirrored
from curvops.losses import Factor, Noise, OutputCurvature
from curvops.products import rules
from curvops.products.account import attempted, relative_difference, tolerance
from curvops.products.batch import BatchProduct, FactorProduct, HeldRows
from curvops.products.judge import judge_jacobian
from curvops.products.proofs import linearized_push, pushed_forward
from curvops.products.record import Recorder
from curvops.products.reference import OutputLinearization, tangents
from curvops.products.risk_operator import Cross, Fast, RiskOperator
from curvops.products.rows import pulled_rows, term_cotangents
from curvops.risk.data import Batch, joined_batch
from curvops.risk.empirical_risk import RiskOptions
from curvops.risk.model import ModelFunction
from curvops.space import TensorSpace


class OutputFactorOperator(RiskOperator):
    """c Σ_n J_nᵀ S_n S_nᵀ J_n; subclasses say what the output factor S is."""

    def _judge(self) -> tuple[str, str]:
        return judge_jacobian(self.risk).account

    @abstractmethod
    def _factor(self, curvature: OutputCurvature, start: int) -> Factor:
        """The output factor S of a batch whose first datum is the ``start``-th of the data set."""

    @abstractmethod
    def _factor_columns(self, curvature: OutputCurvature) -> int:
        """The number of columns of S, which is not made to know it."""

    def _factor_products(self, curvature: OutputCurvature) -> int:
        """How many products with the loss's Hessian it takes to make S."""
        return 0

    def _output_product(self, curvature: OutputCurvature, start: int) -> Callable[[Tensor], Tensor]:
        """The product u ↦ S Sᵀ u of a batch, both of the output's shape."""
        factor = self._factor(curvature, start)
        return lambda u: curvature.outputs(factor.product(curvature.rows(u)))

    def _linearize(self, batch: Batch, curvature: OutputCurvature, z: Tensor, record: Recorder) -> FactorProduct:
        push, why = pushed_forward(self.risk, batch, record, z)
        self.account.note("J v", "reverse over reverse" if push is None else "forward mode", why)
        jacobian = OutputLinearization(z, self.risk.params, self.domain)
        return FactorProduct(batch, curvature, record, jacobian, self._output_product(curvature, batch.start), push)

    def _cross(
        self, batch: Batch, curvature: OutputCurvature, z: Tensor, rows: TensorSpace, columns: TensorSpace
    ) -> Cross:
        left, right = (
            OutputLinearization(z, {name: self.risk.params[name] for name in space.names}, space)
            for space in (rows, columns)
        )
        product = self._output_product(curvature, batch.start)
        return lambda v: left.pull(product(right.push(v)))

    def _fast(self, product: BatchProduct, rows: Tensor | None) -> tuple[str, Fast] | None:
        columns = self.domain.dim if rows is None else len(rows)
        if self._rows_pay(product, columns, matrix=rows is None):
            name = "rows Sᵀ J by vmap over the data"
            return name, (self._matrix if rows is None else lambda products: self._by_rows(products, rows))
        if rows is None or self._columns_together([product]) < rules.TOGETHER:
            return None
        if rules.together_pays(columns, product.record, True):
            return "J v and Jᵀ u by vmap", lambda products: self._columns(products, rows)
        return None

    def _rows_pay(self, product: BatchProduct, columns: int, matrix: bool = False) -> bool:
        """Whether the rows Sᵀ J pay for so many columns, or all of the matrix; for 0, whether they are kept for any number."""
        curvature, data, work = product.curvature, product.batch.size, product.record.work
        rows = 0 if columns == 1 else self._rows_of(curvature, columns)
        if not rows or curvature.terms_per_datum is None:
            return False
        spread = rows * curvature.terms_per_datum * curvature.width  # entries of the cotangents
        held = rows * self.domain.dim
        if matrix:  # a datum's at a time, at least
            held = rows // data * (4 * self.domain.dim + product.record.entries // data)
        size = max(held, spread) * self.dtype.itemsize
        if self._granted(size) < size:
            return False
        if columns:
            pays = rules.rows_pay(columns, rows, self.domain.dim, data, work, matrix)
        else:
            pays = rules.kept_rows_pay(rows, self.domain.dim, work)
        return pays and self._known_factor(product) is not None

    def _rows_of(self, curvature: OutputCurvature, columns: int) -> int:
        """The number of rows Sᵀ J of a batch; none where S takes more products than ``columns``, if given, or does not exist."""
        try:
            if 0 < columns < self._factor_products(curvature):
                return 0
            return curvature.num_terms * self._factor_columns(curvature)
        except (ValueError, NotImplementedError):
            return 0

    def _known_factor(self, product: BatchProduct) -> Factor | None:
        """The output factor; a loss that is not convex in the output has products, but none."""
        try:
            return self._factor(product.curvature, product.batch.start)
        except (ValueError, NotImplementedError):
            return None

    def _one_by_one(self, total: Tensor, product: BatchProduct, rows: Tensor | None) -> None:
        columns = self.domain.dim if rows is None else len(rows)
        rows_of_batch = 0 if self.domain.shards or columns < 2 else self._rows_of(product.curvature, columns)
        pays = rows_of_batch and rules.pulls_pay(columns, rows_of_batch, self.domain.dim, product.record.work)
        factor = self._known_factor(product) if pays else None
        if factor is None:
            super()._one_by_one(total, product, rows)
            return
        why = f"{rows_of_batch} of a batch, for {columns} columns"
        self.account.note("one by one", "rows Sᵀ J, a backward pass for each", why)
        for some in self._pulled(product, factor):
            total += (some.T if rows is None else rows.to(some.dtype) @ some.T) @ some

    def _pulled(self, product: BatchProduct, factor: Factor) -> Iterator[Tensor]:
        """Rows Sᵀ J of a batch, whether or not it mixes its data, by the reference: some ``[n, D]`` at a time."""
        assert isinstance(product, FactorProduct)
        columns = factor.dense()
        places = [(t, k) for t in range(factor.num_terms) for k in range(factor.num_columns)]
        one = 4 * self.domain.dim * self.domain.sum_dtype.itemsize
        chunk = max(1, self._granted(len(places) * one) // one)
        for start in range(0, len(places), chunk):
            found = []
            for t, k in places[start : start + chunk]:
                cotangent = torch.zeros_like(columns[..., 0])
                cotangent[t] = columns[t, :, k]
                found.append(self.domain.join(product.jacobian.pull(product.curvature.outputs(cotangent))))
            yield torch.stack(found).to(self.domain.sum_dtype)

    def _hold(self, product: BatchProduct, times: float) -> BatchProduct:
        held, why = attempted(lambda: self._smaller_or_quicker(product, times))
        if held is None:
            self.account.note("linearized", "graphs", f"nothing smaller or quicker is supported here: {why}")
        return held or product

    def _smaller_or_quicker(self, product: BatchProduct, times: float) -> BatchProduct:
        assert isinstance(product, FactorProduct)
        if self.domain.shards:
            return product
        if self._rows_pay(product, 0):
            return self._held_rows(product)
        if product.push is not None and times >= rules.TRACED:
            program = linearized_push(self.risk, product.batch, product.push)
            product.push, product.copies = (program, 2) if program is not None else (product.push, 1)
        return product

    def _held_rows(self, product: FactorProduct) -> BatchProduct:
        """The rows, if they give the same product with a random vector."""
        noise = self.domain.random(torch.Generator().manual_seed(0), columns=1).T
        expected = torch.zeros(1, self.domain.dim, dtype=self.domain.sum_dtype, device=self.device)
        product.add_to(expected, noise)
        us, start = self._cotangents([product]), 0
        rows = torch.empty(us.shape[:2].numel(), self.domain.dim, dtype=self.dtype, device=self.device)
        for some in self._rows([product], us):  # filled in, lest all of them lie there twice
            rows[start : start + len(some)] = some
            start += len(some)
        held = HeldRows(product, rows)
        found = held.add_to(torch.zeros_like(expected), noise)
        return held if relative_difference(found, expected) <= tolerance(self.dtype) else product

    def _cotangents(self, products: Sequence[BatchProduct]) -> Tensor:
        """The columns of the output factors of some batches, ``[N, P, *output]``, P of them for each datum."""
        found = [
            term_cotangents(p.curvature.outputs, self._factor(p.curvature, p.batch.start).dense(), p.batch.size)
            for p in products
        ]
        return torch.cat(found)

    def _rows(self, products: Sequence[BatchProduct], us: Tensor, most: int = sys.maxsize) -> Iterator[Tensor]:
        """Rows Sᵀ J of some batches for their cotangents, datum by datum, of which so many bytes at most are made together."""
        batch = joined_batch([p.batch for p in products])
        primals = {name: p.detach() for name, p in self.risk.params.items()}
        entries = sum(p.record.entries for p in products) // batch.size

        def granted(wanted: int) -> int:
            return self._granted(min(wanted, most))

        return pulled_rows(self.risk.functional, primals, batch.X, us, self.domain, entries, granted)

    def _matrix(self, products: Sequence[BatchProduct]) -> Tensor:
        total = torch.zeros(self.shape, dtype=self.domain.sum_dtype, device=self.device)
        for some in self._rows(products, self._cotangents(products), rules.PART * self.dtype.itemsize):
            add_gram(total, some.to(total.dtype))
        return mirrored(total.unsqueeze(0))[0]

    def _by_rows(self, products: Sequence[BatchProduct], vectors: Tensor) -> Tensor:
        total = torch.zeros_like(vectors, dtype=self.domain.sum_dtype)
        for some in self._rows(products, self._cotangents(products)):
            total += (vectors @ some.T) @ some
        return total

    def _columns(self, products: Sequence[BatchProduct], rows: Tensor) -> Tensor:
        batch = joined_batch([p.batch for p in products])
        primals = {name: p.detach() for name, p in self.risk.params.items()}

        def output(params: dict[str, Tensor]) -> Tensor:
            return self.risk.functional(params, batch.X)

        pull = vjp(output, primals)[1]
        sizes = [len(p.curvature.z) for p in products]
        matrices = [self._output_product(p.curvature, p.batch.start) for p in products]
        found = []
        for some in rows.split(max(1, self._columns_together(products))):
            directions = dict(zip(primals, tangents(some, self.domain), strict=True))
            pushed = vmap(lambda t: jvp(output, (primals,), (t,))[1])(directions)
            images = [
                torch.cat([m(w) for m, w in zip(matrices, one.split(sizes), strict=True)]) for one in pushed.unbind()
            ]
            (parts,) = vmap(pull)(torch.stack(images))
            found.append(torch.cat([part.detach().unsqueeze(-1).flatten(1) for part in parts.values()], 1))
        return torch.cat(found)


class GGNLinearOperator(OutputFactorOperator):
    """Generalized Gauss-Newton matrix (Schraudolph 2002), or its Monte-Carlo approximation.

    For losses that are negative log-likelihoods the GGN is the Fisher matrix (Martens 2020, arXiv
    1412.1193), and with ``mc_samples`` labels sampled from the model's likelihood the operator is the
    Monte-Carlo Fisher. That is a fixed matrix: the noise belongs to the datum and the seed, not to the batch.

    Args:
        model_func, loss_func, params, data: Model, loss, parameters by name and batches, as of `HessianLinearOperator`.
        mc_samples: Number of sampled labels a loss term; 0 for the exact matrix.
        seed: Seed of the samples.
        check_deterministic, memory_budget: As there.
        options: ``reduction``, ``progressbar``, ``num_data``, ``batch_size_fn`` and ``process_group``, as there.

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
        mc_samples: int = 0,
        seed: int = 2147483647,
        check_deterministic: bool = True,
        memory_budget: int | None = None,
        **options: Unpack[RiskOptions],
    ) -> None:
        self._options(mc_samples, seed)
        own: dict[str, Any] = {"check_deterministic": check_deterministic, "memory_budget": memory_budget, **options}
        super().__init__(model_func, loss_func, params, data, **own)

    def _options(self, mc_samples: int = 0, seed: int = 2147483647) -> None:
        if not isinstance(mc_samples, int) or mc_samples < 0:
            raise ValueError(f"mc_samples: expected a number ≥ 0 (0 for the exact GGN), got {mc_samples!r}.")
        self.mc_samples, self.seed = mc_samples, seed

    def _is_psd(self) -> bool:
        return self.mc_samples > 0 or self.risk.loss.psd

    @property
    def _by_place(self) -> str:
        return f"{self.mc_samples} samples, seed {self.seed}" if self.mc_samples else ""

    def _factor_columns(self, curvature: OutputCurvature) -> int:
        return self.mc_samples or curvature.width

    def _factor_products(self, curvature: OutputCurvature) -> int:
        return 0 if curvature.closed_form else curvature.width

    def _factor(self, curvature: OutputCurvature, start: int) -> Factor:
        if self.mc_samples:
            return curvature.factor("mc", self.mc_samples, Noise(self.seed, start))
        return curvature.factor("type-2")

    def _output_product(self, curvature: OutputCurvature, start: int) -> Callable[[Tensor], Tensor]:
        # the exact product needs no factor, so it exists for losses that are not convex in the output too
        return super()._output_product(curvature, start) if self.mc_samples else curvature.hessian_product


class EFLinearOperator(OutputFactorOperator):
    """Empirical Fisher: the outer products of the loss terms' gradients at the true labels.

    It is not the Fisher matrix (Kunstner et al. 2019, arXiv 1905.12558). Weights of a loss of PyTorch's count once: a gradient
    enters times √ω. A loss term of a sequence is a token; for the gradients of whole data pass a function that averages
    over a datum's tokens and sums over the data, with ``reduction="sum"``.

    Args:
        model_func, loss_func, params, data: Model, loss, parameters by name and batches, as of `HessianLinearOperator`.
        check_deterministic, memory_budget: As there.
        options: ``reduction``, ``progressbar``, ``num_data``, ``batch_size_fn`` and ``process_group``, as there.

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

    def _factor_columns(self, curvature: OutputCurvature) -> int:
        return 1

    def _factor(self, curvature: OutputCurvature, start: int) -> Factor:
        return curvature.factor("empirical")
