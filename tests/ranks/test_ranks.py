"""Operators of several processes are those of one: the same matrices, whoever has which data."""

import json
import os
import re
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


BOTH = {
    "columns": "compute different things: process 0 HessianLinearOperator, 2 × .* process 1 HessianLinearOperator, 3 × ",
    "vectors": "multiply different vectors",
    "loss": "different loss: .*label_smoothing=0.0.* in process 0, .*label_smoothing=0.1.* in process 1",
    "parameters": "different parameters: .* in process 1",
    "order": "different parameters",
    "samples": "compute different things: .*1 samples, .*2 samples",
    "seed": "compute different things: .*seed 0.*seed 1",
    "operator": "compute different things: process 0 KFACLinearOperator.* process 1 EKFACLinearOperator",
    "number": "num_data: expected 5 data, the loader yields 6",
    "argument": "TypeError: data: got a generator, which can be walked only once",
    "nothing": "the loader is empty",
    "places": "the processes have .* data, and had .* before",
    "weights": "'0.weight' differ between the processes 0 and 1. An operator has one model",
    "product": "OSError: the disk is gone",
    "check": "OSError: the disk is gone",
    "kfac": "OSError: the disk is gone",
    "gradient": "OSError: the disk is gone",
    "linearized": "'0.weight'",
    "none": "no error",
    "tokens": "divides by something else than their number|cannot be compared",
}


def test_what_goes_wrong_in_one_process_is_an_error_in_all_of_them(tmp_path):
    torchrun(2, "disagreements.py", tmp_path / "report.json")
    first, second = json.loads((tmp_path / "report.json").read_text())
    assert first.keys() == second.keys() == BOTH.keys()
    for name, expected in BOTH.items():
        for found in (first[name], second[name]):
            assert re.search(expected, found, re.DOTALL), (name, found)
