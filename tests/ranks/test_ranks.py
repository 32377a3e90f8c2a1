"""Operators of several processes are those of one: the same matrices, whoever has which data."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from problems import PROBLEMS
from ranks.cases import BATCHES, SHARES, cases, others, values

HERE = Path(__file__).parent


def torchrun(number: int, script: str, *arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    """As a user would start it, on this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}"]
    path = os.pathsep.join(map(str, (HERE, HERE.parent, HERE.parent.parent)))
    done = subprocess.run(
        [*command, HERE / script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": path},
    )
    own = [line for line in done.stderr.splitlines() if line.startswith("[rank")]
    assert not check or done.returncode == 0, "\n".join(own) or done.stderr
    return done


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = {name: values(name, make, p, p.data(*BATCHES)) for name, make, p in cases()}
    p = PROBLEMS["mlp"]()
    found["others"] = others(p, p.data(*BATCHES))
    path = tmp_path_factory.mktemp("ranks") / "references.pt"
    torch.save(found, path)
    return path


@pytest.mark.parametrize("number", SHARES)
def test_the_matrices_are_those_of_one_process(number, references, tmp_path):
    torchrun(number, "worker.py", references, tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report) > (200 if number == 2 else 20)
    # the steps of alternating least squares end by rounding
    least = {name: 1e-7 if "kfoc" in name else 1e-10 for name in report}
    assert {name: error for name, error in report.items() if isinstance(error, str) or not error < least[name]} == {}
