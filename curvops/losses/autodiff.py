"""Curvature of any twice differentiable loss in the model's output, by autodiff."""

import math
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module
from torch.overrides import TorchFunctionMode

from curvops.context import UNFIT, attributes_kept, quietly
from curvops.losses.base import OutputCurvature, TermLayout, class_layout, entry_layout
from curvops.losses.factor import Factor, stacked
from curvops.losses.noise import Noise
from curvops.losses.scalar import ScalarLoss
from curvops.memory import LITTLE, byte_size, free_memory
from curvops.tree import tensors_of

FEW = 16  # terms, of which all pairs are told apart
MOVES = ("far", "near", "far positive", "near positive", "far", "near", "uniform", "uniform")  # to other outputs
# how PyTorch says that there is no second derivative
_ONCE_DIFFERENTIABLE = ("not implemented", "once_differentiable", "double backward")


class AutodiffCurvature(OutputCurvature):
    """The sum of a loss over data, differentiated twice where asked.

    A term is a vector along the last axis of the output (for `nn.NLLLoss` along axis 1; of a one-axis output an
    entry), if the loss is a sum over these, otherwise a whole datum.
    """

    def __init__(self, z: Tensor, y: Any, batch_size: int, loss: ScalarLoss) -> None:
        super().__init__(z, y, batch_size)
        loss.output_weights(z.detach(), y)  # refuses weights with a batch axis
        self.psd = loss.convex
        self._loss = loss
        #: told, as the terms are found, whether they are whole data because the loss couples what these consist of
        self.noted: Callable[[bool], None] | None = None

    @cached_property
    def layout(self) -> TermLayout:
        """The terms, found by probing the loss: not at one output only, as other batches must be cut in the same way."""
        fine = (class_layout if self._loss.form is F.nll_loss else entry_layout)(self.z.shape)
        whole = TermLayout(self.z.shape, None) if self.z.shape[:1] == (self.batch_size,) else None
        several = fine.num_terms > self.batch_size  # positions of a datum; whether data are mixed is seen elsewhere
        coupled = self._couples(fine) or (several and self._depends(fine))
        if coupled and (whole is None or self._couples(whole)):
            raise ValueError(
                f"{self._loss.name!r}: it couples the data of a batch, or rows of an output that are not one datum each (output of shape "
                f"{tuple(self.z.shape)}, {self.batch_size} data), so it has no factor per loss term. Products with the "
                "Hessian and the GGN still work."
            )
        if self.noted is not None and several:
            self.noted(coupled)
        return whole if coupled and whole is not None else fine

    def _couples(self, layout: TermLayout) -> bool:
        """Whether the output Hessian has entries between different terms."""
        # a random vector on half of the terms must give zero on the rest
        vector = _noise(layout, self._constant)
        for half in _halves(layout, self.z.device) if self._twice_differentiable else ():
            result = layout.rows(self._hessian_product(layout.outputs(vector * half))).abs()
            tolerance = 100 * torch.finfo(self.dtype).eps * result.max()
            if bool((result * ~half > tolerance).any()):
                return True
        return False

    def _depends(self, layout: TermLayout) -> bool:
        """Whether the gradient of half of the terms changes as others are moved, near and far; known losses are not asked."""
        if self._loss.known or not self.z.numel():
            return False
        z = layout.rows(self._constant).double()  # where little underflows
        calls = _Calls()
        if (own := self._slope(z, layout, calls)) is None:
            return False
        moves = self._moves(layout, z)
        # a loss that iterates may not end at other outputs
        limit = _Calls(10 * calls.number + 100)
        for k, half in enumerate(_halves(layout, self.z.device)):
            kept = half.squeeze(1)
            # of many terms a half has something of each datum, and two ways for each half are enough
            for moved in moves if layout.num_terms <= FEW else moves[2 * k : 2 * k + 2]:
                found = self._slope(torch.where(half, z, moved), layout, limit)
                if found is None:
                    continue  # the loss refuses such outputs
                change, largest = (found - own)[kept].abs(), torch.maximum(found.abs(), own.abs())[kept].max()
                if bool((change > torch.finfo(z.dtype).eps ** 0.5 * largest).any()):  # what is no number says nothing
                    return True
        return False

    def _moves(self, layout: TermLayout, z: Tensor) -> list[Tensor]:
        """Other outputs: far and near, of both signs and positive, and as probabilities are."""
        low, high = (float(t) for t in z.aminmax())
        # what refuses other numbers on a GPU ends the whole process there
        bounded = low >= 0 and high <= 1 and z.device.type == "cuda"
        targets = [float(t.abs().max()) for t in tensors_of(self.y) if t.is_floating_point() and t.numel()]
        size, found = max(1.0, -low, high, *targets), []
        for k, kind in enumerate(MOVES):
            if kind == "uniform" or bounded:
                found.append(Noise(k, 0).uniform(layout.num_terms, 1, 1, layout.width, device=z.device)[:, 0])
                continue
            moved = _noise(layout, z, k) * size
            moved = 30 * moved if "far" in kind else moved
            found.append(moved.abs() if "positive" in kind else moved)
        return found

    def _slope(self, rows: Tensor, layout: TermLayout, calls: "_Calls") -> Tensor | None:
        """The loss's gradient at another output, as rows, if it can be computed; its attributes are put back."""
        owner = getattr(self._loss.function, "__self__", self._loss.function)
        owners = owner.modules() if isinstance(owner, Module) else [owner]
        calls.number = 0
        with torch.enable_grad(), attributes_kept(owners), quietly():
            z = layout.outputs(rows).detach().requires_grad_()
            try:
                with calls:
                    value = self._loss.total(z, self.y, self.batch_size)
                return layout.rows(torch.autograd.grad(value, z, materialize_grads=True)[0])
            except torch.OutOfMemoryError:
                raise
            except UNFIT:
                return None

    def value(self) -> Tensor:
        return self._loss.total(self.z.to(self.dtype), self.y, self.batch_size)

    def gradient(self) -> Tensor:
        return self.layout.rows(self._graph[1].detach())

    @cached_property
    def linear(self) -> bool:
        """Whether the output Hessian times a random vector is exactly zero, here and at an output near the targets."""
        if not (self.z.numel() and self._twice_differentiable):
            return False
        u = Noise(0, 0).normal(self.z.numel(), 1, 1, device=self.z.device).reshape(self.z.shape).to(self.dtype)
        near = self.y.to(u) if isinstance(self.y, Tensor) and self.y.shape == u.shape else torch.zeros_like(u)
        other = AutodiffCurvature(near + 0.1 * u, self.y, self.batch_size, self._loss)
        return not any(bool(curvature._hessian_product(u).any()) for curvature in (self, other))

    @property
    def weights(self) -> Tensor | None:
        weights = self._loss.output_weights(self._constant, self.y)
        return None if weights is None else self.layout.rows(weights.expand(self.z.shape))

    def _hessian_product(self, u: Tensor) -> Tensor:
        if not self._twice_differentiable:
            raise self._no_second_derivative
        return self._second_backward(self._graph[0], u)

    def _exact_factor(self) -> Factor:
        return stacked(self._root.to(self.dtype))

    def _sampled_factor(self, mc_samples: int, noise: Noise) -> Factor:
        signs = noise.signs(self.num_terms, self.terms_per_datum, mc_samples, self.width, device=self.z.device)
        return stacked((self._root @ signs.mT / mc_samples**0.5).to(self.dtype))

    @cached_property
    def _graph(self) -> tuple[Tensor, Tensor, Tensor]:
        """The output as a leaf, the loss's gradient in it with its graph, and the cotangent of the loss, 1."""
        with torch.enable_grad():
            z = self._constant.clone().requires_grad_()
            value = self._loss.total(z, self.y, self.batch_size)
            if not value.requires_grad:
                raise ValueError(f"{self._loss.name!r}: the loss does not depend differentiably on the output.")
            one = torch.ones_like(value).requires_grad_()
            (gradient,) = torch.autograd.grad(value, z, one, create_graph=True, materialize_grads=True)
        return z, gradient, one

    def _second_backward(self, source: Tensor, u: Tensor) -> Tensor:
        """Differentiate the gradient along u in the output or the cotangent."""
        try:
            (product,) = torch.autograd.grad(
                self._graph[1], source, u, retain_graph=True, create_graph=u.requires_grad, materialize_grads=True
            )
        except RuntimeError as error:
            if not any(reason in str(error) for reason in _ONCE_DIFFERENTIABLE):
                raise
            raise self._no_second_derivative from error
        return product

    @cached_property
    def _twice_differentiable(self) -> bool:
        """Whether the gradient's graph is whole."""
        # a backward hidden from autograd would pass as linear; but every gradient is linear in the cotangent
        _, gradient, one = self._graph
        gradient = gradient.detach()
        try:
            echo, expected = self._second_backward(one, gradient), gradient.square().sum()
        except NotImplementedError:
            return False
        return not bool((echo - expected).abs() > torch.finfo(self.dtype).eps ** 0.5 * expected)

    @property
    def _no_second_derivative(self) -> NotImplementedError:
        return NotImplementedError(
            f"{self._loss.name!r} cannot be differentiated twice in PyTorch. Write it in plain operations."
        )

    @cached_property
    def _root(self) -> Tensor:
        """The symmetric root of each term's output Hessian, `[T, C, C]` in float64: unique, however the data is cut."""
        needed = self.num_terms * self.width**2 * 8
        if needed > LITTLE and needed > free_memory(self.z.device):
            raise MemoryError(
                f"{self._loss.name!r}: 'type-2' and 'mc' take the output Hessian of each of {self.num_terms} terms with {self.width} "
                f"entries, {byte_size(needed)}. Pass one of PyTorch's losses, such as nn.CrossEntropyLoss(), or smaller batches, or use "
                "'empirical'. Products with the Hessian and the GGN do not need it."
            )
        hessian = self._constant.new_empty(self.num_terms, self.width, self.width, dtype=torch.float64)
        for k, unit in enumerate(torch.eye(self.width, dtype=self.dtype, device=self.z.device)):
            units = self.layout.outputs(unit.repeat(self.num_terms, 1))
            hessian[..., k] = self.layout.rows(self._hessian_product(units))
        values, vectors = torch.linalg.eigh((hessian + hessian.mT) / 2)
        scale = max(values.abs().max(), self._graph[1].detach().abs().max().double()) if values.numel() else 0
        if bool((values < -10 * self.width * torch.finfo(self.dtype).eps * scale).any()):
            raise ValueError(
                f"{self._loss.name!r} is not convex in the output (its output Hessian has the eigenvalue "
                f"{values.min().item():.3g}), so it has no factor: 'type-2' and 'mc' do not exist. Products with the "
                "Hessian and the GGN still work; for a Fisher or a Kronecker approximation use 'empirical'."
            )
        return (vectors * values.clamp(min=0).sqrt().unsqueeze(-2)) @ vectors.mT


class _Calls(TorchFunctionMode):
    """Counts the calls of PyTorch's functions; more than ``most`` are a RuntimeError."""

    def __init__(self, most: float = math.inf) -> None:
        super().__init__()
        self.most, self.number = most, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        if self.number > self.most:
            raise RuntimeError(f"more than {self.most:g} calls")
        return func(*args, **(kwargs or {}))


def _noise(layout: TermLayout, like: Tensor, seed: int = 0) -> Tensor:
    """Random rows ``[T, C]``."""
    return Noise(seed, 0).normal(layout.num_terms, 1, 1, layout.width, device=like.device)[:, 0].to(like)


def _halves(layout: TermLayout, device: torch.device) -> Iterator[Tensor]:
    """Masks ``[T, 1]`` of about half of the terms; of few terms they tell all pairs apart."""
    count = layout.num_terms
    index, signs = torch.arange(count, device=device), Noise(0, 0).signs(count, 1, 4, device=device) > 0
    for probe in range(min(4, math.ceil(math.log2(max(count, 1))))):
        yield ((index >> probe & 1).bool() if count <= FEW else signs[:, probe]).unsqueeze(1)
