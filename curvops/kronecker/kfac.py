"""KFAC and EKFAC, as linear operators."""

from __future__ import annotations

import torch
from torch import Tensor

from curvops.kronecker.account import Form, eigen_form
from curvops.kronecker.collect import MomentCollector
from curvops.kronecker.correction import BasisDiagonal
from curvops.kronecker.groups import Group, Key
from curvops.kronecker.operator import KroneckerOperator
from curvops.kronecker.replay import Replay
from curvops.kronecker.state import Eigen, Entry, Moment
from curvops.operators.eigen import eigh
from curvops.space import describe


class KFACLinearOperator(KroneckerOperator):
    """Kronecker-factored approximate curvature (Martens & Grosse 2015, arXiv 1503.05671).

    Block-diagonal over parameters. The weight of a linear map of rows (linear, convolution, embedding, …) gets
    a Kronecker product B ⊗ A; a norm's scale or bias, and whatever else, gets the block of its whole gradients,
    dense while small and diagonal beyond. `explain()` says how each parameter is treated.

    Args:
        model_func: Module called as ``model(X)``, or a function ``(params, X)``.
        loss_func: Loss ``(output, y)``: a module, or a function together with ``reduction``.
        params: Parameters by name, any subset of the module's.
        data: Iterable of ``(X, y)`` that can be walked again.
        progressbar: Show a progress bar over the batches (needs ``tqdm``).
        check_deterministic: Compare two passes over the data before anything is computed.
        num_data: Number of data, if known; it is compared with what the loader yields.
        batch_size_fn: Number of data in ``X`` where it cannot be seen.
        fisher_type: ``"type-2"`` (all columns of the output Hessian's root), ``"mc"`` (gradients at sampled
            labels), ``"empirical"`` (at the true label), ``"forward-only"`` (B = identity).
        mc_samples: Samples for ``"mc"``.
        kfac_approx: ``"expand"`` or ``"reduce"`` for weights shared over positions (Eschenhagen et al. 2023,
            arXiv 2311.00636).
        separate_weight_and_bias: Whether weight and bias of a layer get a block each.
        num_per_example_loss_terms: Loss terms of a datum; inferred, and compared if given.
        seed: Seed of the samples.
        reduction: ``"mean"`` or ``"sum"``, for losses that do not say it themselves.
        memory_budget: Bytes that intermediate results may take; a quarter of the free memory if not given.
        rule: When blocks and factors are kept as diagonals.

    Raises:
        TypeError, ValueError: If an argument does not fit; the message says which and how.
        RuntimeError: If two passes over the data differ.

    Example:
        >>> import torch
        >>> from curvops import KFACLinearOperator
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> data = [(torch.rand(5, 3), torch.randint(2, (5,)))]
        >>> kfac = KFACLinearOperator(model, torch.nn.CrossEntropyLoss(), dict(model.named_parameters()), data)
        >>> kfac.shape, kfac.inverse(damping=1e-3).to_dense().shape
        ((26, 26), torch.Size([26, 26]))
    """

    def _compute(self) -> dict[Key, Entry]:
        moments, wholes = self._moments(), self._wholes()
        self._collect(moments, wholes)
        return {**moments.entries(), **wholes.entries()}


class Bases:
    """Eigenvectors of factors, each factor decomposed once: layers with the same inputs share theirs."""

    def __init__(self) -> None:
        self._factors: list[tuple[Tensor, str]] = []

    def place(self, factor: Tensor, label: str) -> int:
        """Take a factor; the place of its eigenvectors."""
        for place, (other, _) in enumerate(self._factors):
            if factor.shape == other.shape and torch.equal(factor, other):
                return place
        self._factors.append((factor, label))
        return len(self._factors) - 1

    def vectors(self) -> list[Tensor | None]:
        """The eigenvectors of all factors, ``None`` for diagonal ones; a factor is given up once it is decomposed."""
        remaining, found = self._factors[::-1], []
        self._factors = []
        while remaining:
            found.append(eigh(*remaining.pop())[1])
        return found


class EKFACLinearOperator(KroneckerOperator):
    """KFAC in its eigenbasis with the exact diagonal there (George et al. 2018, arXiv 1806.03884).

    The block of a weight is (U_B ⊗ U_A) diag(λ) (U_B ⊗ U_A)ᵀ, λ from whole per-datum gradients, so that with
    ``fisher_type="type-2"`` each block has the GGN's trace. Arguments as for `KFACLinearOperator`. The rows of
    the first sweep are kept for the correction while they fit the memory budget; beyond, a second sweep draws
    the same samples.

    Example:
        >>> import torch
        >>> from curvops import EKFACLinearOperator, GGNLinearOperator
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2)).double()
        >>> data = [(torch.rand(5, 3).double(), torch.rand(5, 2).double())]
        >>> problem = model, torch.nn.MSELoss(), dict(model.named_parameters()), data
        >>> ekfac = EKFACLinearOperator(*problem, fisher_type="type-2")
        >>> torch.allclose(ekfac.trace(), GGNLinearOperator(*problem).to_dense().trace())
        True
    """

    _again = 1

    def _form(self, group: Group) -> Form:
        return eigen_form(group, self.rule)

    def _compute(self) -> dict[Key, Entry]:
        if self.fisher_type == "forward-only":
            raise ValueError(
                "fisher_type: 'forward-only' takes no gradients, so there is nothing to correct the eigenvalues by. "
                "Use KFACLinearOperator."
            )
        moments, wholes, replay = self._moments(), self._wholes(), Replay(self._sweep, self._budget())
        self._collect(moments, wholes, replay)
        self._kept_bytes = replay.kept_bytes
        diagonals = self._diagonals(moments)
        for passes in replay.together(f"{self.name} correction"):
            for key, diagonal in diagonals.items():
                diagonal.add([rows[key] for rows in passes if key in rows])
        return {**{key: Eigen(d.left, d.right, d.total) for key, d in diagonals.items()}, **wholes.entries()}

    def _diagonals(self, moments: MomentCollector) -> dict[Key, BasisDiagonal]:
        """What the correction is added to, in the eigenbases of the factors, which are gone afterwards."""
        bases = Bases()
        places = {key: self._places(key, entry, bases) for key, entry in moments.entries().items()}
        moments.clear()
        vectors = bases.vectors()
        return {
            key: BasisDiagonal(
                self._sweep.groups[key], vectors[pair[0]], vectors[pair[1]], self._compute_dtype, self._budget()
            )
            for key, pair in places.items()
            if pair is not None
        }

    def _places(self, key: Key, entry: Moment, bases: Bases) -> tuple[int, int] | None:
        block, label = entry.block(1.0), f"block of {describe(self._sweep.groups[key].names)}"
        return None if block is None else (bases.place(block.left, label), bases.place(block.right, label))
