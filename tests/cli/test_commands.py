"""The commands on a small problem: what they print, write and keep."""

import json
import os
import random
import sys
import warnings
from copy import copy
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

import curvops
from curvops.cli import kfac, main
from curvops.cli.commands import MATRICES
from curvops.cli.matrices import OPERATORS as KNOWN
from curvops.files import read_tensors
from curvops.tour import OPERATORS, load_matrices

PROBLEM = """
import torch
from torch import nn

print("what a file prints")
X, y = torch.linspace(-1, 1, 24).reshape(6, 4), torch.arange(6) % 3


def problem():
    model = nn.Sequential(nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 3))
    return model, nn.CrossEntropyLoss(), [(X[:4], y[:4]), (X[4:], y[4:])]
"""
SIZE = 19


@pytest.fixture
def target(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("mine.py").write_text(PROBLEM)
    return "mine.py:problem"


def document(capsys, *arguments, status=0):
    """The one JSON document of a run, and what it printed on stderr."""
    assert main([*arguments, "--json"]) == status
    printed = capsys.readouterr()
    return json.loads(printed.out), printed.err


def test_the_template_runs_as_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert main(["new", "own.py"]) == 0
    assert "curvops check own.py:problem" in capsys.readouterr().out
    found, _ = document(capsys, "explain", "own.py", "--matrix", "hessian,ekfac")
    assert list(found["matrices"]) == ["hessian", "ekfac"] and found["problem"] == "own.py:problem"
    Path("own.py").write_text("mine")
    assert main(["new", "own.py"]) == 1 and "--force overwrites it" in capsys.readouterr().err
    assert Path("own.py").read_text() == "mine"
    assert document(capsys, "new", "own.py", "--force")[0] == {"file": "own.py", "problem": "own.py:problem"}
    assert "def problem()" in Path("own.py").read_text()


def test_check(target, capsys):
    found, errors = document(capsys, "check", target)
    assert found["ok"] and {row["verdict"] for row in found["rows"]} == {"ok"}
    assert "what a file prints" in errors and "compared with" in errors, "stdout is the document's"


def test_check_says_what_failed_by_its_status(target, capsys):
    text = PROBLEM.replace("    return model,", "    model.insert(0, nn.Dropout())\n    return model,")
    Path("mine.py").write_text(text)
    assert main(["check", target]) == 1
    assert "dropout in train mode" in capsys.readouterr().out


def test_the_tour_of_ones_own_problem(target, capsys, monkeypatch):
    monkeypatch.setattr("curvops.tour.own.draw", lambda *_, **__: None)  # figures and page have tests of their own
    found, errors = document(capsys, "tour", target, "--params", "2.*", "--dtype", "float64")
    assert found["files"] == ["tour/matrices.safetensors"] and "trace" in errors
    (own,) = found["tours"].values()
    assert own["parameters"] == {"2.weight": [3, 2], "2.bias": [3]} and list(own["costs"]) == list(OPERATORS)
    file = load_matrices("tour/matrices.safetensors")
    assert file.matrices["KFAC"].shape == (9, 9) and file.settings["dtype"] == "float64"
    again, _ = document(capsys, "tour", target, "--params", "2.*", "--dtype", "float64")
    assert again["tours"] == found["tours"], "taken from the file, with the same seconds"
    whole = Path("tour/matrices.safetensors").read_bytes()
    Path("tour/matrices.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    _, errors = document(capsys, "tour", target, "--params", "2.*", "--dtype", "float64")
    assert "(it cannot be read: 'tour/matrices.safetensors' is damaged or was edited" in errors
    assert "is computed anew" in errors and torch.equal(
        load_matrices("tour/matrices.safetensors").matrices["KFAC"], file.matrices["KFAC"]
    )


def test_the_tour_of_checkpoints(target, capsys, monkeypatch):
    monkeypatch.setattr("curvops.cli.tour.tour_checkpoints", lambda *given, **named: taken.append((given, named)) or {})
    taken = []
    for name in ("a", "b"):
        Path(f"{name}.pt").write_bytes(b"")
    asked = [
        "tour",
        target,
        "--checkpoint",
        "a.pt",
        "--checkpoint",
        "b.pt",
        "--memory",
        "1MB",
        "--seed",
        "3",
        "--fresh",
    ]
    assert document(capsys, *asked)[0]["tours"] == {}
    ((_, _, _, checkpoints, params), named) = taken[0]
    assert checkpoints == {"a": Path("a.pt"), "b": Path("b.pt")} and len(params) == 4
    assert (named["memory_budget"], named["seed"], named["resume"], named["output"]) == (10**6, 3, False, "tour")
    assert main(["tour", target, "--checkpoint", "c.pt"]) == 2
    assert "--checkpoint: there is no file 'c.pt'." in capsys.readouterr().err


def test_explain_takes_one_batch(target, capsys):
    found, _ = document(capsys, "explain", target, "--params", "2.*", "--dtype", "float64")
    assert list(found["matrices"]) == list(MATRICES) == list(KNOWN)
    assert found["matrices"]["hessian"]["shape"] == [9, 9]
    assert found["matrices"]["hessian"]["rows"]["products"]["choice"] == "reverse over reverse"
    assert [row["names"] for row in found["matrices"]["kfac"]["rows"]] == [["2.weight"], ["2.bias"]]
    assert "batch of 4" in found["matrices"]["kfac"]["explanation"] and "float64" in str(found)


def test_spectrum_is_that_of_the_matrix(target, capsys):
    asked = ["spectrum", target, "-k", "3", "--dtype", "float64", "--vectors", str(SIZE)]
    hessian = document(capsys, *asked)[0]["matrices"]["hessian"]
    kfac = document(capsys, *asked, "--matrix", "kfac", "--no-density")[0]["matrices"]["kfac"]
    module = {}
    exec(PROBLEM, module)
    torch.manual_seed(0)
    model, loss, data = module["problem"]()
    params = dict(model.double().named_parameters())
    data = [(X.double(), y) for X, y in data]
    dense = curvops.HessianLinearOperator(model, loss, params, data).to_dense()
    values = torch.linalg.eigvalsh(dense)
    expected = torch.cat([values[:3], values[-3:]])
    torch.testing.assert_close(torch.tensor(hessian["eigenvalues"], dtype=torch.float64), expected)
    assert hessian["converged"] and max(hessian["residuals"]) < 1e-6 and kfac["reason"] == "structure"
    assert hessian["method"] == hessian["density"]["method"] == "exact, from the matrix" and not hessian["note"]
    assert hessian["density"]["at_most_zero"] == pytest.approx(float((values <= 1e-12).double().mean()))
    assert hessian["density"]["zero_up_to_rounding"] == pytest.approx(float((values.abs() <= 1e-12).double().mean()))
    assert all(Path(figure).stat().st_size > 1000 for figure in hessian["density"]["figures"])
    tensors, about = read_tensors(Path("spectrum/hessian.eigenvalues.safetensors"), "eigenpairs")
    torch.testing.assert_close(dense @ tensors["vectors"], tensors["vectors"] * tensors["values"])
    assert about["settings"]["params"] == list(params) and about["settings"]["method"] == "exact, from the matrix"
    assert 0 < max(kfac["residuals"]) < 1e-12, "what rounding leaves"


def test_results_of_one_method_are_not_those_of_another(target, capsys, monkeypatch):
    asked = ["spectrum", target, "-k", "1", "--matrix", "ggn", "--no-density"]
    assert main(asked) == 0
    monkeypatch.setattr("curvops.cli.spectrum.DENSE", 0)
    assert main(asked) == 1
    assert "(method exact, from the matrix, now Lanczos)" in capsys.readouterr().err


def test_residuals_hold_the_rounding_of_single_precision(target, capsys):
    found = document(capsys, "spectrum", target, "--no-density")[0]["matrices"]["hessian"]
    assert found["method"] == found["reason"] == "exact, from the matrix" and found["converged"]
    assert all(1e-12 < residual < 1e-6 for residual in found["residuals"])


def test_the_spectrum_of_a_large_matrix_has_an_honest_error(target, capsys, monkeypatch):
    asked = ["spectrum", target, "--matrix", "ggn", "-k", "1", "--which", "smallest", "--dtype", "float64"]
    assert main(asked) == 0
    exact = capsys.readouterr().out
    assert "eigenvalues, exact, from the matrix" in exact and "--depth and --vectors are not used" in exact
    true = json.loads(Path("spectrum/spectrum.json").read_text())["matrices"]["ggn"]["density"]
    monkeypatch.setattr("curvops.cli.spectrum.DENSE", 0)
    assert main([*asked, "--depth", "3", "--fresh"]) == 0
    text = capsys.readouterr().out
    assert "more eigenvalues may lie here: single vectors see one of several equal ones" in text
    assert "(start vectors and quadrature)" in text and "not used" not in text
    found = json.loads(Path("spectrum/spectrum.json").read_text())["matrices"]["ggn"]["density"]
    low, high = true["at_most_zero"] - true["zero_up_to_rounding"], true["at_most_zero"]
    assert found["at_most_zero"] - 2 * found["at_most_zero_error"] <= high
    assert found["at_most_zero"] + 2 * found["at_most_zero_error"] >= low and found["method"] == "Lanczos quadrature"


def test_what_is_finished_is_not_computed_again(target, capsys, monkeypatch):
    monkeypatch.setattr("curvops.cli.spectrum._drawn", lambda *_: {})
    monkeypatch.setattr("curvops.cli.spectrum.DENSE", 0)
    asked = ["spectrum", target, "-k", "1", "--matrix", "ggn", "--depth", "4"]
    first, _ = document(capsys, *asked)

    def never(*_, **__):
        raise AssertionError("computed")

    with monkeypatch.context() as patch:
        patch.setattr("curvops.cli.spectrum.operator_of", never)
        again, errors = document(capsys, *asked)
        assert again == first and errors.count("is not computed again") == 2
        assert main([*asked, "--fresh"]) == 1 and "computed" in capsys.readouterr().err
    assert main([*asked[:-1], "5"]) == 1
    errors = capsys.readouterr().err
    assert "'spectrum/ggn.density.safetensors' was computed with other settings (depth 4, now 5)" in errors
    assert "--fresh" in errors and "--output" in errors
    Path("mine.py").write_text(PROBLEM.replace("linspace(-1", "linspace(-2"))
    assert main(asked) == 1
    assert "(other data)" in capsys.readouterr().err
    whole = Path("spectrum/ggn.eigenvalues.safetensors").read_bytes()
    Path("spectrum/ggn.eigenvalues.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert main(asked) == 1
    assert "is damaged or was edited" in capsys.readouterr().err
    Path("spectrum/ggn.eigenvalues.safetensors").write_bytes(b"cut")
    assert main(asked) == 1
    assert "truncated or not a safetensors file" in capsys.readouterr().err
    assert main([*asked, "--fresh"]) == 0


NET = """
import torch
from helpers import scale
from torch import nn

print("imported")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 12).double().reshape(3, 4))
        self.register_buffer("shift", torch.zeros(4).double(), persistent=False)

    def forward(self, x):
        return scale(x["a"] + 2 * x["b"] + self.shift + self.training * 1.0) @ self.weight.T


def problem():
    a, b, y = torch.linspace(-1, 1, 20).double().reshape(5, 4), torch.eye(5, 4).double(), torch.arange(5) % 3
    weight = torch.ones(3).double()
    model, loss = Net().eval(), nn.CrossEntropyLoss(weight=weight)
    return model, loss, [({"a": a, "b": b}, y)]
"""
OTHERWISE = {
    "code of another file": ("", ""),
    "the loss's weights": ("    model, loss =", "    weight[0] += 1e-9\n    model, loss ="),
    "a buffer": ("    return model", "    model.shift[0] += 1e-9\n    return model"),
    "a mode": ("Net().eval()", "Net()"),
    "exchanged columns": ('"a": a, "b": b', '"a": b, "b": a'),
    "other keys": ('{"a": a, "b": b}', '{"b": b, "a": a}'),
}


@pytest.mark.parametrize("command", ["spectrum", "kfac"])
@pytest.mark.parametrize("changed", [*OTHERWISE, "versions"])
def test_nothing_of_another_problem_is_served(changed, command, target, capsys, monkeypatch):
    monkeypatch.setattr("curvops.cli.spectrum._drawn", lambda *_: {})
    helpers = "def scale(x):\n    return x * x.cos()\n"

    def found(status=0):
        for name in [name for name in sys.modules if name in ("helpers", "net") or name.startswith("_problem_in_")]:
            del sys.modules[name]
        sys.path_importer_cache.clear()
        assert main([command, "net.py"]) == status
        return capsys.readouterr().err

    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    Path("net.py").write_text(NET)
    Path("helpers.py").write_text(helpers)
    found()
    assert "not computed again" in found()
    if changed == "versions":
        monkeypatch.setattr("curvops.tour.identity.versions", lambda: {"curvops": "0.0.1"})
    elif OTHERWISE[changed][0]:
        Path("net.py").write_text(NET.replace(*OTHERWISE[changed]))
    else:
        Path("helpers.py").write_text(helpers.replace("cos", "sin"))
    error = found(1)
    assert "was computed with other settings" in error and "not computed again" not in error


def test_all_matrices_of_a_run_are_checked_by_one_pair_of_passes(target, capsys, monkeypatch):
    passes = []
    walk = curvops.EmpiricalRisk.walk
    monkeypatch.setattr(
        curvops.EmpiricalRisk, "walk", lambda self, *given: passes.append(given[0]) or walk(self, *given)
    )
    assert main(["spectrum", target, "--matrix", "hessian,ggn,ef,kfac", "--no-density"]) == 0
    # of the first few data a product tells problems apart
    assert passes.count("Determinism check") == 2 and passes.count("Content") == 2
    assert passes.count("Risk") == 1


def test_an_interrupted_run_goes_on(target, capsys, monkeypatch):
    asked = ["spectrum", target, "-k", "1", "--matrix", "ef,ggn", "--no-density"]
    with monkeypatch.context() as patch:
        patch.setattr(curvops.GGNLinearOperator, "to_dense", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(asked) == 130
    error = capsys.readouterr().err
    assert error == "curvops spectrum: interrupted; kept spectrum/ef.eigenvalues.safetensors\n"
    found, errors = document(capsys, *asked)
    assert list(found["matrices"]) == ["ef", "ggn"] and errors.count("is not computed again") == 1
    assert not list(Path("spectrum").glob("*.part"))


@pytest.mark.parametrize("name", ["kfac", "ekfac"])
def test_kfac_is_kept_and_loads(name, target, capsys):
    asked = ["kfac", target, "--fisher-type", "type-2", "--dtype", "float64", *["--ekfac"] * (name == "ekfac")]
    found, _ = document(capsys, *asked)
    operator = curvops.load(found["file"])
    assert found["file"] == f"kfac/{name}.safetensors" and found["shape"] == [SIZE, SIZE] == list(operator.shape)
    assert found["trace"] == pytest.approx(float(operator.trace())) and found["bytes"] > 0
    assert "0.weight" in found["explanation"] and operator.dtype == torch.float64
    changed = Path(found["file"]).stat().st_mtime_ns
    assert document(capsys, *asked)[0] == found and Path(found["file"]).stat().st_mtime_ns == changed
    assert main([*asked, "--seed", "1"]) == 1
    assert "seed 0, now 1, other weights" in capsys.readouterr().err
    whole = Path(found["file"]).read_bytes()
    for other in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1])):  # cut, and a bit changed
        Path(found["file"]).write_bytes(other)
        assert main(asked) == 1
        assert f"'kfac/{name}.safetensors' was edited or cut since" in capsys.readouterr().err
    Path(found["file"]).with_suffix(".json").unlink()
    assert main(asked) == 1 and "--fresh computes it anew" in capsys.readouterr().err
    assert main([*asked, "--fresh", "--batches", "1"]) == 0
    assert f"kfac/{name}.safetensors" in capsys.readouterr().out


@pytest.mark.parametrize(("moment", "status"), [("digest", 0), ("json_text", 1)])
def test_factors_of_two_runs_at_once_are_not_taken_for_each_other(moment, status, target, capsys, monkeypatch):
    original, others = getattr(kfac, moment), []

    def late(given):
        if not others:
            others.append("another run, which writes in between")
            assert main(["kfac", target, "--fisher-type", "type-2", "--fresh"]) == 0
        return original(given)

    monkeypatch.setattr(kfac, moment, late)
    assert main(["kfac", target]) == 0
    assert main(["kfac", target]) == status, "its own factors, or none"
    assert ("or another run replaced it" in capsys.readouterr().err) == (status == 1)


def test_factors_that_cannot_be_written_leave_the_file_before(target, capsys, monkeypatch):
    assert main(["kfac", target]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        assert main(["kfac", target, "--fresh"]) == 1
    assert "No space left on device: 'kfac/kfac.safetensors'" in capsys.readouterr().err
    assert main(["kfac", target]) == 0 and "is not computed again" in capsys.readouterr().err


def test_nothing_outlives_a_run(target, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("MPLBACKEND")
    text = PROBLEM.replace("    model =", "    random.seed(1), np.random.seed(1)\n    model =")
    (tmp_path / "elsewhere").mkdir()
    Path("elsewhere/mine.py").write_text(
        f"import random, torch\nimport numpy as np\ntorch.set_default_dtype(torch.float64)\n{text}"
    )
    torch.set_num_threads(2)

    def state():
        drawn = [torch.get_rng_state().tolist(), random.getstate(), np.random.mtrand._rand.get_state()[1].tolist()]
        own = [
            *map(copy, (sys.path, os.environ.get("MPLBACKEND"), warnings.filters)),
            torch.get_num_threads(),
            torch.get_default_dtype(),
            plt.get_fignums(),
        ]
        return [*drawn, *own, id(sys.stdout)]

    def open_files():
        return len(list(Path("/proc/self/fd").iterdir()))

    asked = ["elsewhere/mine.py", "--threads", "3", "--seed", "5"]
    before = state()
    assert main(["spectrum", *asked, "-k", "1"]) == 0
    opened = open_files()  # some once and for all, such as those of fonts
    assert main(["spectrum", *asked, "-k", "1", "--fresh", "--json"]) == 0
    assert main(["spectrum", *asked, "-k", "100"]) == 2
    assert main(["kfac", *asked, "--output", "elsewhere/mine.py"]) == 1
    assert state() == before
    assert open_files() == opened
