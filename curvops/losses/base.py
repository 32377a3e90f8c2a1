"""What every loss answers about its curvature in the model's output, and how outputs are cut into loss terms."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from curvops.losses.factor import Factor, stacked
from curvops.losses.noise import Noise

KINDS = ("type-2", "mc", "empirical", "forward-only")


@dataclass(frozen=True)
class TermLayout:
    """Which rows, one per loss term, datum by datum, an output-shaped tensor is.

    A term's vector runs along `axis`, or, for `None`, along everything behind the first axis.
    """

    shape: torch.Size
    axis: int | None

    @property
    def width(self) -> int:
        return math.prod(self.shape[1:]) if self.axis is None else self.shape[self.axis]

    @property
    def num_terms(self) -> int:
        return math.prod(self.shape[:1] if self.axis is None else self._others)

    def rows(self, u: Tensor) -> Tensor:
        u = u if self.axis is None else u.movedim(self.axis, -1)
        return u.reshape(self.num_terms, self.width)

    def outputs(self, rows: Tensor) -> Tensor:
        if self.axis is None:
            return rows.reshape(self.shape)
        return rows.reshape(*self._others, self.width).movedim(-1, self.axis)

    @property
    def _others(self) -> list[int]:
        """The lengths of all axes but a term's."""
        axis = (self.axis or 0) % len(self.shape)
        return [length for k, length in enumerate(self.shape) if k != axis]


def entry_layout(shape: torch.Size) -> TermLayout:
    """One term per vector along the last axis; of a one-axis output, one per entry."""
    return TermLayout(shape, -1 if len(shape) > 1 else None)


def class_layout(shape: torch.Size) -> TermLayout:
    """One term per position outside the class axis 1; a lone axis is the classes'."""
    return TermLayout(shape, 1 if len(shape) > 1 else 0)


class OutputCurvature(ABC):
    """The loss of one batch at the outputs z: summed over terms, without c.

    Everything but `value` treats z as a constant, and is computed in z's precision, at least in single precision.

    Attributes:
        dtype: Precision of the computation, and of the rows.
        psd: Whether the output Hessian is positive semi-definite by construction.
        closed_form: Whether gradient and Hessian products are formulas, not autograd.
        layout: How the output is cut into T terms (`num_terms`), vectors of C entries (`width`).

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from curvops.losses import output_loss
        >>> y = torch.tensor([2, -100, 0])
        >>> curvature = output_loss(nn.CrossEntropyLoss()).curvature(torch.zeros(3, 4), y, batch_size=3)
        >>> curvature.num_terms, curvature.width, curvature.psd
        (3, 4, True)
        >>> S = curvature.factor("type-2")
        >>> S.column(0).shape, S.product(torch.eye(4)[:3])[0]
        (torch.Size([3, 4]), tensor([ 0.1875, -0.0625, -0.0625, -0.0625]))
    """

    psd: bool
    closed_form: bool = False

    def __init__(self, z: Tensor, y: Any, batch_size: int) -> None:
        if not z.is_floating_point():
            raise ValueError(f"loss_func: expected a real floating-point output, got {z.dtype}.")
        self.z, self.y, self.batch_size = z, y, batch_size
        self.dtype = torch.promote_types(z.dtype, torch.float32)

    @property
    @abstractmethod
    def layout(self) -> TermLayout: ...

    @property
    def linear(self) -> bool:
        """Whether the output Hessian is zero, as of a loss that only averages what the model has already computed."""
        return False

    @property
    def weights(self) -> Tensor | None:
        """Weights that the loss is linear in, in rows that may broadcast; the empirical factor takes their root."""
        return None

    @property
    def num_terms(self) -> int:
        return self.layout.num_terms

    @property
    def width(self) -> int:
        return self.layout.width

    @property
    def terms_per_datum(self) -> int | None:
        """Terms of each datum, or None if the data cannot have equally many."""
        terms, size = self.num_terms, self.batch_size
        return None if size < 1 or terms % size else terms // size

    def rows(self, u: Tensor) -> Tensor:
        """An output-shaped tensor as rows `[T, C]`, datum by datum."""
        self._expect_shape("rows", u, tuple(self.z.shape))
        return self.layout.rows(u)

    def outputs(self, rows: Tensor) -> Tensor:
        """Rows `[T, C]` in the output's shape, the inverse of `rows`."""
        self._expect_shape("outputs", rows, (self.num_terms, self.width))
        return self.layout.outputs(rows)

    @abstractmethod
    def value(self) -> Tensor:
        """The sum of the loss terms, a scalar that can be differentiated twice: PyTorch's `reduction="sum"`."""

    @abstractmethod
    def gradient(self) -> Tensor:
        """The gradient of `value` in z, as new rows `[T, C]`."""

    def hessian_product(self, u: Tensor) -> Tensor:
        """The Hessian of `value` in z times an output-shaped tensor, exactly; in u's precision."""
        self._expect_shape("hessian_product", u, tuple(self.z.shape))
        return self._hessian_product(u.to(self.dtype)).to(u.dtype)

    def gradient_at(self, z: Tensor) -> Tensor:
        """The gradient in the output's shape, as a function of the z that this was made at, with its graph.

        Its derivative in z is `hessian_product`: nothing is differentiated twice. Needs a closed form, else ValueError.
        """
        if not self.closed_form:
            raise ValueError("'gradient_at': the loss has no closed form. Differentiate 'value' twice.")
        return _Gradient.apply(z, self)  # type: ignore[no-untyped-call]

    def factor(self, kind: str, mc_samples: int = 1, noise: Noise | None = None) -> Factor:
        """The output factor S.

        Args:
            kind: "type-2" for the exact factor (S_t S_tᵀ is the term's output Hessian, C columns), "mc" for gradients
                at sampled labels, scaled so that the expectation of S_t S_tᵀ is the term's output Hessian (M
                columns), "empirical" for the gradient at the true label (1 column), "forward-only" for no columns.
            mc_samples: Number of columns of "mc", M.
            noise: Randomness of "mc".

        Raises:
            ValueError: If the kind is not known, "mc" comes without noise or samples, or the output Hessian has no
                factor.
        """
        if kind == "type-2":
            return self._exact_factor()
        if kind == "empirical":
            gradient, weights = self.gradient(), self.weights
            if weights is not None:
                gradient = torch.where(weights > 0, gradient * torch.where(weights > 0, weights, 1).rsqrt(), 0)
            return stacked(gradient.unsqueeze(-1))
        if kind == "forward-only":
            return stacked(self._constant.new_zeros(self.num_terms, self.width, 0))
        if kind != "mc":
            raise ValueError(f"'factor': expected a kind of {', '.join(map(repr, KINDS))}, got {kind!r}.")
        if mc_samples < 1:
            raise ValueError(f"'factor': expected at least one Monte-Carlo sample, got {mc_samples}.")
        if noise is None:
            raise ValueError("'factor': the kind 'mc' needs noise. Pass noise=Noise(seed, start).")
        return self._sampled_factor(mc_samples, noise)

    @abstractmethod
    def _hessian_product(self, u: Tensor) -> Tensor: ...

    @abstractmethod
    def _exact_factor(self) -> Factor: ...

    @abstractmethod
    def _sampled_factor(self, mc_samples: int, noise: Noise) -> Factor: ...

    @cached_property
    def _constant(self) -> Tensor:
        """The output without its graph, in the precision of the computation."""
        return self.z.detach().to(self.dtype)

    @staticmethod
    def _expect_shape(method: str, u: Tensor, shape: tuple[int, ...]) -> None:
        if u.shape != shape:
            raise ValueError(f"'OutputCurvature.{method}': expected shape {shape}, got {tuple(u.shape)}.")


class ClosedForm(OutputCurvature):
    """A loss of PyTorch's whose gradient and Hessian are formulas in rows; its options are keywords when it is made."""

    psd = True
    closed_form = True

    def __init__(self, z: Tensor, y: Tensor, batch_size: int, **options: Any) -> None:
        self.check(**options)
        super().__init__(z, y, batch_size)

    @staticmethod
    def check(*_: Any, **__: Any) -> None:
        """Raise a ValueError where an option is not supported."""

    @property
    @abstractmethod
    def count(self) -> float:
        """This batch's share of what "mean" divides by."""

    def quick_value(self) -> Tensor:
        """`value` from what the gradient needs anyway, or anything where that is not exact."""
        return self.value()

    def _hessian_product(self, u: Tensor) -> Tensor:
        return self.layout.outputs(self.hessian_rows(self.layout.rows(u)))

    def _exact_factor(self) -> Factor:
        return Factor(self.num_terms, self.width, self.width, self.hessian_root, self.hessian_rows)

    @abstractmethod
    def hessian_rows(self, rows: Tensor) -> Tensor:
        """Multiply each term's vector by its output Hessian."""

    @abstractmethod
    def hessian_root(self, k: int) -> Tensor:
        """Column k of a root of each term's output Hessian, `[T, C]`."""


class _Gradient(torch.autograd.Function):
    """The gradient of a loss, with its Hessian product as derivative."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, curvature: OutputCurvature) -> Tensor:
        ctx.curvature = curvature
        return curvature.outputs(curvature.gradient()).to(z.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor, None]:
        return ctx.curvature.hessian_product(u), None
