"""Products of one batch by reverse over reverse: the reference that every fast way is measured by."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from curvops.losses import OutputCurvature
from curvops.products.account import tolerance
from curvops.space import TensorSpace, aligned, describe
from curvops.substitutions import gradients
from curvops.tree import nodes_of

ERROR = "torch::autograd::Error"  # what `once_differentiable` leaves in the graph
_FIRST = "take KFACLinearOperator(…, fisher_type='empirical'), which needs first derivatives only"
_NO_GRAPH = (
    "the backward pass of {}, a torch.autograd.Function of the model, is not differentiated (once_differentiable, a detached tensor, "
    f"NumPy). Write it in operations that are, or {_FIRST}."
)

MOST_ROWS = 4096  # outputs of a batch up to which J v is taken row by row, where nothing else gives it
MOST_BYTES = 2**22  # of such a matrix, up to which it is kept for other columns: beside the memory budget, so little
PIECE = 65_521  # a prime number, so that no two rows of a weight look alike
# how PyTorch, and libraries with operations of their own, say that there is no second derivative
MISSING = re.compile(
    r"derivative for .*not implemented|double[ -]?backwards?\b.* not (yet )?(supported|implemented)"
    r"|not (yet )?(support|implement)(ed)? (for )?double[ -]?backwards?",
    re.IGNORECASE | re.DOTALL,
)


class OutputLinearization:
    """The Jacobian of a model's output at one batch, as products.

    Args:
        z: The output, carrying the graph of the forward pass.
        params: The parameters at the graph's end, by name.
        space: Their space.
    """

    def __init__(self, z: Tensor, params: Mapping[str, Tensor], space: TensorSpace) -> None:
        self.z, self.space = z, space
        self._params = list(params.values())
        self._dummy: Tensor | None = None
        self._pulled: list[Tensor | None] = []
        self._own: list[str] = []  # the model's own functions, whose backward passes may carry no graph
        self._precision, self._length = z.dtype, 0.0  # of a pass that has such: the coarsest, and of what is pulled
        self._by_rows = ""  # why
        self._matrix: Tensor | None = None  # J, if it is small and was taken by rows

    def pull(self, u: Tensor, last: bool = False) -> list[Tensor | None]:
        """Jᵀ u by parameter, for u of the output's shape; ``None`` for zeros. The ``last`` one frees the graphs."""
        if last:
            self._dummy, self._pulled = None, []
        return self.space.parts(_pull([self.z], self._params, [u.to(self.z.dtype)], last))

    def push(self, v: Tensor) -> Tensor:
        """J v, of the output's shape, for a flat vector ``[D]``: the derivative of u ↦ ⟨Jᵀu, v⟩.

        Where a backward pass of the model's own has none, row by row of J.

        Raises:
            NotImplementedError: If these are too many.
        """
        if not self.z.requires_grad:
            return torch.zeros_like(self.z)
        if self._by_rows:
            return self._pushed_by_rows(v)
        if self._dummy is None:
            # any u gives the same derivative, but at zero some backward passes have none, as that of `logcumsumexp`, which takes logs
            dummy = scattered(self.z).requires_grad_()
            self._pulled = list(gradients(self.z, self._params, dummy, create_graph=True, allow_unused=True))
            self._dummy, self._own = dummy, own_functions([self.z])
            if self._own:
                parts = [part.detach() for part in self._pulled if part is not None]
                self._precision = coarsest(self.z)
                self._length = math.hypot(*(float(torch.linalg.vector_norm(part)) for part in parts))
        try:
            expect_graph(self._own, self._pulled)
            (product,) = _pull(self._pulled, [self._dummy], tangents(v, self.space))
        except NotImplementedError as error:
            return self._pushed_by_rows(v, str(error))
        found = torch.zeros_like(self.z) if product is None else product.detach()
        if self._own and not self.space.shards and not self._fits(found, v):
            return self._pushed_by_rows(v, _NO_GRAPH.format(describe(self._own)))
        return found

    def _fits(self, image: Tensor, v: Tensor) -> bool:
        """Whether ⟨u, J v⟩ = ⟨Jᵀ u, v⟩, which it is not where a backward pass computes with what is not differentiated."""
        assert self._dummy is not None
        u, own = self._dummy.detach().flatten().to(v.dtype), image.flatten().to(v.dtype)
        along, inner = float(inner_product(self._pulled, v, self.space.sizes)), float(torch.dot(u, own))
        # what rounds: entries of u are about one, and what is multiplied with v may cancel
        typical = self._length * float(v.norm()) / math.sqrt(len(v))
        scale = max(abs(along), abs(inner), float(own.norm()), typical)
        # of what is not finite nothing is said
        return not abs(along - inner) > tolerance(self._precision) * scale + torch.finfo(image.dtype).tiny

    def _pushed_by_rows(self, v: Tensor, why: str = "") -> Tensor:
        if why and (self.space.shards or self.z.numel() > MOST_ROWS):
            raise NotImplementedError(why)
        if why and not self._by_rows:
            self._by_rows, self._dummy, self._pulled = why, None, []
            what = f"J v takes a backward pass for each of the {self.z.numel()} outputs of a batch"
            warnings.warn(f"{what}: {why}", RuntimeWarning, stacklevel=2)
        if self._matrix is not None:
            return (self._matrix @ v.to(self._matrix.dtype)).view(self.z.shape).to(self.z.dtype)
        found, u = torch.zeros_like(self.z), torch.zeros_like(self.z)
        entries, units, rows = found.view(-1), u.view(-1), list[Tensor]()
        small = len(units) * len(v) * v.itemsize <= MOST_BYTES
        for k in range(u.numel()):
            units[k] = 1
            parts = self.pull(u)
            entries[k] = inner_product(parts, v, self.space.sizes)
            rows += [self.space.join(parts)] if small else []
            units[k] = 0
        self._matrix = torch.stack(rows) if small else None  # for other columns
        return found


class GradientLinearization:
    """The Hessian of a scalar at one batch.

    Args:
        output: The scalar, or the tensor that it is a function of, carrying the graph of the forward pass.
        params: The parameters at the graph's end, by name.
        space: Their space.
        slope: The scalar's gradient in the output, as a function of the output.
    """

    def __init__(
        self, output: Tensor, params: Mapping[str, Tensor], space: TensorSpace, slope: Tensor | None = None
    ) -> None:
        self._params = list(params.values())
        self.space = space
        self._slopes: list[Tensor | None] = [None] * len(self._params)
        if output.requires_grad:
            self._slopes = list(gradients(output, self._params, slope, create_graph=True, allow_unused=True))
            expect_graph(own_functions([output]), self._slopes)

    @classmethod
    def of_loss(
        cls, z: Tensor, curvature: OutputCurvature, params: Mapping[str, Tensor], space: TensorSpace
    ) -> GradientLinearization:
        """The Hessian of a loss at a model's output ``z``, by the loss's closed forms where it has them."""
        if not curvature.closed_form:
            return cls(curvature.value(), params, space)
        return cls(z, params, space, curvature.gradient_at(z))

    def parts(self, v: Tensor, last: bool = False, params: Mapping[str, Tensor] | None = None) -> list[Tensor | None]:
        """The product with a flat vector ``[D]`` by parameter, ``None`` for zeros; the ``last`` one frees the graph.

        With ``params``, the rows of these: the gradient's derivative along v in other tensors at the graph's end.
        """
        inputs = self._params if params is None else list(params.values())
        found = _pull(self._slopes, inputs, tangents(v, self.space), last)
        return self.space.parts(found) if params is None else found


def own_functions(outputs: Iterable[Tensor | None]) -> list[str]:
    """Names of the `torch.autograd.Function`s in Python that some tensors' graphs hold."""
    found = (type(node) for output in outputs if output is not None for node in nodes_of(output))
    python = [kind for kind in found if issubclass(kind, BackwardCFunction)]
    foreign = [kind for kind in python if not kind._forward_cls.__module__.startswith("curvops.")]  # type: ignore[attr-defined]
    return sorted({kind.__name__.removesuffix("Backward") for kind in foreign})


def coarsest(output: Tensor) -> torch.dtype:
    """The coarsest floating-point precision in a tensor's graph, as of what autocast runs."""
    kinds = {output.dtype} | {one.dtype for node in nodes_of(output) for one in getattr(node, "_input_metadata", ())}
    return max((kind for kind in kinds if kind.is_floating_point), key=lambda kind: torch.finfo(kind).eps)


def expect_graph(own: list[str], pulled: list[Tensor | None]) -> None:
    """A NotImplementedError where a function's backward pass says that it may be differentiated ``once`` only.

    PyTorch puts an error into the graph there; but what leads to no input that is asked for is not visited.
    """
    if own and any(node.name() == ERROR for out in pulled if out is not None for node in nodes_of(out)):
        raise NotImplementedError(_NO_GRAPH.format(describe(own)))


def inner_product(parts: list[Tensor | None], v: Tensor, sizes: list[int]) -> Tensor:
    """⟨parts, v⟩ of a vector by parameter, ``None`` for zeros, and a flat one."""
    total = v.new_zeros(())
    for part, piece in zip(parts, v.split(sizes), strict=True):
        if part is not None:
            total += torch.dot(part.detach().flatten().to(v.dtype), piece)
    return total


def scattered(like: Tensor) -> Tensor:
    """A tensor of random numbers, always the same: a piece over and over, as to draw each entry of a large one takes long."""
    size = like.numel()
    made = torch.randn(min(size, PIECE), generator=torch.Generator().manual_seed(0), device="cpu")
    piece = made.to(like.device, like.dtype)
    return piece.repeat(-(-size // PIECE))[:size].view(like.shape)


def tangents(v: Tensor, space: TensorSpace) -> list[Tensor]:
    """Parts by parameter of a flat vector ``[D]``, or of several ``[K, D]``, in the parameters' dtypes."""
    named = zip(v.split(space.sizes, -1), space.shapes.values(), space.dtypes.values(), strict=True)
    return space.wholes([aligned(part.reshape((*v.shape[:-1], *shape)).to(dtype)) for part, shape, dtype in named])


def drained(found: list[Tensor | None]) -> Iterator[Tensor | None]:
    """The entries of a list, each of which is let go before the next one is asked for."""
    while found:
        yield found.pop(0)


def _pull(
    outputs: list[Tensor | None], inputs: list[Tensor], cotangents: list[Tensor], last: bool = False
) -> list[Tensor | None]:
    """Products of those outputs that depend on something; a missing dependence is a zero, not an error."""
    used = [
        (out, u.to(out.dtype))
        for out, u in zip(outputs, cotangents, strict=True)
        if out is not None and out.requires_grad
    ]
    if not used:
        return [None] * len(inputs)
    outs, us = zip(*used, strict=True)
    try:
        return list(gradients(outs, inputs, us, retain_graph=not last, allow_unused=True))
    except RuntimeError as error:
        if not MISSING.search(str(error)):
            raise
        raise NotImplementedError(
            f"PyTorch has no second derivative of an operation of the model or the loss ({error}). Write it in plain operations, or "
            f"{_FIRST}."
        ) from error
