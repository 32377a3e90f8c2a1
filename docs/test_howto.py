"""What docs/howto.md says about us runs, line by line."""

import re
from pathlib import Path

import torch

PAGE = (Path(__file__).parent / "howto.md").read_text()
ROWS = re.findall(r"^\| (.+) \| `(.+)` \|$", PAGE, re.MULTILINE)


def test_each_line_on_the_right_runs_and_changes_nothing_of_the_callers():
    (setup,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    names: dict = {}
    exec(setup, names)
    before = [p.detach().clone() for p in names["params"].values()]
    for _, ours in ROWS:
        exec(compile(ours, ours, "exec"), names)
    assert all(map(torch.equal, before, names["params"].values()))
    assert all(p.grad is None for p in names["params"].values())


def test_no_row_of_a_table_is_left_out():
    lines = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| there")]
    assert len(ROWS) == len(lines) > 40
