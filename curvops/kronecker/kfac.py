"""KFAC and EKFAC, as linear operators."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from curvops.kronecker.combine import kronecker_block
from curvops.kronecker.factors import LARGEST_BLOCK, BasisDiagonal, Factors, Moments, WholeGradients, whole_gradients
from curvops.kronecker.groups import Group, Key
from curvops.kronecker.sweep import Captured, Sweep, run
from curvops.linearize.certify import Account
from curvops.memory import budget
from curvops.operators.block_diagonal import BlockDiagonalOperator, Placed
from curvops.operators.blocks import Block, EigenBlock, KroneckerBlock
from curvops.risk.determinism import check_deterministic as check
from curvops.risk.empirical_risk import EmpiricalRisk
from curvops.risk.model import ModelFunction

FISHER_TYPES = ("type-2", "mc", "empirical", "forward-only")
APPROXIMATIONS = ("expand", "reduce")


class KFACLinearOperator(BlockDiagonalOperator):
    """Kronecker-factored approximate curvature (Martens & Grosse 2015, arXiv 1503.05671).

    Block-diagonal over parameters. The weight of a linear map of rows (linear, convolution, embedding, …) gets
    a Kronecker product B ⊗ A; a norm's scale or bias and whatever else gets the block of its whole gradients,
    dense up to 1,024 entries and diagonal beyond. `explain()` says how each parameter is treated.

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

    Raises:
        TypeError, ValueError: If an argument does not fit; the message says which and how.
        RuntimeError: If two passes over the data differ.

    Example:
        >>> import torch
        >>> from curvops import KFACLinearOperator
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> data = [(torch.rand(5, 3), torch.randint(2, (5,)))]
        >>> kfac = KFACLinearOperator(model, torch.nn.CrossEntropyLoss(), dict(model.named_parameters()), data)
        >>> kfac.shape, kfac.to_dense().shape
        ((26, 26), torch.Size([26, 26]))
    """

    def __init__(
        self,
        model_func: Module | ModelFunction,
        loss_func: Callable[[Any, Any], Tensor],
        params: Mapping[str, Tensor],
        data: Iterable[tuple[Any, Any]],
        *,
        progressbar: bool = False,
        check_deterministic: bool = True,
        num_data: int | None = None,
        batch_size_fn: Callable[[Any], int] | None = None,
        fisher_type: str = "mc",
        mc_samples: int = 1,
        kfac_approx: str = "expand",
        separate_weight_and_bias: bool = True,
        num_per_example_loss_terms: int | None = None,
        seed: int = 2147483647,
        reduction: str | None = None,
        memory_budget: int | None = None,
    ) -> None:
        _one_of("fisher_type", fisher_type, FISHER_TYPES)
        _one_of("kfac_approx", kfac_approx, APPROXIMATIONS)
        if not isinstance(mc_samples, int) or mc_samples < 1:
            raise ValueError(f"mc_samples: expected a number ≥ 1, got {mc_samples!r}.")
        self.risk = EmpiricalRisk(
            model_func,
            loss_func,
            params,
            data,
            reduction=reduction,
            progressbar=progressbar,
            num_data=num_data,
            batch_size_fn=batch_size_fn,
        )
        super().__init__(self.risk.space, psd=True)
        self.fisher_type, self.kfac_approx = fisher_type, kfac_approx
        self.num_per_example_loss_terms = num_per_example_loss_terms
        self.account = Account()
        self._sweep = Sweep(self.risk, fisher_type, mc_samples, seed, joint=not separate_weight_and_bias)
        self._memory_budget = memory_budget
        self._compute_dtype = torch.promote_types(self.dtype, torch.float32)
        self._blocks: list[Placed] | None = None
        if check_deterministic:
            check(self.risk)

    @property
    def blocks(self) -> Sequence[Placed]:
        """The blocks, computed at first use."""
        if self._blocks is None:
            with self.risk.evaluation():
                self._blocks = self._compute()
        return self._blocks

    def _compute(self) -> list[Placed]:
        c = self.risk.constant
        factors, wholes = self._moments()
        placed = []
        for key, group in self._sweep.groups.items():
            block = (
                self._whole_block(wholes[key], c) if key in wholes else self._linear_block(group, factors.get(key), c)
            )
            if block is not None:
                placed.append(Placed(group.names, group.positions, block))
        return placed

    def _linear_block(self, group: Group, factors: Factors | None, c: float) -> Block | None:
        return None if factors is None else kronecker_block(factors, c, self.fisher_type != "forward-only")

    def _whole_block(self, whole: WholeGradients, c: float) -> Block:
        one = torch.ones(1, 1, dtype=whole.moment.dtype, device=whole.moment.device)
        if self.fisher_type == "forward-only":
            # no gradient is taken, so the curvature of what is no linear map is the identity
            return KroneckerBlock(
                torch.ones_like(whole.moment[0] if whole.moment.ndim == 2 else whole.moment)[None], one
            )
        return KroneckerBlock(whole.moment[None] * c, one)

    def _moments(self) -> tuple[dict[Key, Factors], dict[Key, WholeGradients]]:
        """One sweep over the data."""
        moments = Moments(self.kfac_approx, self._compute_dtype)
        factors: dict[Key, Factors] = {}
        wholes: dict[Key, WholeGradients] = {}

        def sweep() -> None:
            factors.clear()
            wholes.clear()
            for place, captured in self._sweep.captures(self.name):
                self._visit(place, captured)
                for key in captured.uses:
                    group = self._sweep.groups[key]
                    if group.kind == "linear":
                        moments.add(group, factors.setdefault(key, Factors()), captured)
                for key, group in self._sweep.groups.items():
                    if group.kind != "linear" and (
                        key in captured.uses or key in captured.leaves or self.fisher_type == "forward-only"
                    ):
                        if key not in wholes:
                            wholes[key] = WholeGradients(
                                len(group.positions), self._compute_dtype, self.device, LARGEST_BLOCK
                            )
                        gradients = whole_gradients(group, captured)
                        if gradients is not None:
                            wholes[key].add(gradients)

        run(sweep)
        return factors, wholes

    def _visit(self, place: int, captured: Captured) -> None:
        """What else a subclass takes from the first sweep."""

    def explain(self) -> str:
        """How each parameter is treated, and why."""
        lines = [repr(self)]
        for placed in self.blocks:
            groups, left, right = placed.block.shape
            lines.append(f"  {', '.join(placed.names)}: {type(placed.block).__name__} {groups} × ({left} ⊗ {right})")
        covered = {name for placed in self.blocks for name in placed.names}
        lines += [f"  {name}: zero, the model does not use it" for name in self.domain.names if name not in covered]
        for name, route in self._sweep.routes.items():
            if route.units != "batch" or not route.tapped:
                lines.append(f"  {name}: {route.units}, {route.why}")
        return "\n".join(lines)

    def _budget(self) -> int:
        return budget(self.device, self._memory_budget)


class EKFACLinearOperator(KFACLinearOperator):
    """KFAC in its eigenbasis with the exact diagonal there (George et al. 2018, arXiv 1806.03884).

    The block of a weight is (U_B ⊗ U_A) diag(λ) (U_B ⊗ U_A)ᵀ, λ from whole per-datum gradients, so that with
    ``fisher_type="type-2"`` each block has the GGN's trace. Arguments as for `KFACLinearOperator`.

    Example:
        >>> import torch
        >>> from curvops import EKFACLinearOperator, GGNLinearOperator
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2)).double()
        >>> problem = model, torch.nn.MSELoss(), dict(model.named_parameters()), [(torch.rand(5, 3).double(), torch.rand(5, 2).double())]
        >>> ekfac = EKFACLinearOperator(*problem, fisher_type="type-2")
        >>> torch.allclose(ekfac.trace(), GGNLinearOperator(*problem).to_dense().trace())
        True
    """

    def _compute(self) -> list[Placed]:
        c = self.risk.constant
        factors, wholes = self._moments()
        bases = {}
        for key, group in self._sweep.groups.items():
            block = self._linear_block(group, factors.get(key), 1.0) if key not in wholes else None
            if isinstance(block, KroneckerBlock):
                bases[key] = (_eigenvectors(block.left), _eigenvectors(block.right))
        diagonals = self._corrections(bases)
        placed = []
        for key, group in self._sweep.groups.items():
            if key in wholes:
                placed.append(Placed(group.names, group.positions, self._whole_block(wholes[key], c)))
            elif key in bases:
                placed.append(Placed(group.names, group.positions, EigenBlock(*bases[key], diagonals[key].total * c)))
        return placed

    def _corrections(self, bases: Mapping[Key, tuple[Tensor | None, Tensor | None]]) -> dict[Key, BasisDiagonal]:
        """A second sweep with the same samples."""
        groups, found = self._sweep.groups, {}
        for key, (left, right) in bases.items():
            found[key] = BasisDiagonal(groups[key], left, right, self._compute_dtype, self._budget())
        for _, captured in self._sweep.captures(f"{self.name} correction"):
            for key in captured.uses:
                if key in found:
                    found[key].add(captured)
        return found


def _eigenvectors(factor: Tensor) -> Tensor | None:
    """Eigenvectors of a factor; ``None`` for a diagonal one, whose eigenbasis is the given one."""
    return None if factor.ndim == 2 else torch.linalg.eigh(factor)[1]


def _one_of(name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}.")
