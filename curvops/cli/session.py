"""One run of a command: where its output goes, what it has kept, and its exit status."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

import click

from curvops.cli.failures import failure_text, for_the_shell, from_user, usage_line, warning_text
from curvops.cli.streams import Terminated, diverted, legible, terminable


@dataclass
class Session:
    """What a command writes to: text or one JSON document on stdout, everything else on stderr.

    Attributes:
        title: The command, in front of each line on stderr.
        as_json: Whether stdout takes one JSON document and nothing else.
        together: Whether processes that torchrun has started share the work; otherwise the first one does it.
        kept: What is finished and kept on disk, for the line of an interruption.
    """

    title: str
    as_json: bool = False
    traceback: bool = False
    together: bool = False
    kept: list[Any] = field(default_factory=list)
    stdout: TextIO = field(default_factory=lambda: sys.stdout)
    _document: dict[str, Any] | None = None
    _folder: Path | None = None

    def say(self, text: str = "") -> None:
        """A line for a person."""
        print(for_the_shell(text), file=sys.stderr if self.as_json else self.stdout, flush=True)

    def note(self, text: str) -> None:
        """A line about the run, on stderr."""
        self._tell(for_the_shell(text))

    def _tell(self, text: str) -> None:
        print(f"{self.title}: {text}", file=sys.stderr, flush=True)

    def answer(self, document: dict[str, Any]) -> None:
        """The JSON document, which is printed at the end, if it was asked for."""
        self._document = document

    def path(self, given: str | Path) -> Path:
        """A path as it was meant where the command began, also if the user's code has gone to another folder."""
        return Path(given) if self._folder is None or not self._has_moved() else self._folder / given

    def _has_moved(self) -> bool:
        """Whether the user's code has left the folder where the command began."""
        try:
            return Path.cwd() != self._folder
        except FileNotFoundError:  # where it went is gone
            return True

    def _return(self) -> None:
        if self._folder is not None and self._has_moved():
            os.chdir(self._folder)

    def run(self, command: Callable[[Session], bool | None]) -> int:
        """Run a command and explain how it fails; ``False`` is a failure that it has told itself."""
        processes: Any = None
        with contextlib.ExitStack() as stack:
            stack.enter_context(legible())
            try:
                stack.enter_context(terminable())
                processes = import_module("curvops.cli.processes")
                stack.callback(processes.leave)
                if not (self.together or processes.is_first()):
                    return 0
                with self._surroundings():
                    status = 1 if command(self) is False else 0
                if self.as_json and self._document is not None and processes.is_first():
                    # in signs that every stream takes
                    print(json_text(self._document, ascii_only=True), file=self.stdout, flush=True)
                return status
            except click.UsageError as error:
                self._trace()
                print(usage_line(error, self.title), file=sys.stderr)
                return 2
            except KeyboardInterrupt as error:
                self._trace()
                what, status = ("terminated", 143) if isinstance(error, Terminated) else ("interrupted", 130)
                self.note(f"{what}; kept {'; '.join(map(str, self.kept)) or 'nothing'}")
                return status
            except BrokenPipeError:
                # whoever read has gone; what Python flushes at its end must not fail again
                with Path(os.devnull).open("wb") as nowhere:
                    os.dup2(nowhere.fileno(), self.stdout.fileno())
                return 1
            except BaseException as error:
                if not (isinstance(error, (Exception, SystemExit)) or from_user(error)):
                    raise
                self._trace()
                # what fails within the group is told to the first process
                if processes is None or processes.is_first() or not processes.joined():
                    self._tell(failure_text(error))
                return 1

    @contextlib.contextmanager
    def _surroundings(self) -> Any:
        """What a command may change for its time; whoever called it in a process of their own finds all as it was."""
        torch = import_module("torch")
        with contextlib.ExitStack() as stack:
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            stack.enter_context(import_module("curvops.context").preserved_random_state())
            stack.callback(sys.path.__setitem__, slice(None), [*sys.path])
            with contextlib.suppress(FileNotFoundError):  # a folder that was removed
                self._folder = Path.cwd()
                stack.callback(self._return)
            if "MPLBACKEND" not in os.environ:
                os.environ["MPLBACKEND"] = "agg"  # figures go to files: no window is needed
                stack.callback(os.environ.pop, "MPLBACKEND", None)
            if self.as_json:
                # what the user's file prints is not the document
                stack.enter_context(diverted(self.stdout))
            processes = import_module("curvops.cli.processes")
            if not processes.is_first():  # the first one speaks
                nowhere = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
                stack.enter_context(contextlib.redirect_stderr(nowhere))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
                stack.callback(setattr, self, "stdout", self.stdout)
                self.stdout = nowhere
            stack.enter_context(warnings.catch_warnings())
            # PyTorch 2.15's own, when it loads its rules for forward mode
            warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
            if not self.traceback:
                warnings.showwarning = self._warn
            yield

    def _warn(self, message: Warning | str, category: type[Warning], filename: str, *where: Any, **more: Any) -> None:
        self._tell(f"warning: {warning_text(message, filename)}")

    def _trace(self) -> None:
        if self.traceback:
            traceback.print_exc()


def json_text(document: dict[str, Any], ascii_only: bool = False) -> str:
    """A document as JSON, with null for what JSON has no number for, and advice for the shell."""
    return json.dumps(_plain(document), indent=2, ensure_ascii=ascii_only, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, str):
        return for_the_shell(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
