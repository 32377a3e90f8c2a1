"""What can be asked of a Kronecker operator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from curvops.risk.empirical_risk import RiskOptions
from curvops.space import describe

FISHER_TYPES = ("type-2", "mc", "empirical", "forward-only")
APPROXIMATIONS = ("expand", "reduce")


@dataclass(frozen=True)
class BlockRule:
    """When a block or a factor is kept as its diagonal, and when loss terms share backward passes.

    Attributes:
        largest_factor: Side of a Kronecker factor up to which it is dense. (The inputs of an embedding are unit
            vectors, so their factor is diagonal by nature, whatever its side.)
        largest_block: Entries of a parameter without Kronecker structure up to which its block is dense.
        allow_diagonal: Whether diagonals may be kept at all; otherwise an error names the parameter.
        most_passes: Backward passes a batch (loss terms of a datum times columns of their factor) up to which
            ``"type-2"`` and ``"empirical"`` operators square loss terms separately. Beyond, the terms of a datum share
            a pass with random signs, and blocks are estimates without bias; a warning says so.
    """

    largest_factor: int = 10_000
    largest_block: int = 1_024
    allow_diagonal: bool = True
    most_passes: int = 1_024

    def __post_init__(self) -> None:
        if not isinstance(self.most_passes, int) or self.most_passes < 0:
            raise ValueError(
                f"most_passes: expected a number of backward passes, at least 0, got {self.most_passes!r}."
            )

    def factor(self, size: int, names: Sequence[str]) -> bool:
        """Whether a factor of some parameters' block is dense."""
        return self._dense(size, self.largest_factor, "largest_factor", "Kronecker factor of side", names)

    def block(self, size: int, names: Sequence[str]) -> bool:
        """Whether a block is dense."""
        return self._dense(size, self.largest_block, "largest_block", "block of side", names)

    def _dense(self, size: int, largest: int, option: str, what: str, names: Sequence[str]) -> bool:
        if size > largest and not self.allow_diagonal:
            raise ValueError(
                f"{describe(names)}: a {what} {size:,} is beyond {option}={largest:,}, and diagonals are not "
                f"allowed. Pass rule=BlockRule({option}={size}), allow_diagonal=True, or leave the parameter out."
            )
        return size <= largest


class KroneckerOptions(RiskOptions, total=False):
    """What the constructors of Kronecker operators take by name; see `KFACLinearOperator`."""

    fisher_type: str | None
    mc_samples: int
    kfac_approx: str
    separate_weight_and_bias: bool
    num_per_example_loss_terms: int | None
    seed: int
    memory_budget: int | None
    spill: str | Path | None
    rule: BlockRule | None


@dataclass(frozen=True)
class Options:
    """The options that Kronecker operators have beside those of every risk operator; see `KFACLinearOperator`."""

    fisher_type: str = "mc"
    mc_samples: int = 1
    kfac_approx: str = "expand"
    separate_weight_and_bias: bool = True
    num_per_example_loss_terms: int | None = None
    seed: int = 2147483647
    memory_budget: int | None = None
    spill: str | Path | None = None
    rule: BlockRule = field(default_factory=BlockRule)

    def __post_init__(self) -> None:
        for name, allowed in (("fisher_type", FISHER_TYPES), ("kfac_approx", APPROXIMATIONS)):
            if getattr(self, name) not in allowed:
                known = ", ".join(map(repr, allowed))
                raise ValueError(f"{name}: expected one of {known}, got {getattr(self, name)!r}.")
        if not isinstance(self.mc_samples, int) or self.mc_samples < 1:
            raise ValueError(f"mc_samples: expected a number ≥ 1, got {self.mc_samples!r}.")

    def expect_terms(self, seen: int | None) -> None:
        """A ValueError where the loss terms of a datum are others than the caller said."""
        if self.num_per_example_loss_terms not in (None, seen):
            raise ValueError(
                f"num_per_example_loss_terms: expected {self.num_per_example_loss_terms}, the model's output has {seen}. "
                "Leave it out: it is inferred."
            )

    @property
    def room(self) -> float:
        """Bytes that the budget leaves, without bound if there is none."""
        return float("inf") if self.memory_budget is None else self.memory_budget

    @property
    def settings(self) -> dict[str, object]:
        """What two operators must have in common to be added."""
        names = ("fisher_type", "mc_samples", "kfac_approx", "separate_weight_and_bias")
        return {name: getattr(self, name) for name in names} | (
            {} if self.fisher_type == "mc" else {"mc_samples": None}
        )
