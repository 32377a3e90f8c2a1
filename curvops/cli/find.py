"""Find the user's function: `MODULE:PROBLEM`, a dotted module or a path to a file, and a function's name."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from curvops.cli.failures import Failure, UserError

DEFAULT = "problem"  # the function, where none is named


def find_function(target: str) -> tuple[str, Callable[[], Any]]:
    """The function that a target names, and its full name.

    The folder of a file, and the current one, can be imported from, as when Python runs the file.

    Raises:
        Failure: If there is no such module or function; the message says what is there.
        UserError: If importing the module raises something.
    """
    place, colon, name = target.rpartition(":")
    if not colon or "/" in name or name.endswith(".py"):
        place, name = target, DEFAULT
    path = Path(place).expanduser()
    module = _of_file(path) if place.endswith(".py") or path.is_file() else _of_name(place)
    if not hasattr(module, name):
        raise Failure(f"{place!r} has no function {name!r}; {_functions_of(module, name)}")
    function = getattr(module, name)
    if not callable(function):
        raise Failure(f"{target!r}: expected a function without arguments, got {_article(function)}")
    _refuse_arguments(target, function)
    return f"{place}:{name}", function


def _of_file(path: Path) -> ModuleType:
    if not path.is_file():
        hint = _near(path) or f"'curvops new {path}' writes one"
        raise Failure(f"there is no file '{path}'; {hint}")
    name = path.stem
    if not name.isidentifier() or name in sys.modules or name in sys.stdlib_module_names:
        name = f"_problem_in_{name}"
    _importable(path.resolve().parent)
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        raise Failure(f"'{path}' is not a Python file: its name must end in .py")
    # so that classes of the file can be pickled, as workers of a loader do
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        raise _failed(str(path), error) from error
    return module


def _of_name(name: str) -> ModuleType:
    _importable(Path.cwd())
    if not all(part.isidentifier() for part in name.split(".")):
        raise Failure(f"{name!r} is neither a file nor a module; expected FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION")
    try:
        return importlib.import_module(name)
    except BaseException as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
            hint = _near(Path(*name.split("."))) or "is this the folder that it is in?"
            raise Failure(f"there is no module {error.name!r}, neither here nor installed; {hint}") from None
        raise _failed(name, error) from error


def _failed(place: str, error: BaseException) -> BaseException:
    if isinstance(error, SystemExit):
        return Failure(
            f"importing {place!r} ended the program (SystemExit). Put what is run under if __name__ == '__main__'"
        )
    if not isinstance(error, Exception):
        return error
    return UserError(f"importing {place!r} failed")


def _importable(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _near(path: Path) -> str:
    """Files beside that of a path, with or without its suffix, that have nearly its name; empty if there are none."""
    beside = {other.name if path.suffix else other.stem: other for other in sorted(path.parent.glob("*.py"))}
    near = get_close_matches(path.name, beside)
    return f"near: {', '.join(str(beside[name]) for name in near)}" if near else ""


def _functions_of(module: ModuleType, name: str) -> str:
    own = [
        other
        for other, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not other.startswith("_")
    ]
    if not own:
        return "nor any other function"
    near = get_close_matches(name, own, n=1) if len(own) > 1 else []
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}there are: {', '.join(own[:8])}{', …' if len(own) > 8 else ''}"


def _refuse_arguments(target: str, function: Callable[..., Any]) -> None:
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise Failure(
            f"{target!r} cannot be called without arguments ({error}). Give them defaults, or write a function that returns it"
        ) from None
    except ValueError:  # a builtin without a signature
        return


def _article(value: object) -> str:
    name = type(value).__name__
    return f"a{'n' if name[:1].lower() in 'aeiou' else ''} {name}"
