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


def test_what_has_no_name_of_its_own_is_what_the_page_says():
    (setup,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    names: dict = {}
    exec(setup, names)
    double = names["model"].double(), names["criterion"], names["params"]
    names["loader"] = [(X.double(), y) for X, y in names["loader"]]
    names["problem"] = *double, names["loader"]
    names |= {name: names[name].detach().double().requires_grad_() for name in ("tau", "s")}
    for _, ours in ROWS:
        if re.match("(h|J|F|G|j|logdet) = ", ours):
            exec(compile(ours, ours, "exec"), names)
    rows = [(X[k : k + 1], y[k : k + 1]) for X, y in names["loader"] for k in range(len(X))]
    slopes = [torch.autograd.grad(double[1](double[0](X), y), list(double[2].values())) for X, y in rows]
    expected = torch.stack([torch.cat([part.flatten() for part in own]) for own in slopes])
    torch.testing.assert_close(names["G"].to_dense(), expected)
    F, j = names["F"].to_dense(), names["j"].to_dense()
    torch.testing.assert_close(names["covariance"], j @ torch.linalg.solve(60 * F + torch.eye(len(F)), j.T))
    tau, s = names["tau"], names["s"]
    whole = torch.logdet(s * F + tau * torch.eye(len(F)))
    torch.testing.assert_close(names["logdet"], whole)
    torch.testing.assert_close(*(torch.autograd.grad(found, (tau, s)) for found in (names["logdet"], whole)))


def test_no_row_of_a_table_is_left_out():
    lines = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| there")]
    assert len(ROWS) == len(lines) > 40
