"""What a command does to its process, and what the user's code may do to it: streams, signals, folder."""

import ctypes
import io
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from curvops.cli import main

FILE = """
import ctypes, os, signal, subprocess
from pathlib import Path
import torch
from torch import nn

X, y = torch.linspace(-1, 1, 24).reshape(6, 4), torch.arange(6) % 3
def good(): return nn.Linear(4, 3), nn.CrossEntropyLoss(), [(X, y)]

def prints():
    print("by Python", flush=True)
    os.write(1, b"by the system\\n")
    subprocess.run(["echo", "by another process"])
    ctypes.CDLL(None).puts(b"by C code")
    return good()

def moves():
    os.chdir("elsewhere")
    return good()

class Waits(nn.Linear):
    def forward(self, x):
        Path("out").mkdir(exist_ok=True)
        os.kill(os.getpid(), signal.SIGTERM)
        return super().forward(x)

def waits(): return Waits(4, 3), nn.CrossEntropyLoss(), [(X, y)]
"""


@pytest.fixture(autouse=True)
def _files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("file.py").write_text(FILE, encoding="utf-8")


def test_stdout_is_the_documents_whoever_prints(capfd):
    assert main(["explain", "file.py:prints", "--matrix", "ggn", "--json"]) == 0
    ctypes.CDLL(None).fflush(None)
    printed = capfd.readouterr()
    assert list(json.loads(printed.out)["matrices"]) == ["ggn"]
    for who in ("Python", "the system", "another process", "C code"):
        assert f"by {who}\n" in printed.err
    os.write(1, b"afterwards\n")
    assert capfd.readouterr().out == "afterwards\n"


@pytest.mark.parametrize("more", [[], ["--json"]], ids=["text", "JSON"])
def test_a_stream_of_few_signs_is_no_failure(more, monkeypatch):
    with io.TextIOWrapper(io.BytesIO(), encoding="ascii") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(["explain", "file.py:good", "--matrix", "ggn", *more]) == 0
        printed = stream.buffer.getvalue().decode("ascii")
        assert stream.errors == "strict"
    if more:
        assert "GGN" in json.loads(printed)["matrices"]["ggn"]["explanation"]
    else:
        assert "15 \\xd7 15" in printed


@pytest.mark.parametrize("command", ["kfac", "spectrum"])
def test_files_go_where_the_command_began(command, tmp_path, capsys):
    Path("elsewhere").mkdir()
    assert main([command, "file.py:moves", "--output", "out", *["--no-density"] * (command == "spectrum")]) == 0
    assert list((tmp_path / "out").iterdir()) and not list((tmp_path / "elsewhere").iterdir())
    assert Path.cwd() == tmp_path
    if command == "kfac":
        assert str(tmp_path / "out" / "kfac.safetensors") in capsys.readouterr().out


def test_the_tours_files_go_where_the_command_began(tmp_path, monkeypatch):
    monkeypatch.setattr("curvops.tour.own.draw", lambda *_, **__: None)
    Path("elsewhere").mkdir()
    assert main(["tour", "file.py:moves", "--output", "out"]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["matrices.safetensors"]


def test_sigterm_ends_a_command_as_an_interruption_does(capsys):
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert main(["kfac", "file.py:waits"]) == 143
    assert capsys.readouterr().err == "curvops kfac: terminated; kept nothing\n"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_sigterm_amid_a_write_leaves_no_unfinished_file(capsys, monkeypatch):
    def killed(path, content):
        with path.open("wb") as file:
            file.write(content[:10])
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Path, "write_bytes", killed)
    assert main(["kfac", "file.py:good", "--output", "out"]) == 143
    assert list(Path("out").iterdir()) == []


def test_the_callers_own_handler_stays(capsys):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append("SIGTERM"))
    try:
        assert main(["explain", "file.py:waits", "--matrix", "ggn"]) == 0
        assert seen and signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def test_an_interruption_while_importing_is_told(capsys, monkeypatch):
    def interrupted(name):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("curvops.cli.session.import_module", interrupted)
        assert main(["explain", "file.py:good"]) == 130
    assert capsys.readouterr().err == "curvops explain: interrupted; kept nothing\n"
    with monkeypatch.context() as patch:
        patch.setattr("curvops.cli.commands.Session", lambda *_: interrupted(""))
        assert main(["explain", "file.py:good"]) == 130
    assert capsys.readouterr().err.strip() == "curvops: interrupted"
