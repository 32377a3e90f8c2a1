"""The empirical risk: model, loss, parameters and data, and the only loop over the data."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd import grad
from torch.nn import Module
from torch.overrides import TorchFunctionMode

from curvops.context import Autocast, differentiable, preserved_random_state
from curvops.extras import extra
from curvops.losses import OutputCurvature, output_loss
from curvops.risk.data import Batch, Data
from curvops.risk.model import Model, ModelFunction
from curvops.space import Vector
from curvops.substitutions import substitutions

STATES = 8  # of a module, of which certificates are remembered
_CERTIFICATES: WeakKeyDictionary[Module, dict[object, dict[object, Any]]] = WeakKeyDictionary()


class EmpiricalRisk:
    """L(θ) = c · Σ_n ℓ_n(f(θ; x_n)), exactly as PyTorch would compute it in one batch of all data.

    Args:
        model_func: Module called as ``model(X)``, or a function ``(params, X)``.
        loss_func: Loss ``(output, y)``: a module, or a function together with ``reduction``.
        params: Parameters by name, any subset of the module's.
        data: Iterable of ``(X, y)`` that can be walked again.
        reduction: ``"mean"`` or ``"sum"``, for losses that do not say it themselves.
        progressbar: Show a progress bar over the batches (needs ``tqdm``).
        num_data: Number of data, if known; it is compared with what the loader yields.
        batch_size_fn: Number of data in ``X`` where it cannot be seen.

    Raises:
        TypeError, ValueError: If one of the arguments does not fit; the message says which and how.

    Example:
        >>> import torch
        >>> model, loss = torch.nn.Linear(3, 2), torch.nn.MSELoss()
        >>> X, y = torch.rand(5, 3), torch.rand(5, 2)
        >>> risk = EmpiricalRisk(model, loss, dict(model.named_parameters()), [(X[:3], y[:3]), (X[3:], y[3:])])
        >>> torch.allclose(risk.value(), loss(model(X), y))
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
    ) -> None:
        self.loss = output_loss(loss_func, reduction)
        self.model = Model(model_func, params)
        self.space = self.model.space
        self.data = Data(data, self.space.device, batch_size_fn)
        self.progressbar = progressbar
        self.num_data = num_data
        self._autocast = Autocast(self.space.device)
        self._token: object = None
        self._evaluating = False

    def certificates(self) -> dict[object, Any]:
        """What was certified of this module as it is now, for all its operators to share; call within `evaluation`.

        A function's own state is not known, so that nothing of it is remembered.
        """
        if self.model.module is None:
            return {}
        known = _CERTIFICATES.setdefault(self.model.module, {})
        token = self.token(), tuple(self.space.names)
        if token not in known and len(known) >= STATES:
            known.clear()
        return known.setdefault(token, {})

    def token(self) -> object:
        """Changes whenever the parameters, buffers, modes or the autocast state have changed, but for during evaluation."""
        if self._token is None or not self._evaluating:
            self._token = self.model.token(), self._autocast.enabled, self._autocast.dtype
        return self._token

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """The context of every computation: differentiable, in our own precision, nothing of the caller's changed."""
        ambient, before = Autocast(self.space.device), self._autocast
        with ExitStack() as stack:
            stack.enter_context(preserved_random_state(self.data.batches))
            stack.enter_context(differentiable())
            stack.enter_context(ambient.off())
            self._autocast = ambient
            stack.callback(setattr, self, "_autocast", before)
            stack.callback(setattr, self, "_evaluating", self._evaluating)
            stack.callback(setattr, self, "_token", None)
            self._evaluating, self._token = True, None
            yield

    def forward(self, params: Mapping[str, Tensor], X: Any, mode: TorchFunctionMode | None = None) -> Tensor:
        """Output of the model at some parameters, under the caller's autocast state.

        Args:
            params: The parameters by name.
            X: Input of a batch.
            mode: What sees the model's operations; by default what replaces those without right second derivatives.
        """
        with self._autocast.on(), substitutions(mode):
            return self.model(params, X)

    def output_curvature(self, z: Tensor, batch: Batch) -> OutputCurvature:
        """The loss at the outputs ``z`` of a batch, summed over its terms without the constant c."""
        return self.loss.at(z, batch.y, batch.size)

    def batches(self, title: str) -> Generator[Batch, None, None]:
        """The batches of the data, on the parameters' device, with a progress bar if asked for."""
        if not self.progressbar:
            yield from self.data
            return
        tqdm = extra("tqdm", "progressbar=True").tqdm
        yield from tqdm(self.data, desc=title, total=len(self.data) or None)

    @cached_property
    def constant(self) -> float:
        """The factor c in front of the sum over loss terms, over the whole data set."""
        if self.loss.reduction == "sum" and self.num_data is None:
            return 1.0
        count, size = 0.0, 0
        with self.evaluation(), closing(self.batches("Loss terms")) as batches:
            for batch in batches:
                z = None
                if self.loss.needs_output_to_count:
                    with torch.no_grad():
                        z = self.forward(self.model.params, batch.X)
                count += self.loss.count(batch.y, batch.size, z)
                size += batch.size
        self.check_size(size)
        return 1.0 if self.loss.reduction == "sum" else self.from_count(count)

    @staticmethod
    def from_count(count: float) -> float:
        """The constant c of a mean over ``count`` loss entries.

        Raises:
            ValueError: If there is none, so that PyTorch's mean is 0/0.
        """
        if count <= 0:
            raise ValueError(
                f"loss: the mean runs over {count:g} entries (all targets ignored, or all weights zero), so it is "
                'undefined. Use targets that count, or reduction="sum".'
            )
        return 1.0 / count

    def value(self) -> Tensor:
        """The risk, a scalar tensor."""
        return self.value_and_gradient(gradient=False)[0]

    def gradient(self) -> list[Tensor]:
        """The gradient of the risk, a list of tensors of the parameters' shapes."""
        flat = self.value_and_gradient()[1]
        assert flat is not None
        return self.space.split(flat)

    def value_and_gradient(self, gradient: bool = True) -> tuple[Tensor, Tensor | None]:
        """The risk, a scalar, and its gradient, a flat vector ``[D]`` (``None`` if not asked for)."""
        c = self.constant
        value = torch.zeros((), dtype=self.space.sum_dtype, device=self.space.device)
        total = torch.zeros(self.space.dim, dtype=value.dtype, device=value.device) if gradient else None
        with self.evaluation(), closing(self.batches("Risk")) as batches:
            for batch in batches:
                part, slope = self.batch_value_and_gradient(batch, gradient)
                value += part
                if total is not None and slope is not None:
                    total += slope
        return (c * value).to(self.space.dtype), None if total is None else (c * total).to(self.space.dtype)

    def batch_value_and_gradient(self, batch: Batch, gradient: bool = True) -> tuple[Tensor, Tensor | None]:
        """The sum of a batch's loss terms, and its gradient as a flat vector, without the constant c."""
        leaves = self.model.leaves()
        with torch.set_grad_enabled(gradient):
            value = self.output_curvature(self.forward(leaves, batch.X), batch).value()
        if not gradient or not value.requires_grad:
            return value.detach(), self.space.join([None] * len(leaves)) if gradient else None
        return value.detach(), self.space.join(grad(value, list(leaves.values()), allow_unused=True))

    def vector(self, vector: Vector, context: str) -> Tensor:
        """Flat vector ``[D]`` from one in any format."""
        columns, form = self.space.to_columns(vector, context)
        if form.columns:
            raise ValueError(f"{context}: expected one vector, got {columns.shape[1]} columns.")
        return columns.squeeze(1)

    def check_size(self, size: int) -> None:
        """Compare the number of data with what the user said.

        Raises:
            ValueError: If they differ.
        """
        if self.num_data is not None and size != self.num_data:
            raise ValueError(
                f"num_data: expected {self.num_data} data, the loader yields {size}. Leave num_data out, or correct it."
            )
