"""Fast ways prove themselves: compared with the reference at first use, else the reference serves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Account:
    """What was chosen for each piece of work, and why: the source of `explain()`."""

    rows: dict[str, tuple[str, str]] = field(default_factory=dict)

    def note(self, work: str, choice: str, why: str) -> None:
        """Record the choice for a piece of work; the last one counts."""
        self.rows[work] = (choice, why)

    def adopt(self, other: Account) -> None:
        """Take another account's rows, and those that it records from now on."""
        self.rows.update(other.rows)
        other.rows = self.rows

    def __str__(self) -> str:
        return "\n".join(f"  {work}: {choice} ({why})" for work, (choice, why) in self.rows.items())


def tolerance(dtype: torch.dtype) -> float:
    """Largest relative difference that rounding explains: the root of the machine precision."""
    return float(torch.finfo(dtype).eps ** 0.5)


def relative_difference(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖, zero where both vanish; not a number if either is not finite."""
    difference, scale = (a - b).detach().norm(), b.detach().norm()
    return float(difference / scale) if scale > 0 else float(difference)


def certified(
    work: str,
    way: str,
    fast: Callable[[], tuple[Tensor, float]],
    dtype: torch.dtype,
    account: Account,
) -> Tensor | None:
    """The result of a fast way if it passes its probe, else None, with the reason in the account.

    Args:
        work: What is being computed, for the account.
        way: The fast way's name, for the account.
        fast: Computes the result, and its relative difference to the reference on a random vector.
        dtype: Precision, which sets the tolerance.
        account: Where the choice is recorded.
    """
    try:
        result, difference = fast()
    except Exception as error:  # any failure of an optimisation means that the reference serves
        account.note(work, "reference", f"{way} is unsupported here: {reason(error)}")
        return None
    if not difference <= tolerance(dtype):
        account.note(work, "reference", f"{way} differs from the reference by {difference:.1e}")
        return None
    account.note(work, way, f"equal to the reference within {difference:.1e}")
    return result


def reason(error: Exception) -> str:
    """What an exception says, in one line."""
    return f"{type(error).__name__}: {error}".split("\n")[0]
