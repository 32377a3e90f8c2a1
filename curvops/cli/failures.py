"""What a failure prints: one line with its remedy, or the traceback of the user's own code."""

from __future__ import annotations

import linecache
import sysconfig
import traceback
from pathlib import Path
from types import TracebackType

import click

_OURS = Path(__file__).resolve().parents[1]
_LIBRARIES = [Path(sysconfig.get_path(kind)).resolve() for kind in ("stdlib", "platstdlib", "purelib", "platlib")]
# from what PyTorch says to what helps
_REMEDIES = {
    "same dtype": "--dtype float32 or float64 brings model, loss and data to one precision",
    "expected scalar type": "--dtype float32 or float64 brings model, loss and data to one precision",
    "same device": "--device brings model, loss and data to one device",
    "out of memory": "take fewer parameters with --params, or less at a time with --memory",
}
# from what a call in Python is advised to what helps in a shell
_ADVICE = {
    "Raise memory_budget, keep the basis elsewhere (basis_device='cpu') or in a lower basis_dtype,": "Raise --memory,",
    "Call model.eval(), or pass check_deterministic=False to accept products that vary.": "Call model.eval() in your function, before it returns the model.",
    "by memory_budget=": "by --memory",
    "or more memory_budget,": "or more --memory,",
}
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
    """A line for what our code refuses and says itself, else the traceback of the user's code, or the error's first line."""
    if isinstance(error, UserError) and error.__cause__ is not None:
        return f"{error}\n{_users_traceback(error.__cause__)}"
    if isinstance(error, ModuleNotFoundError) and not _from_user(error):
        return f"it needs {error.name}: pip install 'curvops[tour]'"
    if isinstance(error, (Failure, OSError)) or _raised_by_us(error):
        return _message(error)
    remedy = next((f". Try: {what}" for said, what in _REMEDIES.items() if said in str(error)), "")
    if _from_user(error):
        return f"your code raised {type(error).__name__}{remedy}\n{_users_traceback(error)}"
    return f"{type(error).__name__}: {_message(error)}{remedy or ' (--traceback shows where)'}"


def one_line(text: str) -> str:
    """A text without its line breaks."""
    return " ".join(text.split())


def _message(error: BaseException) -> str:
    # a KeyError's text would be quoted
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    said = str(text).partition("\n\n")[0]
    said, code = said[: (begin := said.find(_CODE) if _CODE in said else len(said))], said[begin:]
    return for_the_shell(one_line(said)) + code or type(error).__name__


def for_the_shell(text: str) -> str:
    """A message whose advice names options of the command line in place of Python's arguments."""
    for python, shell in _ADVICE.items():
        text = text.replace(python, shell)
    return text


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


def _from_user(error: BaseException) -> bool:
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
