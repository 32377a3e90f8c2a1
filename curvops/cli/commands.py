"""The commands with their options and help. What they do is imported when one of them runs."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from functools import reduce
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import click
from click.shell_completion import CompletionItem

from curvops.cli.failures import usage_line
from curvops.cli.session import Session

TOGETHER = ("tour", "spectrum", "kfac")  # commands whose work the processes of torchrun share
SETUPS = ("tutorial", "digits")
MATRICES = ("hessian", "ggn", "ef", "fisher", "kfac", "ekfac")
FISHER_TYPES = ("mc", "type-2", "empirical", "forward-only")
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


class Target(click.ParamType):  # type: ignore[type-arg]  # it has none before click 8.4
    """`MODULE:PROBLEM`; shells complete the names of files."""

    name = "MODULE:PROBLEM"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="file")]


class Bytes(click.ParamType):  # type: ignore[type-arg]  # it has none before click 8.4
    """A number of bytes, such as 2GB, 500MiB or 1e9."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"([\d.]+(?:e\d+)?)\s*([kmgt]i?|)(b?)", str(value).strip().lower())
        try:
            size = float(found[1]) * _UNITS[found[2]] if found else 0
        except ValueError:
            size = 0
        # a number alone that is so small was meant in another unit
        least = 1 if found and (found[2] or found[3]) else 10**6
        if not least <= size < 2**63:
            self.fail(f"expected a size with its unit, e.g. 2GB or 500MiB, got {value!r}", param, ctx)
        return int(size)


class Folder(click.ParamType):  # type: ignore[type-arg]  # it has none before click 8.4
    """A folder that is there, or can be made; shells complete the names of folders."""

    name = "DIR"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not str(value).strip():
            self.fail(f"expected the name of a folder, got {value!r}; the current one is '.'", param, ctx)
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="dir")]


class Names(click.ParamType):  # type: ignore[type-arg]  # it has none before click 8.4
    """A comma-separated choice of names."""

    def __init__(self, *known: str) -> None:
        self.name, self.known = "NAME,NAME", known

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[str]:
        if not isinstance(value, str):
            return list(value)
        names = [name.strip() for name in value.split(",") if name.strip()]
        if not names or any(name not in self.known for name in names):
            self.fail(f"{value!r} is not a comma-separated choice of {', '.join(self.known)}", param, ctx)
        return list(dict.fromkeys(names))


def run(arguments: Sequence[str] | None) -> int:
    """Parse and run; the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if not arguments:
            with click.Context(curvops, info_name="curvops", **curvops.context_settings) as context:
                click.echo(context.get_help(), err=True)
            return 2
        return int(curvops.main(arguments, "curvops", standalone_mode=False) or 0)
    except click.UsageError as error:
        click.echo(usage_line(error), err=True)
        return 2
    except click.Abort:
        click.echo("curvops: interrupted", err=True)
        return 130


def _version() -> str:
    def of(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "unknown"

    return f"curvops {of('curvops')}, PyTorch {of('torch')}, Python {sys.version.split()[0]}"


def _show_version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        click.echo(_version())
        ctx.exit()


_Decorator = Callable[[Any], Any]
_COUNT = click.IntRange(1, 2**31 - 1)
_device = click.option(
    "--device", metavar="NAME", help="Where to compute: cpu, cuda, cuda:1, … [default: where the model is]"
)
_seed = click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    default=0,
    show_default=True,
    help="Of weights, samples and random vectors.",
)
_threads = click.option("--threads", type=click.IntRange(1, 1024), help="Number of CPU threads. [default: PyTorch's]")
_memory = click.option(
    "--memory",
    type=Bytes(),
    help="What intermediate results may take, such as 2GB. [default: a quarter of what is free]",
)
_fresh = click.option("--fresh", is_flag=True, help="Compute anew what is there, instead of skipping it.")
_matrix = click.option(
    "--matrix", "matrices", type=Names(*MATRICES), default="hessian", show_default=True,
    help=f"Which, separated by commas: {', '.join(MATRICES)} (Monte-Carlo Fisher: fisher, empirical: ef).",
)  # fmt: skip
_fisher_type = click.option(
    "--fisher-type", type=click.Choice(FISHER_TYPES), default="mc", show_default=True,
    help="Of KFAC and EKFAC: sampled labels, all columns of the output Hessian, true labels, none.",
)  # fmt: skip
_PROBLEM = (
    click.option("--dtype", type=click.Choice(["float32", "float64"]), help="Precision of model, loss and data. [default: as they are]"),
    click.option("--params", multiple=True, metavar="PATTERN", help="Parameters to take, such as 'layer4.*'; can be repeated. [default: those that are trained]"),
    click.option("--batches", type=_COUNT, metavar="N", help="Take the first N batches only. [default: all]"),
)  # fmt: skip
_SHOWN = (
    click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout, and everything else on stderr."),
    click.option("--traceback", is_flag=True, help="Show Python's traceback of an error."),
)  # fmt: skip


def _with(*decorators: _Decorator) -> _Decorator:
    return lambda function: reduce(lambda inner, decorator: decorator(inner), reversed(decorators), function)


def _target(required: bool = True) -> _Decorator:
    return click.argument(
        "target", metavar="MODULE:PROBLEM" if required else "[MODULE:PROBLEM]", type=Target(), required=required
    )


def _output(default: str) -> _Decorator:
    return click.option(
        "--output",
        type=Folder(),
        default=default,
        show_default=True,
        metavar="DIR",
        help="Folder for the files; it is made.",
    )


def _run(command: str, *, as_json: bool, traceback: bool, **given: Any) -> int:
    """Import a command's module, and run it."""
    if sys.stderr.isatty():
        click.echo(f"curvops {command}: loading PyTorch", err=True)  # which takes seconds
    together = command in TOGETHER and (command != "tour" or given["target"] is not None)
    return Session(f"curvops {command}", as_json, traceback, together).run(
        lambda session: import_module(f"curvops.cli.{command}").run(session, **given)
    )


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help="Print versions and exit.",
)
def curvops() -> None:
    """Curvature matrices of PyTorch models: see them, check them, decompose them.

    A PROBLEM is a function without arguments that returns model, loss and data (and a dict of parameters, if only
    some). MODULE is a Python file or a module that can be imported.

    \b
    Examples:
      curvops new mine.py              write such a function, which runs as it is
      curvops check mine.py:problem    compare all operators with their definitions on it
      curvops tour mine.py:problem     see its curvature matrices

    \b
    Completion of commands and options, in a line of ~/.bashrc (zsh: zsh_source, fish: fish_source):
      eval "$(_CURVOPS_COMPLETE=bash_source curvops)"

    Exit status: 0 success, 1 failure, 2 mistake in the arguments, 130 interrupted, 143 terminated.
    """


@curvops.command(short_help="Compute and draw curvature matrices.")
@_with(
    _target(required=False), _output("tour"),
    click.option("--setups", type=Names(*SETUPS), help=f"Of the built-in models, which: {', '.join(SETUPS)}. [default: all]"),
    click.option("--checkpoint", "checkpoints", multiple=True, type=click.Path(), metavar="FILE", help="Weights of your model, by torch.save(model.state_dict(), FILE): one stop of the page's slider; can be repeated."),
    _fresh, _device, *_PROBLEM, _seed, _threads, _memory, *_SHOWN,
)  # fmt: skip
def tour(**given: Any) -> int:
    """Compute and draw curvature matrices, with seconds and memory of each.

    Without a problem of your own those of small built-in models, in single precision, on a GPU if there is one.
    Figures (PDF, PNG), the page tour.html and the matrices (safetensors) go to a folder. Where the matrices of your
    problem do not fit into --memory, norms of their blocks take their place. A run that was interrupted goes on.

    \b
    Examples:
      curvops tour
      curvops tour mine.py:problem --output curvature
      curvops tour mine.py:problem --params 'layer4.*' --device cuda --memory 2GB
    """
    return _run("tour", **given)


@curvops.command(short_help="Compare all operators with their definitions.")
@_with(_target(), _device, *_PROBLEM, _seed, _threads, *_SHOWN)
def check(**given: Any) -> int:
    """Compare all operators with their definitions, on a few of your data.

    Prints a table of what is right, wrong, or could not be judged and why. The exit status is 1 where something FAILED.

    \b
    Examples:
      curvops check mine.py:problem
      curvops check mine.py:problem --params 'head.*' --dtype float64
      curvops check mine.py:problem --json | jq '.rows[] | select(.verdict == "FAILED")'
    """
    return _run("check", **given)


@curvops.command(short_help="Eigenvalues, and the spectral density.")
@_with(
    _target(), _matrix,
    click.option("-k", "k", type=click.IntRange(1), metavar="N", help="Eigenvalues at each end. [default: 5, or as many as there are]"),
    click.option("--which", type=click.Choice(["both", "largest", "smallest", "magnitude"]), default="both", show_default=True, help="At which end."),
    click.option("--density/--no-density", default=True, show_default=True, help="Estimate and draw the spectral density."),
    click.option("--depth", type=_COUNT, default=64, show_default=True, help="Of the density: Lanczos steps; not used up to 2,000 parameters, where the matrix is made."),
    click.option("--vectors", type=_COUNT, default=8, show_default=True, help="Of the density: start vectors; not used up to 2,000 parameters."),
    _fisher_type, _output("spectrum"), _fresh, _device, *_PROBLEM, _seed, _threads, _memory, *_SHOWN,
)  # fmt: skip
def spectrum(**given: Any) -> int:
    """Eigenvalues with residuals, and the spectral density. Up to 2,000 parameters both are exact, from the matrix.

    Eigenpairs and density of each matrix are written as soon as they are finished; a run that was interrupted goes on
    there when it is started again.

    \b
    Examples:
      curvops spectrum mine.py:problem -k 10
      curvops spectrum mine.py:problem --matrix hessian,ggn --depth 100 --device cuda
      curvops spectrum mine.py:problem --which largest --no-density --json
    """
    return _run("spectrum", **given)


@curvops.command(short_help="Kronecker factors, saved for later use.")
@_with(
    _target(),
    click.option("--ekfac", is_flag=True, help="Correct the eigenvalues: EKFAC."),
    _fisher_type,
    click.option("--approximation", type=click.Choice(["expand", "reduce"]), default="expand", show_default=True, help="For weights shared over positions."),
    _output("kfac"), _fresh, _device, *_PROBLEM, _seed, _threads, _memory, *_SHOWN,
)  # fmt: skip
def kfac(**given: Any) -> int:
    """Kronecker factors, saved for later use.

    Writes kfac.safetensors (or ekfac.safetensors), which `curvops.load` reads, and prints how each parameter is
    treated. If the file is there with the same settings, nothing is computed.

    \b
    Examples:
      curvops kfac mine.py:problem
      curvops kfac mine.py:problem --ekfac --fisher-type type-2 --output factors
      curvops kfac mine.py:problem --params '*.weight' --memory 2GB --json
    """
    return _run("kfac", **given)


@curvops.command(short_help="How each matrix would be computed, and its cost.")
@_with(
    _target(),
    click.option("--matrix", "matrices", type=Names(*MATRICES), default=",".join(MATRICES), help=f"Which, separated by commas: {', '.join(MATRICES)}. [default: all]"),
    _fisher_type, _device, *_PROBLEM, _seed, _threads, _memory, *_SHOWN,
)  # fmt: skip
def explain(**given: Any) -> int:
    """How each matrix would be computed, and what it would cost.

    Takes one product with one batch at most: of KFAC and EKFAC the plan of blocks, memory and passes.

    \b
    Examples:
      curvops explain mine.py:problem
      curvops explain mine.py:problem --matrix ekfac --fisher-type type-2
    """
    return _run("explain", **given)


@curvops.command(short_help="Write a problem that runs as it is.")
@_with(
    click.argument("file", type=click.Path()),
    click.option("--force", is_flag=True, help="Overwrite a file that is there."),
    *_SHOWN,
)  # fmt: skip
def new(**given: Any) -> int:
    """Write FILE with a problem that runs as it is, to be changed into yours.

    \b
    Examples:
      curvops new mine.py
      curvops new experiments/mine.py --force
    """
    return _run("new", **given)
