"""What was chosen for each piece of work, and why; and when two results count as equal."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from curvops.context import UNFIT, quietly
from curvops.operators.linear_operator import LinearOperator
from curvops.ranks import RanksError
from curvops.risk.empirical_risk import EmpiricalRisk

Found = TypeVar("Found")


@dataclass
class Account:
    """The source of an operator's `explain()`."""

    rows: dict[str, tuple[str, str]] = field(default_factory=dict)

    def note(self, work: str, choice: str, why: str) -> None:
        """Record the choice for a piece of work; the last one counts."""
        self.rows[work] = (choice, why)

    def __str__(self) -> str:
        return "\n".join(f"  {work}: {choice} ({why})" for work, (choice, why) in list(self.rows.items()))


class AccountedOperator(LinearOperator):
    """An operator of a risk, with an account of what it chose."""

    risk: EmpiricalRisk
    account: Account

    def explain(self) -> str:
        """What was chosen for each piece of work so far, and why."""
        return f"{self!r}\n{str(self.account) or '  nothing has been computed yet'}"

    def _facts(self) -> list[tuple[str, str]]:
        return [*super()._facts(), *((work, f"{choice} ({why})") for work, (choice, why) in self.account.rows.items())]

    def _leaves(self) -> Iterable[Tensor]:
        return self.risk.params.values()

    def _in_step(self) -> AbstractContextManager[None]:
        return self.risk.ranks.together()


def tolerance(dtype: torch.dtype) -> float:
    """Largest relative difference that rounding explains: the root of the machine precision."""
    return float(torch.finfo(dtype).eps ** 0.5)


def relative_difference(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖, zero where both vanish; not a number if either is not finite."""
    difference, scale = float((a - b).detach().norm()), float(b.detach().norm())
    return difference / scale if scale > 0 else difference


def attempted(compute: Callable[[], Found]) -> tuple[Found | None, str]:
    """What a fast way gives, or ``None`` and why it is unsupported; to be out of memory is an error, and so is a RanksError."""
    try:
        with quietly():
            return compute(), ""
    except (torch.OutOfMemoryError, RanksError):
        raise
    except UNFIT as error:
        return None, reason(error)


def reason(error: Exception) -> str:
    """What an exception says, in one line."""
    return f"{type(error).__name__}: {error}".split("\n")[0]
