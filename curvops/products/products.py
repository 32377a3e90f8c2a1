"""Products with one batch's matrix: one vector or several, each piece of work in the way that was found fastest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.func import vmap

from curvops.losses import OutputCurvature
from curvops.products.certify import Account, reason
from curvops.products.choose import Choice, Known, Way
from curvops.products.reference import GradientLinearization, OutputLinearization, drained
from curvops.space import TensorSpace

CHUNK = 16  # vectors that go together
WORTH = 4  # vectors from which their going together is measured
ROUNDING = 64  # machine precisions within which ⟨u, w⟩ and ⟨Jᵀu, v⟩ agree if w = J v


class BatchProduct(ABC):
    """A batch's symmetric matrix, known by its products.

    Attributes:
        curvature: What it holds of the loss beside its graph.
        together: Vectors that may go together.
        once: Whether the next product with one vector is the last one, so that memory may go while it runs.
    """

    curvature: OutputCurvature | None = None
    together = CHUNK
    once = False

    @property
    def held_bytes(self) -> int:
        """Bytes that are held beside the graph: what was computed of the loss, and a factor of the output's size."""
        if self.curvature is None:
            return 0
        return self.curvature.held_bytes + self.curvature.z.numel() * self.curvature.dtype.itemsize

    @abstractmethod
    def product(self, v: Tensor) -> Tensor:
        """The product with a flat vector ``[D]``."""

    def add_to(self, total: Tensor | None, v: Tensor) -> Tensor:
        """The product with a flat vector, added to ``total`` ``[D]`` if that is given; in at least single precision."""
        product = self.product(v)
        return product.to(_single(v)) if total is None else total.add_(product)

    def products(self, columns: Tensor) -> Tensor:
        """The products with columns ``[D, K]``."""
        if min(columns.shape[1], self.together) < WORTH:
            return torch.stack([self.product(column) for column in columns.unbind(1)]).T
        parts = [self._together(part.T.contiguous()) for part in columns.split(self.together, 1)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).T

    @abstractmethod
    def _together(self, rows: Tensor) -> Tensor:
        """The products with a few vectors, ``[K, D]`` to ``[K, D]``."""


class MatrixProduct(BatchProduct):
    """A matrix that is held: ``[D, D]``, or as its rows R ``[R, D]`` with RᵀR."""

    def __init__(self, matrix: Tensor, rows: bool) -> None:
        self._matrix, self._rows = matrix, rows

    @property
    def held_bytes(self) -> int:
        return self._matrix.numel() * self._matrix.itemsize

    def product(self, v: Tensor) -> Tensor:
        return self._matrix.T @ (self._matrix @ v) if self._rows else self._matrix @ v

    def products(self, columns: Tensor) -> Tensor:
        return self.product(columns)  # the same expression serves columns

    def _together(self, rows: Tensor) -> Tensor:
        return self.product(rows.T).T


class HessianWays:
    """What is chosen for an operator's Hessian products."""

    def __init__(self, account: Account) -> None:
        self.columns = Choice("columns", account)


class HessianProduct(BatchProduct):
    """The Hessian of one batch.

    Args:
        reference: Its products by reverse over reverse.
        forward: The product by forward over reverse, from and to flat vectors.
        ways: What is chosen, the same for all batches.
    """

    def __init__(self, reference: GradientLinearization, forward: Way, ways: HessianWays) -> None:
        self._reference, self._forward, self._ways = reference, forward, ways
        self.curvature = reference.curvature

    def product(self, v: Tensor) -> Tensor:
        return self._reference.product(v)

    def add_to(self, total: Tensor | None, v: Tensor) -> Tensor:
        return _joined(self._reference.parts(v, self.once), total, v, self._reference.space)

    def _together(self, rows: Tensor) -> Tensor:
        ways = {
            "one by one": _loop(self.product),
            "reverse over reverse by vmap": self._reference.products,
            "forward over reverse by vmap": vmap(self._forward),
        }
        return self._ways.columns(rows, ways, WORTH)


class OutputWays:
    """What is chosen for the products Jᵀ (output matrix) J of an operator.

    Attributes:
        push: J v.
        pushes: J v of several.
        outputs: Products with the output matrix, of several.
        pulls: Jᵀ u of several.
        forward_fails: Whether forward mode was refused or refuted.

    Args:
        account: Where choices are recorded.
        known: Gives what was certified of the model before; what is found here is added.
    """

    def __init__(self, account: Account, known: Known) -> None:
        self.account, self.known = account, known
        self.push = Choice("J v", account, known)
        self.pushes = Choice("columns, J v", account, known)
        self.outputs = Choice("columns, output matrix", account)
        self.pulls = Choice("columns, Jᵀu", account, known)
        self.forward_fails = False
        self._seen: set[int] = set()

    def adjoint(self, check: Callable[[], bool]) -> bool:
        """Whether random numbers have told forward mode and reverse mode to be adjoint, once for the model."""
        known = self.known()
        if not known.get("forward mode"):
            known["forward mode"] = check()
        return bool(known["forward mode"])

    def first(self, place: int) -> bool:
        """Whether this is the first product of the batch at ``place``."""
        new = place not in self._seen
        self._seen.add(place)
        return new


class OutputProduct(BatchProduct):
    """Jᵀ (output matrix) J of one batch.

    The first product, and the only one of what is not kept, takes J v by forward mode, which needs no graph of its
    own, and certifies itself; the second measures forward mode beside the reference.

    Args:
        jacobian: The Jacobian by reverse mode.
        output_matrix: The product with the output matrix, both of the output's shape.
        forward: J v by forward mode.
        ways: What is chosen, the same for all batches.
        place: Place of the batch's first datum.
        curvature: What the output matrix is made of.
    """

    def __init__(
        self,
        jacobian: OutputLinearization,
        output_matrix: Callable[[Tensor], Tensor],
        forward: Way,
        ways: OutputWays,
        place: int,
        curvature: OutputCurvature | None = None,
    ) -> None:
        self._jacobian, self._output_matrix = jacobian, output_matrix
        self._forward, self._ways, self._place = forward, ways, place
        self.curvature = curvature

    @property
    def held_bytes(self) -> int:
        return super().held_bytes + self._jacobian.double_bytes

    def product(self, v: Tensor) -> Tensor:
        return self._jacobian.space.join(drained(self._parts(v)))

    def add_to(self, total: Tensor | None, v: Tensor) -> Tensor:
        return _joined(self._parts(v), total, v, self._jacobian.space)

    def _parts(self, v: Tensor) -> list[Tensor | None]:
        """The product by parameter: no flat vector lies beside its parts."""
        ways = self._ways
        # the graph for reverse over reverse costs more than one product gains, whatever is best later
        if not (ways.first(self._place) or self.once):
            return self._jacobian.pull(self._output_matrix(self._push(v)))
        found = None if ways.forward_fails else self._certifying_itself(v)
        if found is not None:
            return found
        return self._jacobian.pull(self._output_matrix(self._jacobian.jvp(v)), last=self.once)

    def _certifying_itself(self, v: Tensor) -> list[Tensor | None] | None:
        """The product by forward mode, if ⟨u, w⟩ = ⟨Jᵀ u, v⟩ with w = J v from forward and Jᵀ from reverse mode.

        It is looked at for the vector at hand with u = S w in each batch, and once for the model with a random vector
        and a random cotangent: S w vanishes where forward mode gives zeros by mistake.
        """
        ways = self._ways
        try:
            pushed = self._forward(v)
        except Exception as error:  # any failure of an optimisation means that the reference serves
            ways.forward_fails = True
            ways.account.note("J v", "reverse over reverse", f"forward mode is unsupported here: {reason(error)}")
            return None

        def check() -> bool:  # on random numbers: what a caller's vector certifies need not hold for the next one
            sizes = self._jacobian.space.sizes
            image = self._forward(torch.cat(list(_noise(sizes, v))))
            (u,) = _noise([image.numel()], image, seed=1)
            u = u.view_as(image)
            # drawn again: the vector is not there beside its product
            return _adjoint(u, drained(self._jacobian.pull(u)), image, _noise(sizes, v))

        certified = ways.adjoint(check)
        image = self._output_matrix(pushed)
        result = self._jacobian.pull(image)
        if certified and _adjoint(image, result, pushed, v.split(self._jacobian.space.sizes)):
            ways.account.note("J v", "forward mode", "Jᵀ by reverse mode is its adjoint on the vector at hand")
            return result
        ways.forward_fails = True
        ways.account.note("J v", "reverse over reverse", "Jᵀ by reverse mode is not forward mode's adjoint")
        return None

    def _push(self, v: Tensor) -> Tensor:
        pushes = {"reverse over reverse": self._jacobian.jvp, "forward mode": self._forward}
        return self._ways.push(v, pushes, at=self._jacobian.z.shape)

    def _together(self, rows: Tensor) -> Tensor:
        pushes = {
            "one by one": _loop(self._push),
            "reverse over reverse by vmap": lambda vs: self._jacobian.jvp(vs, batched=True),
            "forward mode by vmap": vmap(self._forward),
        }
        outputs = {"one by one": _loop(self._output_matrix), "by vmap": vmap(self._output_matrix)}
        pulls = {
            "one by one": _loop(self._jacobian.vjp),
            "by vmap": lambda us: self._jacobian.vjp(us, batched=True),
        }
        pushed = self._ways.pushes(rows, pushes, WORTH, self._jacobian.z.shape)
        return self._ways.pulls(self._ways.outputs(pushed, outputs, WORTH), pulls, WORTH, len(rows))


def _loop(one: Way) -> Way:
    return lambda several: torch.stack([one(x) for x in several])


def _single(v: Tensor) -> torch.dtype:
    """What sums over batches are kept in."""
    return torch.promote_types(v.dtype, torch.float32)


def _joined(parts: list[Tensor | None], total: Tensor | None, v: Tensor, space: TensorSpace) -> Tensor:
    """Parts by parameter as a flat vector, added to ``total`` if that is given: made only once the parts are there."""
    total = torch.zeros_like(v, dtype=_single(v)) if total is None else total
    return space.join(drained(parts), total)


def _noise(sizes: Sequence[int], like: Tensor, seed: int = 0) -> Iterator[Tensor]:
    """Random vectors of some sizes, always the same ones."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(size, generator=generator).to(like) for size in sizes)


def _adjoint(u: Tensor, pulled: Iterable[Tensor | None], pushed: Tensor, v: Iterable[Tensor]) -> bool:
    """Whether ⟨u, J v⟩ = ⟨Jᵀ u, v⟩ up to rounding, for Jᵀ u and v by parameter."""
    along = sum(_inner(a, b) for a, b in zip(pulled, v, strict=True))
    difference = abs(float(_inner(u, pushed.to(u.dtype)) - along))
    return difference <= ROUNDING * torch.finfo(pushed.dtype).eps * float(u.norm() * pushed.norm())


def _inner(a: Tensor | None, b: Tensor) -> Tensor:
    return b.new_zeros(()) if a is None else torch.dot(a.flatten().to(b.dtype), b.flatten())
