"""What of the batches goes through the model at once: one of them, several small ones, or a piece of a large one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from curvops.kronecker.alone import work_of
from curvops.kronecker.tape import Tape
from curvops.products.account import Account
from curvops.products.pieces import in_pieces, piece_size
from curvops.risk.data import Batch, joins
from curvops.risk.empirical_risk import EmpiricalRisk

# bytes of the layers' outputs up to which batches go together, within a quarter of the memory budget
JOINED = 8 * 2**20
PROOF = 4  # of the parameters' bytes, what it takes to prove that pieces give the same, and is at least left to a pass
COPIES = 6  # of what a forward pass saves, with what KFAC needs besides: `python benchmarks/pieces.py`


class Division:
    """Batches in pieces, where a pass of one would exceed the memory budget that the user has set, and pieces give the same.

    Attributes:
        sizes: Of each batch of a first walk, how many data a piece has, or 0 for all; further walks take the same.
        account: Why so.
    """

    def __init__(self, risk: EmpiricalRisk, budget: int) -> None:
        self._risk, self._budget = risk, budget
        self.sizes: list[int] = []
        self.account = Account()

    def through(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches, or their pieces."""
        for place, batch in enumerate(batches):
            if place == len(self.sizes):
                self.sizes.append(self._size(batch))
            yield from in_pieces(batch, self.sizes[place])

    def undone(self) -> bool:
        """Whether there were pieces; from now on there are none."""
        cut = any(self.sizes)
        if cut:
            self._budget = 0
            self.account.note("batches", "whole", "the model mixes the data of a batch, by small groups")
        return cut

    def _size(self, batch: Batch) -> int:
        if not self._budget:
            return 0
        # nor does it save memory to cut what takes less than the proof
        least = PROOF * sum(p.numel() * p.itemsize for p in self._risk.params.values())
        return piece_size(self._risk, batch, max(self._budget, least), self.account, COPIES, second=False)


def gathered(batches: Iterable[Batch], cuts: Sequence[int], most: Callable[[], int]) -> Iterator[list[Batch]]:
    """The batches that go together, the first one alone, up to so many data; or those that did in an earlier walk."""
    waiting: list[Batch] = []
    numbers, first = iter(cuts), 0
    number = next(numbers, 1)
    for batch in batches:
        first = first or batch.size
        # of one size, which the first one had: a model may do something else with other numbers of data
        alike = {one.size for one in (*waiting, batch)} == {first}
        if waiting and not (alike and joins(waiting, batch, most())):
            yield waiting
            waiting = []
        waiting = [*waiting, batch]
        if len(waiting) == number or not most():
            yield waiting
            waiting, number = [], next(numbers, 0)
    if waiting:
        yield waiting


def joinable(tape: Tape, budget: float, closed_form: bool, ways: dict[str, str]) -> int:
    """How many data may go together, by what one batch of them took."""
    if not closed_form or set(ways.values()) != {"batch"} or tape.size < 2:
        return 0
    size = sum(work_of(use)[0] for use in tape.uses) * tape.z.itemsize
    most = int(min(JOINED, budget / 4) * tape.size / max(size, 1))
    return most if most >= 2 * tape.size else 0
