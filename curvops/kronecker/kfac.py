"""KFAC and EKFAC, as linear operators."""

from __future__ import annotations

import torch
from torch import Tensor

from curvops.kronecker.collect import Collection
from curvops.kronecker.correction import BasisDiagonal
from curvops.kronecker.groups import Key
from curvops.kronecker.operator import KroneckerOperator
from curvops.kronecker.state import Entry
from curvops.operators.blocks import KroneckerBlock
from curvops.space import describe


class KFACLinearOperator(KroneckerOperator):
    """Kronecker-factored approximate curvature (Martens & Grosse 2015, arXiv 1503.05671).

    Block-diagonal over parameters. The weight of a linear map of rows (linear, convolution, embedding, …) gets
    a Kronecker product B ⊗ A; a norm's scale or bias, and whatever else, gets the block of its whole gradients,
    dense while small and diagonal beyond. `explain()` says how each parameter is treated.

    It is a snapshot, taken when it is made: later changes of the model or data do not enter it. `plan` tells from the
    same arguments what it would be; `of` makes it from an `EmpiricalRisk`.

    Args:
        model_func: Module called as ``model(X)``, or a function ``(params, X)``.
        loss_func: Loss ``(output, y)``: a module, or a function together with ``reduction``.
        params: Parameters by name, any subset of the module's.
        data: Iterable of ``(X, y)`` that can be walked again.
        progressbar: Show a progress bar over the batches (needs ``tqdm``).
        check_deterministic: Compare two passes over the data before anything is computed.
        num_data: Number of data, if known; it is compared with what the loader yields.
        batch_size_fn: Number of data in ``X`` where it cannot be seen.
        process_group: Processes of `torch.distributed` that pass a share of the data each; see `EmpiricalRisk`.
        fisher_type: ``"type-2"`` (all columns of the output Hessian's root; with many loss terms a datum estimated,
            see `BlockRule`), ``"mc"`` (gradients at sampled
            labels), ``"empirical"`` (at the true label), ``"forward-only"`` (B = identity). ``"mc"`` if not given, for
            `GGNDiagonalLinearOperator` ``"type-2"``.
        mc_samples: Samples for ``"mc"``. One leaves directions without curvature, in which a small exact damping takes
            steps that are too long: see ``NaturalGradient`` in ``examples/natural_gradient.py`` for what trains.
        kfac_approx: ``"expand"`` or ``"reduce"`` for weights shared over positions (Eschenhagen et al. 2023,
            arXiv 2311.00636).
        separate_weight_and_bias: Whether weight and bias of a layer get a block each.
        num_per_example_loss_terms: Loss terms of a datum; inferred, and compared if given.
        seed: Seed of the samples.
        reduction: ``"mean"`` or ``"sum"``, for losses that do not say it themselves.
        memory_budget: Bytes that rows which are kept may take, and as many a pass; a quarter of the free memory if not given.
            Where it is given, a batch whose pass takes more is cut into pieces, if the model does not mix its data.
        spill: A folder on a disk, for what is larger than memory: factors, eigenvectors and the rows beyond the budget lie
            in files there, which are mapped and have no names. Of parameters on the CPU.
        rule: When blocks and factors are kept as diagonals, and when loss terms share backward passes.
        checkpoint: Where the state of the computation is kept, to go on from after it was killed: see `Checkpoint`.

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

    def _compute(self, collection: Collection) -> dict[Key, Entry]:
        return self._kfac(collection)


class EKFACLinearOperator(KroneckerOperator):
    """KFAC in its eigenbasis with the exact diagonal there (George et al. 2018, arXiv 1806.03884).

    The block of a weight is (U_B ⊗ U_A) diag(λ) (U_B ⊗ U_A)ᵀ, λ from whole per-datum gradients, so that with
    ``fisher_type="type-2"`` each block has the GGN's trace. The rows of
    the first walk over the data are kept for the correction while they fit the memory budget; beyond, a second walk
    draws the same samples.

    Args:
        model_func, loss_func, params, data: Model, loss, parameters by name and batches, as of `KFACLinearOperator`.
        check_deterministic, checkpoint: As there.
        options: ``fisher_type``, ``mc_samples``, ``kfac_approx``, ``separate_weight_and_bias``,
            ``num_per_example_loss_terms``, ``seed``, ``rule``, ``memory_budget``, ``spill``, ``reduction``, ``progressbar``,
            ``num_data``, ``batch_size_fn`` and ``process_group``, as there.

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

    further_walks = 1
    needs_gradients = "so there is nothing to correct the eigenvalues by. Use KFACLinearOperator."

    def _compute(self, collection: Collection) -> dict[Key, Entry]:
        def first() -> dict[Key, Entry]:
            entries = self._kfac(collection, again=True)
            diagonals = _diagonals(entries, collection)  # takes out what they stand for
            return {**entries, **diagonals}

        entries, budget = collection.second(first), collection.budget
        diagonals = {key: BasisDiagonal(one, budget) for key, one in entries.items() if "total" in one.tensors}
        for key, uses in collection.again("correction", entries):
            if key in diagonals:
                diagonals[key].add(uses)
        collection.add_all([diagonal.total for diagonal in diagonals.values()])
        return entries


def _diagonals(entries: dict[Key, Entry], collection: Collection) -> dict[Key, Entry]:
    """What the correction is added to, in the eigenbases of the factors, which are given up one by one.

    Each factor is decomposed once: layers with the same inputs share theirs.
    """
    factors: list[tuple[Tensor, str]] = []

    def place(factor: Tensor, label: str) -> int:
        for k, (other, _) in enumerate(factors):
            if factor is other or (factor.shape == other.shape and not factor.is_meta and torch.equal(factor, other)):
                return k
        factors.append((factor, label))
        return len(factors) - 1

    places, groups = {}, collection.sweep.grouping.groups
    for key in [key for key in entries if groups[key].kind == "linear"]:
        block = entries.pop(key).block(1.0)
        if isinstance(block, KroneckerBlock):
            label = f"block of {describe(groups[key].names)}"
            places[key] = [place(factor, label) for factor in collection.scaled(block)]
    vectors = collection.eigenvectors(factors)
    found = {}
    for key, pair in places.items():
        total = collection.spill.zeros(groups[key].shape, collection.dtype)
        bases = {side: v for side, k in zip(("left", "right"), pair, strict=True) if (v := vectors[k]) is not None}
        found[key] = Entry("eigen" if bases else "diagonal", {**bases, "total": total})
    return found
