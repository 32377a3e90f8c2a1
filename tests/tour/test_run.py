"""The tour leaves what it promises, looks at the folder first, and survives an interruption."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from curvops import cli
from curvops.cli.commands import SETUPS
from curvops.tour import OPERATORS, Finished, OutputError, load_matrices, run_tour, tutorial
from curvops.tour.compute import MATRICES
from curvops.tour.files import prepare_output
from curvops.tour.matrices import each_matrix
from curvops.tour.setups import SIZES

FIGURES = [f"curvature_matrices{kind}.{suffix}" for kind in ("", "_log_abs") for suffix in ("pdf", "png")]
COMMAND = [sys.executable, "-m", "curvops", "tour"]
ROOT = Path(__file__).parents[2]


def test_the_whole_tour(tmp_path, capsys):
    assert cli.main(["tour", "--output", str(tmp_path / "new" / "tour")]) == 0
    output = tmp_path / "new" / "tour"
    folders = [output, output / "digits" / "before", output / "digits" / "after"]
    printed = capsys.readouterr().out
    assert printed.startswith("Curvature matrices of tutorial, digits on ")
    assert f"; page: {output / 'digits' / 'tour.html'}\n" in printed
    assert "Total parameters: 683\nLayer parameters: [112, 0, 404, 0, 37, 0, 130]\n" in printed
    for folder, size in zip(folders, [683, 830, 830], strict=True):
        files = {path.name for path in folder.iterdir() if path.is_file()}
        assert files == {*FIGURES, MATRICES, *(["tour.html"] if folder == output else [])}
        assert all((folder / name).stat().st_size < 2_000_000 for name in FIGURES if name.endswith("pdf"))
        found = load_matrices(folder / MATRICES)
        assert list(found.matrices) == list(OPERATORS)
        assert all(matrix.shape == (size, size) and matrix.isfinite().all() for matrix in found.matrices.values())
        assert sum(found.groups.values()) == size
        assert sum(torch.Size(shape).numel() for shape in found.parameters.values()) == size
    assert 1e6 < (output / "tour.html").stat().st_size < 25e6 and (output / "digits" / "tour.html").is_file()
    for title in ("(determinism check)", *OPERATORS):
        rows = re.findall(rf"^{re.escape(title)} +(\d+\.\d+) +(\d+\.\d|unknown)\b", printed, re.MULTILINE)
        assert len(rows) == 3, f"one row of {title!r} for each setup"
    before, after = (load_matrices(folder / MATRICES).matrices for folder in folders[1:])
    gap = [(m["Hessian"] - m["Generalized Gauss-Newton"]).norm() / m["Hessian"].norm() for m in (before, after)]
    assert gap[1] < 0.5 * gap[0], "training moves the Hessian towards the GGN"


def test_matrices_are_those_of_the_risk():
    setup = tutorial(dtype=torch.float64)
    found = {result.title: result for result in each_matrix(setup.risk(), titles=["Hessian", "KFAC", "EKFAC"])}
    images, labels = map(torch.cat, zip(*setup.data, strict=True))

    def risk(last: torch.Tensor) -> torch.Tensor:
        params = {**setup.params, "6.bias": last}
        return setup.loss(torch.func.functional_call(setup.model, params, (images,)), labels)

    expected = torch.autograd.functional.hessian(risk, setup.params["6.bias"].detach())
    for title, tolerance in (("Hessian", 1e-10), ("EKFAC", 0.3), ("KFAC", 0.3)):
        block = found[title].matrix[-5:, -5:]
        assert (block - expected).norm() <= tolerance * expected.norm(), title
        assert found[title].cost.seconds > 0
        assert found[title].cost.peak_bytes is None or found[title].cost.peak_bytes >= 0


def test_a_seed_repeats_the_tour_and_names_are_checked(tmp_path):
    runs = [each_matrix(tutorial(seed=s).risk(), titles=["Monte-Carlo Fisher"], seed=s) for s in (0, 0, 1)]
    first, again, other = (next(run).matrix for run in runs)
    assert torch.equal(first, again) and not torch.allclose(first, other)
    with pytest.raises(ValueError, match=re.escape("must be some of ['tutorial', 'digits'], got ['mnist']")):
        run_tour(tmp_path / "tour", setups=["mnist"])
    assert not (tmp_path / "tour").exists()


def test_the_command_line_knows_every_setup(capsys):
    assert tuple(SIZES) == SETUPS
    for wrong in (["tour", "--setups", "mnist"], ["tour", "--setups", ","], ["tour", "--dtype", "int8"], []):
        assert cli.main(wrong) == 2
    assert "'mnist' is not a comma-separated choice of tutorial, digits" in capsys.readouterr().err


def test_a_missing_extra_is_named(monkeypatch, capsys, tmp_path):
    for name in [name for name in sys.modules if name.startswith(("curvops.tour", "curvops.cli."))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["tour", "--output", str(tmp_path / "tour")]) == 1
    error = capsys.readouterr().err
    assert error == "curvops tour: it needs matplotlib: pip install 'curvops[tour]'\n"


def test_interrupted_it_keeps_what_is_finished(tmp_path):
    process = subprocess.Popen(
        [*COMMAND, "--output", str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # tests that run in a shell's background are told to ignore Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / MATRICES).exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    found = load_matrices(tmp_path / MATRICES)
    assert process.returncode == 130
    assert len(error.splitlines()) == 1
    assert error.startswith(f"curvops tour: interrupted; kept {', '.join(found.matrices)} in {tmp_path / MATRICES}")
    assert list(found.matrices) == list(OPERATORS)[: len(found.matrices)]
    assert not list(tmp_path.rglob("*.part"))


def test_interrupted_before_anything_is_finished(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("curvops.tour.compute.each_matrix", Mock(side_effect=KeyboardInterrupt))
    assert cli.main(["tour", "--output", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "curvops tour: interrupted; kept nothing\n"
    assert str(Finished({Path("a/b"): ["H", "F"]}, [Path("c"), Path("d")])) == "H, F in a/b; 2 figures"


def test_a_closed_or_full_folder_is_refused_before_any_work(tmp_path):
    full, closed = tmp_path / "full", tmp_path / "closed"
    full.mkdir()
    closed.mkdir(mode=0o555)
    code = f"""
import contextlib, os, resource, sys
from curvops.cli import main
# once before: this project may lie in a folder of which nobody else may import anything
with contextlib.redirect_stderr(open(os.devnull, "w")): main(["tour", "--output", os.devnull])
# the system itself refuses to write more than a megabyte, as a full disk would
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
failed = main(["tour", "--output", {str(full)!r}])
if os.geteuid() == 0: os.setgid(65534); os.setuid(65534)
sys.exit(failed and main(["tour", "--output", {str(closed)!r}]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stdout == "", done
    reasons = {full: "File too large", closed: "Permission denied"}
    for (folder, reason), line in zip(reasons.items(), done.stderr.splitlines(), strict=True):
        assert re.fullmatch(rf"curvops tour: cannot write \d+ [MG]B to '{folder}': {reason}", line), done.stderr
        assert list(folder.iterdir()) == []


def test_a_file_in_the_place_of_the_folder_is_refused_and_folders_made_for_nothing_are_removed(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("something")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputError, match=re.escape(f"cannot write 10 B to '{folder}': Not a directory")):
            prepare_output(folder, 10)
    assert (tmp_path / "file").read_text() == "something"
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(28, os.strerror(28))))
    with pytest.raises(OutputError, match="No space left on device"):
        prepare_output(tmp_path / "a" / "b", 10)
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]
