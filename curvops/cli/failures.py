"""What a failure prints: one line with its remedy, or the traceback of the user's own code."""

from __future__ import annotations

import linecache
import os
import re
import sysconfig
import traceback
from pathlib import Path
from types import TracebackType

import click

from curvops.extras import package_of

_OURS = Path(__file__).resolve().parents[1]
_LIBRARIES = [Path(sysconfig.get_path(kind)).resolve() for kind in ("stdlib", "platstdlib", "purelib", "platlib")]
_CPU = "leave model and data on the CPU; --device moves them"
# from what Python and PyTorch say to what helps
_REMEDIES = {
    "weights_only": "torch.load(…, weights_only=False), if you trust the file",
    "Attempting to deserialize object on": "torch.load(…, map_location='cpu'); --device moves the model",
    "Error(s) in loading state_dict": "the weights of this very model, as model.state_dict() gives them",
    "No such file or directory": "a path that holds in the folder where the command runs, which relative ones are taken from",
    "No module named": "installing it where curvops is installed, or running the command in the folder that it is in",
    "not compiled with CUDA enabled": _CPU,
    "No CUDA GPUs are available": _CPU,
    "Found no NVIDIA driver": _CPU,
    "same dtype": "--dtype float32 or float64 brings model, loss and data to one precision",
    "expected scalar type": "--dtype float32 or float64 brings model, loss and data to one precision",
    "same device": "--device brings model, loss and data to one device",
    "out of memory": "take fewer parameters with --params, or less at a time with --memory",
}
# from what a call in Python is advised to what helps in a shell
_ADVICE = {
    "Raise memory_budget, keep the basis elsewhere (basis_device='cpu') or in a lower basis_dtype,": "Raise --memory,",
    "Raise max_products, subspace or tolerance, or give an earlier result as start.": "Ask for fewer eigenvalues (-k), or for --dtype float64.",
    "Call model.eval(), or pass check_deterministic=False to accept products that vary with the state of the random generators.": "Call model.eval() in your function, before it returns the model.",
    "batches keep their dtype, so convert X yourself.": "--dtype float32 or float64 brings model, loss and data to one precision.",
    "Multiply onto the columns that you need, or take the operator of fewer parameters.": "Take fewer parameters with --params.",
    "Check op.risk.gradient(), or compute in float32.": "Look for infinite or huge numbers in weights and data, or take --dtype float32.",
    "by memory_budget=": "by --memory",
    "(memory_budget=)": "(--memory)",
    "or more memory_budget,": "or more --memory,",
    "fisher_type='mc' takes mc_samples, 'empirical' one": "--fisher-type mc takes one, empirical one",
    "less memory: rule=BlockRule(largest_factor=…, largest_block=…)": "less memory: fewer parameters, with --params",
    ": inside linearized() the loader": ": at a further pass the loader",
    " inside linearized()": " where many are taken",
    "batch_size_fn=lambda X": "a dict with batch_size_fn: lambda X",
}
# what a call takes, a function of the command line's returns
_PASS = re.compile(r"(?:(?<=[,;:] )|(?<=\bor )|(?<![^.;] )\b(?=P))([Pp])ass (?!--|over\b)")
_CODE = "\n    class "  # how an error's message begins code that is to be copied


class Failure(Exception):
    """A failure that its message, one line, explains."""


class UserError(Exception):
    """The user's own code raised its cause."""


def usage_line(error: click.UsageError, command: str = "curvops") -> str:
    """What is wrong with the arguments, in one line, and where their help is."""
    command = error.ctx.command_path if error.ctx is not None else command
    said = one_line(error.format_message()).rstrip(".")
    return f"{command}: {said}{'' if said.endswith('?') else '.'} See: {command} --help"


def failure_text(error: BaseException) -> str:
    """A line for what our code refuses and says itself, else for the user's code with its traceback, or the first line."""
    if isinstance(error, UserError) and error.__cause__ is not None:
        return _users_failure(str(error), error.__cause__)
    if isinstance(error, SystemExit):
        return f"your code ended the program{_users_place(error)} (SystemExit); it must return, or raise an error"
    if isinstance(error, ModuleNotFoundError) and not from_user(error):
        return f"it needs {package_of(error.name or '')}: pip install 'curvops[tour]'"
    if isinstance(error, (Failure, OSError)) or _raised_by_us(error):
        return _message(error)
    if from_user(error):
        return _users_failure("your code failed", error)
    return f"{type(error).__name__}: {_message(error)}{_remedy(error) or ' (--traceback shows where)'}"


def one_line(text: str) -> str:
    """A text without its line breaks."""
    return " ".join(text.split())


def _message(error: BaseException) -> str:
    # a KeyError's text would be quoted
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    if isinstance(error, OSError) and error.filename and error.strerror:
        text = f"{error.strerror}: '{error.filename}'"
    said = str(text).partition("\n\n")[0]
    said, code = said[: (begin := said.find(_CODE) if _CODE in said else len(said))], said[begin:]
    return for_the_shell(one_line(said)) + code or type(error).__name__


def for_the_shell(text: str) -> str:
    """A message whose advice names options of the command line in place of Python's arguments."""
    for python, shell in _ADVICE.items():
        text = text.replace(python, shell)
    return _PASS.sub(lambda found: "Return " if found[1] == "P" else "return ", text)


def warning_text(message: Warning | str, filename: str) -> str:
    """A warning in one line, and what it advises for the shell where it is ours."""
    said = one_line(str(message))
    return for_the_shell(said) if _inside(Path(filename), _OURS) else said


def _remedy(error: BaseException) -> str:
    return next((f". Try: {what}" for said, what in _REMEDIES.items() if said in str(error)), "")


def _users_failure(what: str, error: BaseException) -> str:
    """What failed, where in the user's code and why, and what helps, in one line; below it the traceback."""
    said = error.msg if isinstance(error, SyntaxError) else str(error).strip()
    why = ": ".join([type(error).__name__, *filter(None, [said.partition("\n")[0].rstrip(".:")])])
    return f"{what}{_users_place(error)}: {why}{_remedy(error)}\n{_users_traceback(error)}"


def _users_place(error: BaseException) -> str:
    if isinstance(error, SyntaxError) and error.filename:
        line, path = error.lineno, Path(error.filename)
    elif own := [(trace, path) for trace, path in _frames(error) if _is_users(path)]:
        line, path = own[-1][0].tb_lineno, own[-1][1]
    else:
        return ""
    near = path.resolve().is_relative_to(Path.cwd())
    return f" in line {line} of {os.path.relpath(path) if near else path}"


def _frames(error: BaseException) -> list[tuple[TracebackType, Path]]:
    found, trace = [], error.__traceback__
    while trace is not None:
        found.append((trace, Path(trace.tb_frame.f_code.co_filename)))
        trace = trace.tb_next
    return found


def _raised_by_us(error: BaseException) -> bool:
    """Whether a line of ours raised it, and not PyTorch in a function that a line of ours called."""
    frames = _frames(error)
    if not frames or not _inside(frames[-1][1], _OURS):
        return False
    trace, path = frames[-1]
    return isinstance(error, Warning) or linecache.getline(str(path), trace.tb_lineno).strip().startswith("raise ")


def from_user(error: BaseException) -> bool:
    """Whether code of the user's takes part in it."""
    return _first_of_user(error) is not None


def _first_of_user(error: BaseException) -> TracebackType | None:
    return next((trace for trace, path in _frames(error) if _is_users(path)), None)


def _is_users(path: Path) -> bool:
    return path.exists() and not _inside(path, _OURS) and not any(_inside(path, library) for library in _LIBRARIES)


def _inside(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder)


def _users_traceback(error: BaseException) -> str:
    """The traceback from the first line of the user's code on; of a syntax error the place alone."""
    return "".join(traceback.format_exception(type(error), error, _first_of_user(error))).rstrip()
