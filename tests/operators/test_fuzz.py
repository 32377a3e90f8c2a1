"""Random expressions of operators, formats and calls against dense linear algebra; what repeated work leaves behind."""

import pytest

from benchmarks.fuzz import run
from benchmarks.fuzz_memory import memory


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_random_cases_are_right_or_clearly_refused(first):
    found = [(case, *run(case)) for case in range(first, first + 50)]
    assert [each for each in found if each[2] not in ("right", "refused")] == []
    # nothing that has an answer is refused
    reasons = "expected a s", "positive definite", "negative"  # symmetric, square
    refused = [each for each in found if each[2] == "refused" and each[1] != "nonsense"]
    assert [each for each in refused if not any(reason in each[3] for reason in reasons)] == []


def test_repeated_work_keeps_no_tensors():
    assert {name: tensors for name, (tensors, _) in memory(10).items() if tensors > 0} == {}
