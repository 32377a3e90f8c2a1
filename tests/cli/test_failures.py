"""What a hostile user sees: one line with the remedy, or the traceback of their own file, and the exit status."""

import os
import subprocess
import sys
import warnings
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

import curvops
from curvops.cli import main
from curvops.cli.problem import load_problem
from curvops.cli.results import problem_settings
from curvops.tour.identity import differences

FILE = """
import sys
import torch
from torch import nn

X, y = torch.linspace(-1, 1, 24).reshape(6, 4), torch.arange(6) % 3
CE = nn.CrossEntropyLoss()
constant = 3


def net():
    return nn.Sequential(nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 3))

def good(): return net(), CE, [(X, y)]
def pair(): return net(), CE, (X, y)
def nothing(): pass
def two(): return net(), CE
def order(): return CE, [(X, y)], net()
def needs(model): return model
def breaks(): return undefined_name
def ends(): sys.exit(3)
def nan(): return net(), CE, [(X, y), (X, y), (X / 0, y)]  # infinities
def double(): return net().double(), CE, [(X, y)]
def shape(): return nn.Linear(5, 3), CE, [(X, y)]
def function(): return net(), lambda z, t: nn.functional.cross_entropy(z, t), [(X, y)]
def stated(): return {"model": net(), "loss": lambda z, t: nn.functional.cross_entropy(z, t), "data": [(X, y)], "reduction": "mean"}
def keys(): return {"model": net(), "los": CE, "data": [(X, y)]}
def lacks(): return {"model": net(), "data": [(X, y)]}
def frozen(): return net().requires_grad_(False), CE, [(X, y)]
def listed(): return net(), CE, [(X, y)], [1]
def lonely(): return lambda params, X: X @ params["w"], CE, [(X, y)]
def functional(): return lambda params, X: X @ params["w"], CE, [(X, y)], {"w": torch.ones(4, 3)}
def dicts(): return net(), CE, [{"x": X, "y": y}]
def walked(): return net(), CE, iter([(X, y)])
def elsewhere(): return nn.Linear(4, 3, device="meta"), CE, [(X, y)]
class Mine(nn.Linear):
    def forward(self, x):
        return super().forward(x) + self.missing

def mine(): return Mine(4, 3), CE, [(X, y)]
class Own(nn.Module):
    def forward(self, z, t):
        return nn.functional.cross_entropy(z, t)

def module(): return net(), Own(), [(X, y)]
def large(): return nn.Linear(2000, 3), CE, [(torch.ones(2, 2000), y[:2])]
def dropped(): return nn.Sequential(nn.Dropout(), nn.Linear(4, 3)), CE, [(X, y)]
def copied():
    model = net()
    return model, CE, [(X, y)], dict(model.state_dict())

class Named(nn.Linear):
    def forward(self, x):
        return {"logits": super().forward(x)}

class Leaves(nn.Linear):
    def forward(self, x): sys.exit(0)

def leaves(): return Leaves(4, 3), CE, [(X, y)]
class Gone(nn.Linear):
    def forward(self, x):
        raise GeneratorExit("gone")

def gone(): return Gone(4, 3), CE, [(X, y)]
def unwrapped(): return Named(4, 3), CE, [(X, y)]
def unwritten(): return net(), CE, torch.load("weights.pt")
def gpu(): raise AssertionError("Torch not compiled with CUDA enabled")  # as a CPU's build says
def others(): return net().load_state_dict({})
def hollow(): return lambda params, X: X @ params["w"], CE, [(X, y)], {"w": torch.ones(4, 0).requires_grad_()}
def wide(): return net(), nn.MSELoss(), [(X, torch.zeros(6, 3))] * 3
"""
RETURNS = "model, loss and data (and params by name, if only some), or a dict with these keys"
ONE_LINE = [
    ("check gone.py:good", 1, "there is no file 'gone.py'; 'curvops new gone.py' writes one"),
    ("check fil.py:good", 1, "there is no file 'fil.py'; near: file.py"),
    ("check gone.part:good", 1, "there is no module 'gone', neither here nor installed; is this the folder that it is in?"),
    ("check fiel:good", 1, "there is no module 'fiel', neither here nor installed; near: file.py"),
    ("check a/b:good", 1, "'a/b' is neither a file nor a module; expected FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION"),
    ("check file.py:goood", 1, "'file.py' has no function 'goood'; did you mean 'good'? there are: net, good, pair"),
    ("check file.py", 1, "'file.py' has no function 'problem'; "),
    ("check file.py:constant", 1, "'file.py:constant': expected a function without arguments, got an int"),
    ("check file.py:needs", 1, "'file.py:needs' cannot be called without arguments (missing a required argument: 'model')"),
    ("check file.py:nothing", 1, f"'file.py:nothing' returned a NoneType; expected {RETURNS}"),
    ("check file.py:two", 1, f"'file.py:two' returned a tuple of 2; expected {RETURNS}"),
    ("check file.py:order", 1, "'file.py:order' returned a list as loss; expected, in this order, model, loss and data"),
    ("check file.py:ends", 1, "'file.py:ends' ended the program (SystemExit); it must return model"),
    ("check ends.py:x", 1, "importing 'ends.py' ended the program (SystemExit). Put what is run under if __name__"),
    ("check file.py:keys", 1, "'file.py:keys' returned a dict with unknown keys 'los'; there are model, loss, data, params"),
    ("check file.py:lacks", 1, "'file.py:lacks' returned a dict without 'loss'; expected model"),
    ("check file.py:listed", 1, "'file.py:listed' returned a list as params; expected a dict such as"),
    ("check file.py:lonely", 1, "returned a function as model; then params, by name, must be returned as well"),
    ("check file.py:function", 1, "loss_func: the reduction of '<lambda>' is not known. Return a dict with the keys"),
    ("check file.py:frozen", 2, "no parameter requires a gradient: all are frozen. Pass --params '*' to take them all."),
    ("check file.py:dicts", 1, "data: expected batches (X, y), got a dict with keys ['x', 'y']. Return pairs"),
    ("check file.py:walked", 1, "data: got a list_iterator, which can be walked only once"),
    ("check file.py:elsewhere", 1, "the model's parameters are on the meta device: they have no values. Load its weights"),
    *((f"{command} file.py:hollow", 1, "'file.py:hollow': the parameters 'w' have 0 entries, so that") for command in ("check", "kfac", "spectrum", "tour")),
    ("kfac file.py:nan", 1, "data: the loss (nan) or its gradient is not finite, from batch 2 on (counted from 0)."),
    ("spectrum file.py:nan --json", 1, "data: the loss (nan) or its gradient is not finite, from batch 2 on"),
    ("kfac file.py:double", 1, "--dtype float32 or float64 brings model, loss and data to one precision"),
    ("explain file.py:shape", 1, "RuntimeError: mat1 and mat2 shapes cannot be multiplied (6x4 and 5x3) (--traceback shows where)"),
    ("check file.py:good --device cuda:99", 2, "--device: there is no device 'cuda:99' here; there are: cpu"),
    ("check file.py:good --device tpu", 2, "--device: there is no device 'tpu' here; there are: cpu"),
    ("check file.py:good --params layer4.*", 2, "--params: no parameter's name matches 'layer4.*'; there are '0.weight'"),
    ("check file.py:good --params 2", 2, "--params: no parameter's name matches '2'; near: '2.*'."),
    ("check file.py:good --dtype int8", 2, "'int8' is not one of 'float32', 'float64'"),
    ("kfac file.py:good --memory lots", 2, "'--memory': expected a size with its unit, e.g. 2GB or 500MiB, got 'lots'"),
    ("kfac file.py:good --memory 0", 2, "2GB or 500MiB, got '0'"),
    ("kfac file.py:good --memory 2", 2, "expected a size with its unit, e.g. 2GB or 500MiB, got '2'."),
    ("kfac file.py:good --memory 1e400GB", 2, "expected a size with its unit, e.g. 2GB or 500MiB, got '1e400GB'."),
    ("kfac file.py:good --memory 1e999", 2, "2GB or 500MiB, got '1e999'."),
    ("kfac file.py:good --batches 99999999999999999999999", 2, "'--batches': 99999999999999999999999 is not in the range 1<=x<="),
    ("kfac file.py:good --output=", 2, "'--output': expected the name of a folder, got ''; the current one is '.'."),
    ("explain file.py:leaves", 1, "your code ended the program in line 57 of file.py (SystemExit); it must return, or raise an error"),
    ("spectrum file.py:large --memory 1kB", 1, "are needed. Raise --memory, or ask for fewer pairs."),
    ("kfac file.py:dropped", 1, "dropout in train mode (1 modules, the first Dropout(p=0.5, inplace=False)). Call model.eval() in your function"),
    ("check file.py:module", 1, "the reduction of 'Own' is not known. Return a dict with the keys model, loss, data and reduction"),
    ("check file.py:copied", 1, "'0.weight', '0.bias', '2.weight', '2.bias' are not the tensors of the model, but others"),
    ("kfac file.py:good --fisher-type forward-only --ekfac", 1, "fisher_type: 'forward-only' takes no gradients"),
    ("kfac file.py:good --output file.py", 1, "cannot write to 'file.py': Not a directory"),
    ("spectrum file.py:good --matrix hesian", 2, "'hesian' is not a comma-separated choice of hessian, ggn, ef"),
    ("spectrum file.py:good -k 20", 2, "-k: the matrix has 19 eigenvalues, one for each parameter; got 20."),
    ("tour file.py:good --setups digits", 2, "--setups chooses among built-in models, and 'file.py:good' is"),
    ("tour --params x", 2, "--params belongs to a problem of your own: curvops tour MODULE:PROBLEM --params."),
    ("new mine", 1, "'mine' must end in .py, for instance 'mine.py'"),
    ("new gone/mine.py", 1, "there is no folder 'gone'; make it first"),
    ("check", 2, "Missing argument 'MODULE:PROBLEM'."),
    ("chek", 2, "No such command 'chek'."),
    ("check file.py:good --jsn", 2, "No such option '--jsn'"),
]  # fmt: skip
TRACEBACKS = [
    ("file.py:breaks", "'file.py:breaks' failed in line LINE of file.py: NameError: name 'undefined_name'", "in breaks", "NameError: name"),
    ("file.py:mine", "your code failed in line LINE of file.py: AttributeError: 'Mine' object has no attribute 'missing'", "in forward", "AttributeError"),
    ("file.py:gone", "your code failed in line LINE of file.py: GeneratorExit: gone", "in forward", "GeneratorExit"),
    ("syntax.py:x", "importing 'syntax.py' failed in line 1 of syntax.py: SyntaxError", 'syntax.py", line 1', "SyntaxError"),
    ("imports.py:x", "importing 'imports.py' failed in line 1 of imports.py: ModuleNotFoundError: No module named 'not_there'. Try: installing it", "in <module>", "No module named 'not_there'"),
    ("file.py:unwritten", "'file.py:unwritten' failed in line LINE of file.py: FileNotFoundError: [Errno 2] No such file or directory: 'weights.pt'. Try: a path that holds", "in unwritten", "weights.pt"),
    ("file.py:gpu", "'file.py:gpu' failed in line LINE of file.py: AssertionError: Torch not compiled with CUDA enabled. Try: leave model and data on the CPU; --device moves them", "in gpu", "CUDA"),
    ("file.py:others", "'file.py:others' failed in line LINE of file.py: RuntimeError: Error(s) in loading state_dict for Sequential. Try: the weights of this very model", "in others", "Missing key"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name, text in {"file": FILE, "syntax": "def x(:", "imports": "import not_there", "ends": "exit()"}.items():
        Path(f"{name}.py").write_text(text)


@pytest.mark.parametrize(("line", "status", "expected"), ONE_LINE, ids=[line for line, *_ in ONE_LINE])
def test_one_line_and_the_remedy(line, status, expected, capsys):
    assert main(line.split()) == status
    printed = capsys.readouterr()
    assert len(printed.err.splitlines()) == 1 and printed.out == ""
    assert expected in printed.err
    assert printed.err.startswith(f"curvops {line.split()[0]}: " if line != "chek" else "curvops: ")


@pytest.mark.parametrize(("target", "first", "where", "last"), TRACEBACKS, ids=[case[0] for case in TRACEBACKS])
def test_a_traceback_of_the_users_own_code(target, first, where, last, capsys):
    code = {
        "breaks": "undefined_name",
        "mine": "self.missing",
        "gone": "GeneratorExit",
        "unwritten": "torch.load(",
        "gpu": "AssertionError(",
        "others": "({})",
    }
    own = [k for k, line in enumerate(FILE.splitlines(), 1) if code.get(target.partition(":")[2], "no") in line]
    first = first.replace("LINE", str(own[0] if own else ""))
    assert main(["explain", target]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(f"curvops explain: {first}") and any(last in line for line in lines[1:])
    assert any(where in line for line in lines) and not any("curvops/" in line for line in lines)
    assert main(["explain", target, "--traceback"]) == 1
    assert "curvops/cli/session.py" in capsys.readouterr().err


def test_code_to_copy_keeps_its_lines(capsys):
    assert main(["explain", "file.py:unwrapped"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("curvops explain: ") and "    class Wrapped(torch.nn.Module):" in lines
    assert lines[-1].startswith("            return self.model(X)")


def test_a_missing_module_is_looked_for_below_packages(capsys):
    Path("package").mkdir()
    Path("package/part.py").write_text(FILE)
    assert main(["check", "package.pat:good"]) == 1
    assert "no module 'package.pat', neither here nor installed; near: package/part.py" in capsys.readouterr().err
    assert load_problem("package.part:good").target == "package.part:good"


def test_what_is_asked_for_is_what_is_taken():
    problem = load_problem("file.py:wide", dtype="float64", params=("2.*", "0.bias"), batches=2, seed=3, threads=2)
    assert list(problem.params) == ["0.bias", "2.weight", "2.bias"] and len(problem.data) == 2
    assert {p.dtype for p in problem.params.values()} == {X.dtype for X, _ in problem.data} == {torch.float64}
    assert torch.equal(problem.params["0.bias"], load_problem("file.py:wide", seed=3).params["0.bias"].double())
    assert not torch.equal(problem.params["0.bias"], load_problem("file.py:wide").params["0.bias"].double())
    assert float(problem.risk.value()) > 0 and torch.get_num_threads() == 2
    assert len(load_problem("file.py:pair").data) == 1
    assert load_problem("file.py:stated").risk.loss.reduction == "mean"
    assert load_problem("file.py:frozen", params=("*.bias",)).risk.space.dim == 5
    assert load_problem("file.py:functional", dtype="float64").risk.space.dtype == torch.float64


def test_a_problem_is_known_by_what_is_asked():
    def settings_of(name="good", **given):
        return problem_settings(load_problem(f"file.py:{name}", **given))

    first = settings_of()
    assert not differences(first, settings_of()) and not differences(settings_of("stated"), settings_of("stated"))
    assert differences(first, settings_of(seed=1)) == ["other weights"]
    assert differences(first, settings_of(params=("0.*",))) == ["other params", "other weights", "other model"]
    assert differences(settings_of("wide"), settings_of("wide", batches=1)) == ["other data"]


def test_warnings_are_one_line(capsys):
    text = FILE.replace("nn.Tanh()", "nn.BatchNorm1d(2)")
    Path("file.py").write_text(text)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert main(["explain", "file.py:good", "--matrix", "ggn"]) == 0
    errors = capsys.readouterr().err.splitlines()
    (line,) = [line for line in errors if line.startswith("curvops explain: warning: model: batch norm in train mode")]
    assert line.endswith("Call model.eval(), or return all data in one batch.")


@pytest.mark.parametrize("more", [[], ["--json"]], ids=["text", "JSON"])
def test_advice_is_for_the_shell(more, capsys):
    asked = ["explain", "file.py:large", "--matrix", "hessian,ekfac", "--fisher-type", "type-2", "--params", "weight"]
    assert main([*asked, *more]) == 0
    printed = capsys.readouterr().out
    assert (
        "less memory: fewer parameters, with --params" in printed and "(--memory), the data is swept again" in printed
    )
    assert "2 where many are taken" in printed
    assert not any(python in printed for python in ("memory_budget", "rule=", "linearized()", "fisher_type="))


def test_warnings_of_others_are_as_they_are(capsys):
    text = FILE.replace(
        "def good():", "import warnings\ndef good():\n    warnings.warn('Pass it by memory_budget=.')\n   "
    )
    Path("file.py").write_text(text)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert main(["explain", "file.py:good", "--matrix", "ggn"]) == 0
    assert "curvops explain: warning: Pass it by memory_budget=.\n" in capsys.readouterr().err


def test_who_reads_may_go_away(monkeypatch, tmp_path, capsys):
    class Closed:
        def write(self, _):
            raise BrokenPipeError(32, "Broken pipe")

        def flush(self):
            return None

        def fileno(self):
            return self.file.fileno()

    closed = Closed()
    open_files = len(list(Path("/proc/self/fd").iterdir()))
    with (tmp_path / "pipe").open("w") as closed.file:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", closed)
            assert main(["new", "read.py"]) == 1
        assert capsys.readouterr().err == ""  # it is no failure to be told
        # where what is flushed at the end goes
        assert os.path.samestat(os.fstat(closed.fileno()), Path(os.devnull).stat())
    assert len(list(Path("/proc/self/fd").iterdir())) == open_files


def test_a_pipe_whose_reader_has_gone():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "curvops", "new", "piped.py"]
    environment = {**os.environ, "PYTHONPATH": str(Path(curvops.__file__).parents[1])}
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120, env=environment)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "") and Path("piped.py").exists()


@pytest.mark.parametrize("command", ["tour", "kfac", "spectrum"])
def test_what_is_refused_leaves_no_folder(command, capsys):
    assert main([command, "file.py:nan", "--output", "deep/out"]) == 1
    assert "is not finite" in capsys.readouterr().err and not Path("deep").exists()


def test_a_full_disk_is_told_in_words_and_leaves_no_folder(capsys, monkeypatch):
    full = Mock(side_effect=OSError(28, "No space left on device", "kfac/kfac.safetensors"))
    monkeypatch.setattr("curvops.cli.kfac.replace_atomically", full)
    assert main(["kfac", "file.py:good"]) == 1
    assert capsys.readouterr().err == "curvops kfac: No space left on device: 'kfac/kfac.safetensors'\n"
    assert not Path("kfac").exists()


def test_a_folder_in_the_place_of_a_file_is_refused_before_any_work(capsys, monkeypatch):
    monkeypatch.setattr("curvops.tour.own.compute", lambda *_, **__: pytest.fail("work"))
    Path("tour/tour.html").mkdir(parents=True)
    assert main(["tour", "file.py:good"]) == 1
    assert capsys.readouterr().err == "curvops tour: cannot write 'tour/tour.html': Is a directory\n"


def test_help_without_arguments_is_the_help(capsys):
    assert main([]) == 2
    without = capsys.readouterr().err
    assert main(["-h"]) == 0
    assert capsys.readouterr().out == without
