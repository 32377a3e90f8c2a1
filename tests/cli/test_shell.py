"""What a shell shows of the commands: help, completion, and what is imported for it."""

import subprocess
import sys

import pytest
import torch

import curvops
from curvops.cli import main
from curvops.cli.commands import curvops as group


@pytest.mark.parametrize("name", sorted(group.commands))
def test_help_teaches_by_example(name, capsys):
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    examples = text.partition("Examples:")[2].partition("\n\n")[0].strip().splitlines()
    assert len(examples) in (2, 3) and all(line.strip().startswith(f"curvops {name}") for line in examples)
    for line in examples:
        words = line.partition(" | ")[0].replace("'", "").split()[2:]
        group.commands[name].make_context(name, words)  # its options are there


def test_help_and_version_need_no_pytorch():
    code = (
        "import sys\nfrom curvops.cli import main\nassert main(['--help']) == main(['--version']) == 0\n"
        "assert main(['spectrum', '--help']) == 0 and 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "\ncurvops " in done.stdout and f"PyTorch {torch.__version__.partition('+')[0]}" in done.stdout


def test_without_click_one_line_says_what_to_install(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("curvops.cli.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "click", None)
    assert main(["--help"]) == 1
    assert capsys.readouterr().err == "curvops: the command line needs click: pip install 'curvops[tour]'\n"


def test_shells_complete(monkeypatch, capsys):
    monkeypatch.setenv("_CURVOPS_COMPLETE", "bash_complete")
    for words, expected in (("curvops sp", "plain,spectrum"), ("curvops kfac --ek", "plain,--ekfac")):
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
        with pytest.raises(SystemExit):
            main(words.split()[1:])
        assert capsys.readouterr().out.strip() == expected


def test_names_are_imported_when_they_are_used():
    assert set(curvops.__all__) == set(curvops._HOMES) <= set(dir(curvops))
    assert "tour" in dir(curvops)
    assert all(getattr(curvops, name).__name__ == name for name in curvops.__all__)
    assert curvops.solvers.__name__ == "curvops.solvers"
    with pytest.raises(AttributeError, match="no attribute 'Hesian'"):
        _ = curvops.Hesian
