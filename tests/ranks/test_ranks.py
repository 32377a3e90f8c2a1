"""Operators of several processes are those of one: the same matrices, whoever has which data."""

import json
import re
import signal
import subprocess
import sys

import pytest
import torch
from launch import elastic, forked
from problems import PROBLEMS
from ranks import both, lost, survivors, worker
from ranks.cases import BATCHES, cases, others, spread, values
from torch.utils.data import TensorDataset

from curvops import GGNLinearOperator, share_of
from curvops.cli import main
from curvops.cli.problem import load_problem
from curvops.ranks import Ranks
from curvops.sharding import LEAST
from curvops.tour import load_matrices
from curvops.tour.matrices import OPERATORS as TOUR


def test_the_matrices_are_those_of_one_process(tmp_path):
    """Of one, two and three processes."""
    expected = {name: values(name, make, p, p.data(*BATCHES)) for name, make, p in cases()}
    p = PROBLEMS["mlp"]()
    expected |= {"others": others(p, p.data(*BATCHES)), "spread": spread(PROBLEMS["mlp"](), None)}
    torch.save(expected, tmp_path / "references.pt")
    found, _, _ = elastic(3, worker.main, tmp_path / "references.pt")
    for number, report in found.items():
        assert len(report) > (200 if number == 2 else 20)
        # the steps of alternating least squares end by rounding
        least = {name: 1e-7 if "kfoc" in name else 1e-10 for name in report}
        wrong = {name: error for name, error in report.items() if isinstance(error, str) or not error < least[name]}
        assert wrong == {}, f"{number} processes"
    assert found.keys() == {1, 2, 3}


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
    "outputs": "RuntimeError: JacobianLinearOperator: expected .* outputs",
    "products": "ValueError: num_products: expected a positive integer, got -1",
    "right side": "ValueError: .*got",
    "pairs": "ValueError: .*99",
    "length": "ValueError: .*got",
    "sum's length": "ValueError: .*got",
    "counted": "different num_data: None in process 0, 6 in process 1",
    "judge": "OSError: the disk is gone",
    "decay": "decay: expected a number from 0 to 1, got 3.0",
    "other decay": "refresh with decay 0.5, process 1 .*refresh with decay 0.25",
    "spread seed": "the processes have different operators",
    "spread loss": "the processes have different operators",
    "spread data": "the processes have different operators",
    "twice": "OSError: the disk is gone",
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
    "graph of one": "^$",
    "graph of none": "its output carries no graph to the parameters",
}


def check_disagreements(first, second):
    """What goes wrong in one process is an error in all of them."""
    assert first.keys() == second.keys() == BOTH.keys()
    for name, expected in BOTH.items():
        for found in (first[name], second[name]):
            assert re.search(expected, found, re.DOTALL), (name, found)


# steps of process 1 (its five batches, of which one walk counts them; products) after which it kills itself
@pytest.mark.parametrize(
    ("name", "last"), [("swept", 13), ("eigenpairs", 7), *[("cut", 17)] * (torch.__version__ >= LEAST)]
)
def test_killed_processes_that_are_started_again_go_on(name, last, tmp_path):
    """One process kills itself, torchrun starts both again: they go on from files of their own, to the same bits."""
    for report in elastic(2, survivors.main, tmp_path, name, last, restarts=1):
        assert report["restarted"]
        assert report["same"]
        assert report["saved"] > 0 or name == "ekfac"  # whose rows had been kept in memory


def test_a_process_that_is_gone_is_an_error_in_the_others(tmp_path):
    """Killed, or stopped for good: two groups of two, which wait at the same time."""
    pairs, processes = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}, []
    for name, end in pairs.items():
        (tmp_path / name).mkdir()
        processes += [forked().Process(target=lost.main, args=(tmp_path / name, rank, end)) for rank in range(2)]
    try:
        for process in processes:
            process.start()
        for process in processes[::2]:
            process.join(60)
            assert process.exitcode == 0
    finally:
        for process in processes:
            process.kill()
            process.join()
    for name in pairs:
        said, cause, seconds = (tmp_path / name / "said").read_text().splitlines()
        assert re.fullmatch(
            r"RanksError: a process of the group is gone, or did not come within .* timeout \(.+\)\. Start .*", said
        )
        assert cause == "RuntimeError"
        assert float(seconds) < lost.TIMEOUT + 20


def check_bytes(printed):
    """They are those of the formulas."""
    _, *lines = printed.splitlines()
    assert len(lines) == 9
    for line in lines:
        # what goes over the network device besides is that of other tests, too
        given, formula = (int(number.replace(",", "")) for number in line.split()[-4:-2])
        assert given == formula > 0, line


def test_a_share_is_a_part_of_the_data(monkeypatch):
    monkeypatch.setattr(Ranks, "__init__", lambda self, group: vars(self).update(_group=group, number=3, rank=group))
    data, batches = TensorDataset(torch.arange(10)), [[k] for k in range(5)]
    assert [x.item() for rank in range(3) for (x,) in share_of(data, rank)] == list(range(10))
    assert [share_of(batches, rank) for rank in range(3)] == [[[0], [1]], [[2], [3]], [[4]]]
    with pytest.raises(TypeError, match=r"share_of: expected a data set with a length or a list, got generator"):
        share_of((k for k in range(3)), 0)


def test_a_group_must_be_there():
    p = PROBLEMS["mlp"]()
    with pytest.raises(
        RuntimeError, match=r"process_group: torch.distributed is not initialised. Call .* started by torchrun"
    ):
        GGNLinearOperator(*p.args(), process_group=object())


def check_sharded(report):
    """Models that are cut over processes."""
    refused = {
        "loader": "OSError: the disk is gone|RanksError: Determinism check: .* or one failed as it loaded its data",
        "hidden": "RuntimeError: a module of fully_shard gathers its parameters during a computation of curvature",
        "in place": r"RuntimeError: the model changes a parameter in place \(clamp_\), of which fully_shard has parts",
        "data": "RanksError: Determinism check: the processes that have parts of the parameters have different batches",
        "fewer": "RanksError: Determinism check: the processes that have parts of the parameters have different batches",
        "precision": r"TypeError: model_func: fully_shard with MixedPrecisionPolicy\(param_dtype=torch.bfloat16",
        "gathered": "ValueError: model_func: the parameters of FSDPCheckpointed are gathered at the moment",
    }
    found = report.pop("fully_shard, refused")
    assert found.keys() == refused.keys() and all(re.match(refused[key], text) for key, text in found.items()), found
    errors = {
        "flat": "the parameters are cut over processes, and so are vectors: expected a list of 4 DTensors, or a dict",
        "plain": "expected a DTensor for '0.weight', as the parameter is, got Tensor",
        "dense": "to_dense(): the parameters are cut over processes",
        "trace": "the parameters are cut over processes",
        "group": "are cut over processes of this group, or repeated on them (DTensors)",
        "spread": "are cut over processes of this group, or repeated on them (DTensors)",
    }
    for name, value in report.items():
        if name.endswith("errors"):
            assert all(errors[key] in text for key, text in value.items()), value
            assert value.keys() == (errors.keys() if "repeated" not in name else {"group"}), value
        elif name.endswith("share"):
            assert max(value) <= 0.6, name  # of parameters, of products, of what is held of a vector
        else:
            assert value < 1e-12, name
    assert len(report) == 2 * (4 + 3) + 1 + 2 + 2 + 2 + 4 + 8 + 4


PROBLEM = """
import torch
from torch import nn

def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    X, y = torch.randn(11, 3).double(), torch.randint(2, (11,))
    return model, nn.CrossEntropyLoss(), [(X[:4], y[:4]), (X[4:7], y[4:7]), (X[7:], y[7:])]

def failing():
    import os
    model, loss, data = problem()
    if os.environ.get("RANK") == "1":
        data[2] = (data[2][0][:, :2], data[2][1])
    return model, loss, data
"""


SPECTRUM = ("--json", "--matrix", "hessian,fisher,ekfac", "-k", "3", "--density")


def check_spectrum(alone, shared):
    assert shared["result"] == 0, shared["err"]
    for name, one in alone["matrices"].items():
        for key in ("eigenvalues", "density"):
            mine, its = one[key], json.loads(shared["out"])["matrices"][name][key]
            mine, its = (part["at_most_zero"] if key == "density" else part for part in (mine, its))
            assert mine == pytest.approx(its, rel=1e-9, abs=1e-12), (name, key)


def check_failing(failed):
    own = [line for line in failed["err"].splitlines() if line.startswith("curvops spectrum:")]
    assert failed["result"] and len(own) == 1 and "process 1 of 2 failed with RuntimeError" in own[0], failed


def test_two_processes(tmp_path, monkeypatch, capsys):
    (tmp_path / "own.py").write_text(PROBLEM)
    monkeypatch.chdir(tmp_path)
    report, _ = elastic(2, both.main, tmp_path, *SPECTRUM)
    check_disagreements(*report["disagreements"])
    if torch.__version__ >= LEAST:
        check_sharded(report["sharded"])
    else:
        assert re.match(r"TypeError: .*'0.weight' is a DTensor, of which this PyTorch .*2\.13", report["sharded"])
    check_bytes(report["bytes"])
    assert main(["spectrum", "own.py:problem", "--output", "alone", *SPECTRUM]) == 0
    check_spectrum(json.loads(capsys.readouterr().out), report["problem"])
    check_failing(report["failing"])


def test_a_tour_is_shared_by_processes(tmp_path, monkeypatch):
    """As a user would start it, by torchrun."""
    (tmp_path / "own.py").write_text(PROBLEM)
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "curvops"]
    done = subprocess.run([*command, "tour", "own.py:problem", "--output", "shared"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "shared" / "tour.html").exists()
    found = load_matrices(tmp_path / "shared" / "matrices.safetensors").matrices
    problem = load_problem("own.py:problem")
    assert len(found) == 6
    for title, (kind, options) in TOUR.items():
        expected = kind(*problem.arguments, **options, **({"seed": 0} if "mc_samples" in options else {})).to_dense()
        torch.testing.assert_close(found[title], expected, rtol=0, atol=1e-12)
