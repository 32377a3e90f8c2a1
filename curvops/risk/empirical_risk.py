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

from curvops.context import Autocast, differentiable, preserved_random_state, requiring_gradients
from curvops.fully_shard import at_rest, gathering, unused
from curvops.losses import output_loss
from curvops.ranks import Ranks
from curvops.risk.data import Batch, Data
from curvops.risk.model import Model, ModelFunction
from curvops.risk.walk import Walk
from curvops.space import Vector
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
            all make the same calls: all of them get the sum over all shares. ``num_data`` counts the data of all.

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
            self.ranks.expect_apart(self.space.shards)
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
        return risk

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """The context of every computation: differentiable, in our own precision, nothing of the caller's changed."""
        with ExitStack() as stack:
            if _AUTOCAST.get() is None:
                stack.enter_context(preserved_random_state(self.data.batches))
                stack.callback(_AUTOCAST.reset, _AUTOCAST.set(Autocast(self.space.device)))
                stack.enter_context(Autocast(self.space.device).off())
                stack.enter_context(plain_kernels())
            stack.enter_context(differentiable())
            stack.enter_context(requiring_gradients(self.params.values()))
            stack.enter_context(unused())
            if self.model.fully_sharded:
                stack.enter_context(at_rest(self.model.modules()))
            yield

    def forward(self, X: Any, mode: TorchFunctionMode | None = None) -> Tensor:
        """Output of the model as it stands, under the caller's autocast state; call within `evaluation`.

        ``mode`` sees its operations; by default those without right second derivatives are replaced.
        """
        with self._autocast().on(), gathering(), Substitutions() if mode is None else mode:
            return self.model(X)

    def output(self, X: Any) -> Tensor:
        """The same without a graph; of a model that takes gradients of its own, as of its output in X, with one for a moment."""
        try:
            with torch.no_grad():
                return self.forward(X)
        except RuntimeError as error:
            if "grad" not in str(error):
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
        self.model.check_current()
        with ExitStack() as stack:
            stack.enter_context(self.ranks.together())
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
    ) -> Tensor:
        """c · Σ over all data, in one pass: ``add`` adds a batch's part to ``total``, ``finish`` what it has put off.

        Processes of a group sum what they find for the same ``vectors``, and with the same things ``by_place``: see `walk`.
        """
        with self.walk(title, by_place) as walk:
            for batch in walk:
                add(batch, walk)
            if finish is not None:
                finish()
            return walk.summed(total, vectors).mul_(walk.constant)

    def value(self) -> Tensor:
        """The risk, a scalar tensor."""
        return self.value_and_gradient(gradient=False)[0]

    def gradient(self) -> list[Tensor]:
        """The gradient of the risk, a list of tensors of the parameters' shapes."""
        return self.space.split(self.value_and_gradient()[1])

    def value_and_gradient(self, gradient: bool = True) -> tuple[Tensor, Tensor]:
        """The risk, a scalar, and its gradient, a flat vector ``[D]`` (zero if not asked for)."""

        def add(batch: Batch, walk: Walk) -> None:
            z = self.forward(batch.X) if gradient else self.output(batch.X)
            value = walk.curvature(z, batch).value()
            total[0] += value.detach()
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
        return _AUTOCAST.get() or Autocast(self.space.device)

    def start(self, title: str) -> int:
        """The place of this process's first datum among the data of all shares; these are counted if they never were."""
        if not self.ranks.alone and self.ranks.sizes is None:
            size = sum(batch.size for batch in self.data.walk())
            self.ranks.sizes = self.ranks.meet(f"{title}: number of data", size=size)[0]
        return self.ranks.start

    @property
    def state(self) -> dict[str, Tensor]:
        """The tensors of model and loss."""
        return {**self.model.tensors, **self.loss.tensors}

    @property
    def described(self) -> dict[str, Any]:
        """What operators of the same risk have in common, apart from the tensors' values."""
        shapes = [(name, tuple(p.shape), p.dtype) for name, p in self.params.items()]
        words = {"model": self.model.description, "loss": self.loss.description}
        return {"parameters": shapes, **words, "num_data": self.num_data}
