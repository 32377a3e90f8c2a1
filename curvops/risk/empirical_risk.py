"""The empirical risk: model, loss, parameters and data, and sums over the data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from contextvars import ContextVar
from copy import copy
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.nn import Module
from torch.overrides import TorchFunctionMode

from curvops.aten import forget_optimized
from curvops.context import Autocast, differentiable, preserved_random_state, requiring_gradients
from curvops.divided import Silent, expect_summed
from curvops.fully_shard import at_rest, gathering, unused
from curvops.losses import output_loss
from curvops.ranks import Ranks, RanksError
from curvops.risk.data import Batch, Data
from curvops.risk.model import Model, ModelFunction
from curvops.risk.walk import Walk
from curvops.sharding import is_sharded, least
from curvops.space import TensorSpace, Vector, describe
from curvops.substitutions import Substitutions, gradients, plain_kernels

_AUTOCAST: ContextVar[Autocast | None] = ContextVar("the caller's autocast state during an evaluation", default=None)


class ProblemOptions(TypedDict, total=False):
    """What is to be said of loss and data."""

    reduction: str | None
    progressbar: bool
    num_data: int | None
    batch_size_fn: Callable[[Any], int] | None


class RiskOptions(ProblemOptions, total=False):
    """Options of an `EmpiricalRisk`, which every operator takes as well."""

    process_group: Any


class EmpiricalRisk:
    """L(θ) = c · Σ_n ℓ_n(f(θ; x_n)), exactly as PyTorch would compute it in one batch of all data.

    It means the model, the loss and the data as they are when something is computed: nothing is kept. Several
    operators can be made of one risk, by their ``of(risk)``.

    Args:
        model_func: Module called as ``model(X)``, or a function ``(params, X)``.
        loss_func: Loss ``(output, y)``: a module, or a function together with ``reduction``.
        params: Parameters by name: the module's own tensors, any subset of them.
        data: Iterable of ``(X, y)`` that can be walked again.
        reduction: ``"mean"`` or ``"sum"``, for losses that do not say it themselves.
        progressbar: Show a progress bar over the batches (needs ``tqdm``).
        num_data: Number of data, if known; it is compared with what the loader yields.
        batch_size_fn: Number of data in ``X`` where it cannot be seen.
        process_group: Processes of `torch.distributed` that pass a share of the data each, which may be empty, and that
            all make the same calls: all of them get the sum over all shares. ``num_data`` counts the data of all. They may be
            those that have the parts of a model of ``fully_shard``.

    Raises:
        TypeError, ValueError: If one of the arguments does not fit; the message says which and how.
        RanksError: In all processes of a group, if one of them fails, or if they differ in more than their data.

    Example:
        >>> import torch
        >>> from curvops import EmpiricalRisk, GGNLinearOperator, HessianLinearOperator
        >>> model, loss = torch.nn.Linear(3, 2), torch.nn.MSELoss()
        >>> X, y = torch.rand(5, 3), torch.rand(5, 2)
        >>> risk = EmpiricalRisk(model, loss, dict(model.named_parameters()), [(X[:3], y[:3]), (X[3:], y[3:])])
        >>> torch.allclose(risk.value(), loss(model(X), y))
        True
        >>> hessian, ggn = HessianLinearOperator.of(risk), GGNLinearOperator.of(risk)
        >>> torch.allclose(hessian.to_dense(), ggn.to_dense())
        True
    """

    def __init__(
        self,
        model_func: Module | ModelFunction,
        loss_func: Callable[[Any, Any], Tensor],
        params: Mapping[str, Tensor],
        data: Iterable[tuple[Any, Any]],
        *,
        reduction: str | None = None,
        progressbar: bool = False,
        num_data: int | None = None,
        batch_size_fn: Callable[[Any], int] | None = None,
        process_group: Any = None,
    ) -> None:
        self.ranks, self.num_data = Ranks(process_group), num_data
        with self.ranks.together():
            self.loss, self.loss_func = output_loss(loss_func, reduction), loss_func
            self.model = Model(model_func, params)
            self.space = self.model.space
            self._divide()
            self.data = Data(data, self.space.device, batch_size_fn, share=not self.ranks.alone)
            self.ranks.expect_same("EmpiricalRisk", self.described if process_group is not None else {})
        self.progressbar = progressbar and self.ranks.rank == 0
        # what was proved of fast ways, for the operators of this risk: passes of the same operations only
        self.proofs: list[Any] = []

    @property
    def params(self) -> dict[str, Tensor]:
        """The caller's own tensors, by name."""
        return self.model.params

    def of_data(self, data: Iterable[tuple[Any, Any]]) -> EmpiricalRisk:
        """The risk of the same model on other data, with the proofs of this one."""
        risk = copy(self)
        risk.data, risk.num_data = Data(data, self.space.device, self.data.batch_size_fn, self.data.share), None
        risk.ranks = self.ranks.afresh()
        return risk

    def restricted(self, names: Iterable[str]) -> EmpiricalRisk:
        """The same risk as a function of some of its parameters only, with proofs of its own."""
        risk = copy(self)
        risk.model = self.model.restricted(names)
        risk.space, risk.proofs = risk.model.space, []
        risk._divide()
        return risk

    def whole(self) -> EmpiricalRisk:
        """The same risk where each process has the parameters whole, as they are now, if these processes divide the data.

        What it computes in a share is then this process's own affair, until sums are taken.
        """
        if not self.divided:
            return self
        risk = copy(self)
        with self.ranks.together(), torch.inference_mode(False):
            self.model.check_current()
            risk.model = self.model.whole(self.ranks)
        risk.space, risk.proofs, risk.divided = risk.model.space, [], False
        return risk

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """The context of every computation: differentiable, in our own precision, nothing of the caller's changed."""
        with ExitStack() as stack:
            if _AUTOCAST.get() is None:
                stack.enter_context(preserved_random_state(self.data.batches))
                stack.callback(_AUTOCAST.reset, _AUTOCAST.set(Autocast.of_caller(self.space.device)))
                stack.enter_context(Autocast(self.space.device).off())
                stack.enter_context(plain_kernels())
                forget_optimized(self.model.modules())
            stack.enter_context(differentiable())
            stack.enter_context(requiring_gradients(self.params.values()))
            stack.enter_context(unused())
            stack.enter_context(self.model.stood_in())
            if self.model.fully_sharded:
                stack.enter_context(at_rest(self.model.modules(), self.ranks if self.divided else None))
            yield

    def forward(self, X: Any, mode: TorchFunctionMode | None = None) -> Tensor:
        """Output of the model as it stands, under the caller's autocast state; call within `evaluation`.

        ``mode`` sees its operations; by default those without right second derivatives are replaced.
        """
        with self._autocast().on(), gathering(), Substitutions() if mode is None else mode:
            z = self.model(X)
        return expect_summed(z, self.model.cut) if self.model.cut else z

    def run(self, batch: Batch, mode: TorchFunctionMode | None = None) -> Tensor:
        """The same for a batch; where it is silent, no gradient comes through its output."""
        z = self.forward(batch.X, mode)
        return Silent.apply(z) if batch.silent else z  # type: ignore[no-untyped-call]

    def output(self, X: Any) -> Tensor:
        """The same without a graph; of a model that takes gradients of its own, as of its output in X, with one for a moment."""
        try:
            with torch.no_grad():
                return self.forward(X)
        except RuntimeError as error:
            if isinstance(error, RanksError) or "grad" not in str(error):
                raise
        return self.forward(X).detach()

    def functional(self, params: Mapping[str, Tensor], X: Any) -> Tensor:
        """The same with other tensors in the place of the parameters: see `Model.standing_in`."""
        with self._autocast().on():
            return self.model.functional(params, X)

    @contextmanager
    def walk(self, title: str, by_place: str = "") -> Iterator[Walk]:
        """One pass over the data, or over this process's share of it, with a progress bar of this title if asked for.

        It ends with `Walk.join`, after which its numbers are those of all shares. ``by_place`` says what belongs to the
        data's places, such as random numbers, if anything does: then a batch knows its place among the data of all shares.
        """
        with ExitStack() as stack:
            stack.enter_context(self.ranks.together())
            self.model.check_current()
            stack.enter_context(self.evaluation())
            batches = stack.enter_context(closing(self.data.walk(self.start(title) if by_place else 0)))
            yield Walk(self, batches, title, by_place)

    def sum_over_data(
        self,
        title: str,
        total: Tensor,
        add: Callable[[Batch, Walk], None],
        finish: Callable[[], None] | None = None,
        *,
        vectors: Tensor | None = None,
        by_place: str = "",
        space: TensorSpace | None = None,
    ) -> Tensor:
        """c · Σ over all data, in one pass: ``add`` adds a batch's part to ``total``, ``finish`` what it has put off.

        Processes of a group sum what they find for the same ``vectors``, and with the same things ``by_place``: see `walk`.
        The last entries of a row of ``total`` are those of a ``space``, by default of the parameters'.
        """
        with self.walk(title, by_place) as walk:
            for batch in walk:
                add(batch, walk)
            if finish is not None:
                finish()
            return walk.summed(total, vectors, space).mul_(walk.constant)

    def value(self) -> Tensor:
        """The risk, a scalar tensor."""
        return self.value_and_gradient(gradient=False)[0]

    def gradient(self) -> list[Tensor]:
        """The gradient of the risk, a list of tensors of the parameters' shapes."""
        return self.space.split(self.value_and_gradient()[1])

    def value_and_gradient(self, gradient: bool = True) -> tuple[Tensor, Tensor]:
        """The risk, a scalar, and its gradient, a flat vector ``[D]`` (zero if not asked for)."""

        def add(batch: Batch, walk: Walk) -> None:
            z = self.run(batch) if gradient else self.output(batch.X)
            value = walk.curvature(z, batch).value()
            total[0] += 0 if batch.silent else value.detach()
            if gradient and value.requires_grad:
                found = gradients(value, list(self.params.values()), retain_graph=True, allow_unused=True)
                self.space.join(found, total[1:])

        with torch.inference_mode(False):
            total = torch.zeros(1 + self.space.dim, dtype=self.space.sum_dtype, device=self.space.device)
            both = self.sum_over_data("Risk", total, add).to(self.space.dtype)
        return both[0], both[1:]

    def vector(self, vector: Vector, context: str) -> Tensor:
        """Flat vector ``[D]`` from one in any format."""
        columns, form = self.space.to_columns(vector, context)
        if form.columns:
            raise ValueError(f"{context}: expected one vector, got {columns.shape[1]} columns.")
        return columns.squeeze(1)

    def _autocast(self) -> Autocast:
        return _AUTOCAST.get() or Autocast.of_caller(self.space.device)

    def start(self, title: str) -> int:
        """The place of this process's first datum among the data of all shares; these are counted if they never were."""
        if not self.ranks.alone and self.ranks.sizes is None:
            size = sum(batch.size for batch in self.data.walk())
            self.ranks.sizes = self.ranks.meet(f"{title}: number of data", size=size)[0]
        return self.ranks.start

    @property
    def state(self) -> dict[str, Tensor]:
        """The tensors of model and loss, but for those of which processes that share the data have parts."""
        cut = {id(tensor) for tensor in self.model.cut} if self.divided else ()
        return {n: t for n, t in {**self.model.tensors, **self.loss.tensors}.items() if id(t) not in cut}

    def least(self, number: float) -> float:
        """The least of the numbers of all processes that have parts of the parameters, so that they choose alike."""
        if not self.divided:
            return least(number, self.model.shards)
        return min(self.ranks.meet("choose alike", size=int(number))[0])

    def _divide(self) -> None:
        """See whether the processes that have the parts of the parameters have other data each."""
        self.divided = self.model.fully_sharded and self.ranks.have_parts(self.model.shards)
        if not self.divided:
            self.ranks.expect_apart(self.model.shards)
        elif not self.space.shards:
            raise ValueError(
                f"params: {describe(self.space.names)} are not cut over the processes that divide the data, as other parameters of the model "
                "are. Pass one of those besides, or the whole data in each process, without process_group=."
            )
        else:
            self.model.cut = [tensor for tensor in self.model.tensors.values() if is_sharded(tensor)]

    @property
    def described(self) -> dict[str, Any]:
        """What operators of the same risk have in common, apart from the tensors' values."""
        shapes = [(name, tuple(p.shape), p.dtype) for name, p in self.params.items()]
        words = {"model": self.model.description, "loss": self.loss.description}
        return {"parameters": shapes, **words, "num_data": self.num_data}
