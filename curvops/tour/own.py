"""The tour of one's own model, at one place or at the checkpoints of a training run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from itertools import chain
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.nn import Module
from typing_extensions import Unpack

from curvops.ranks import Ranks
from curvops.risk.empirical_risk import EmpiricalRisk
from curvops.risk.model import ModelFunction
from curvops.space import describe
from curvops.tour.compute import BLOCKS, MATRICES, Problem, Say, Tour, compute
from curvops.tour.files import Finished, output_folder
from curvops.tour.films import film
from curvops.tour.groups import Groups, module_groups, sizes_of
from curvops.tour.outputs import DRAWN, FIGURES_BYTES, FILM, PAGE, draw, expected_bytes, remove_stale


class TourOptions(TypedDict, total=False):
    """Options of `tour` and `tour_checkpoints`, as described there."""

    groups: Groups | None
    seed: int
    memory_budget: int | None
    check_deterministic: bool
    progressbar: bool
    resume: bool
    finished: Finished | None
    say: Say | None
    reduction: str | None
    num_data: int | None
    batch_size_fn: Callable[[Any], int] | None
    process_group: Any


def tour(
    model: Module | ModelFunction,
    loss: Callable[[Any, Any], Tensor],
    data: Iterable[tuple[Any, Any]],
    params: Mapping[str, Tensor] | None = None,
    *,
    output: str | Path = "tour",
    title: str | None = None,
    groups: Groups | None = None,
    seed: int = 0,
    memory_budget: int | None = None,
    check_deterministic: bool = True,
    progressbar: bool = True,
    resume: bool = False,
    finished: Finished | None = None,
    say: Say | None = None,
    reduction: str | None = None,
    num_data: int | None = None,
    batch_size_fn: Callable[[Any], int] | None = None,
    process_group: Any = None,
) -> Tour:
    """Compute the curvature matrices of your own model, draw them, and keep them.

    Hessian, Gauss-Newton, empirical and Monte-Carlo Fisher, KFAC and EKFAC, on the model's device and in its precision. Where
    they do not fit into memory, Frobenius norms of their blocks are estimated instead. In `output` are afterwards the
    figures (PDF and PNG; of logarithms and unaltered), the page `tour.html`, and the file: `matrices.safetensors` or
    `blocks.safetensors`, which has each matrix as soon as it is finished. A matrix whose operator refuses the model is left out,
    and the table says why. What an earlier tour of another kind
    has drawn into `output` is removed at the end.

    Args:
        model: Module called as `model(X)`, or a function `(params, X)`. What it returns must be the tensor that the loss takes.
        loss: Loss `(output, y)`: a module, or a function together with `reduction`.
        data: Iterable of batches `(X, y)` that can be walked again, such as a DataLoader without shuffling or `[(X, y)]`.
        params: Parameters by name, whose order is that of the rows: any subset of the module's. By default all that are
            trained, or all if none is.
        output: Folder for the files; it is made if it is missing.
        title: Of the page; by default the model's class and its number of parameters.
        groups: As of `plot_matrices`: sizes by label, a model, or a depth of module names. By default modules, as deeply as gives
            at most 16 groups.
        seed: Of the Monte-Carlo operators.
        memory_budget: Bytes that the matrices may take; a quarter of the free memory if not given.
        check_deterministic: Compare two passes over the data first.
        progressbar: Show what is computed: lines on stderr, and bars on a terminal or in a notebook.
        resume: Keep what a file in `output` has of the same model, loss, data and seed by the same versions. Any change of a
            tensor, a mode, an attribute or the data, and any of the code that risk, gradient, Hessian, GGN or empirical Fisher
            show, means anew.
        finished: Is filled in with what is written, for a caller that may be interrupted.
        say: Takes the lines about what is computed; by default they go to stderr.
        reduction: `"mean"` or `"sum"`, for losses that do not say it themselves.
        num_data: Number of data, compared with what `data` yields.
        batch_size_fn: Number of data in `X` where it cannot be seen.
        process_group: Processes of `torch.distributed` that pass a share of the data each, see `EmpiricalRisk`; they all
            make the call and get the result, and the first one writes the files.

    Returns:
        A `Tour`: `matrices`, `groups`, `paths`; `print` shows seconds, memory, traces and distances to the Hessian.

    Raises:
        TypeError, ValueError: If an argument does not fit, or the loss is not finite; the message says which and how.
        RuntimeError: If two passes over the data differ, as with dropout in train mode.
        OutputError: If the folder cannot take the files; then nothing was computed.

    Example:
        >>> import tempfile
        >>> import torch
        >>> import curvops
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> data = [(torch.rand(5, 3), torch.randint(2, (5,)))]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     found = curvops.tour(model, torch.nn.CrossEntropyLoss(), data, output=folder)
        ...     found.groups, sorted({path.suffix for path in found.paths})
        ({'0': 16, '2': 10}, ['.html', '.pdf', '.png', '.safetensors'])
    """
    finished = finished if finished is not None else Finished()
    options = TourOptions(
        groups=groups,
        seed=seed,
        memory_budget=memory_budget,
        check_deterministic=check_deterministic,
        progressbar=progressbar,
        resume=resume,
        finished=finished,
        say=say,
        reduction=reduction,
        num_data=num_data,
        batch_size_fn=batch_size_fn,
        process_group=process_group,
    )
    found = _toured(model, loss, data, params, Path(output), title, options)
    if Ranks(process_group).rank:
        return found
    draw({"": found}, Path(output) / PAGE, finished, progressbar=progressbar)
    remove_stale([Path(output)], found.paths, _say(options))
    return found


def tour_checkpoints(
    model: Module,
    loss: Callable[[Any, Any], Tensor],
    data: Iterable[tuple[Any, Any]],
    checkpoints: Mapping[str, Mapping[str, Any] | str | Path],
    params: Mapping[str, Tensor] | None = None,
    *,
    output: str | Path = "tour",
    title: str | None = None,
    **options: Unpack[TourOptions],
) -> dict[str, Tour]:
    """Take the tour of a model at each checkpoint of a training run, and make a film of it.

    Each checkpoint is loaded into the model; the caller's weights and buffers are put back at the end, also after a
    failure. The files of a checkpoint are in a folder of `output` with its name; figures share their colours. In `output`
    itself are `tour.html`, a page with a slider, and the film `film.gif`.

    Args:
        model: The module.
        loss: As of `tour`.
        data: As of `tour`.
        checkpoints: By label a `state_dict` of the model, or a file of one that `torch.save` has written. Labels name
            folders, in which "/" becomes "-".
        params: As of `tour`.
        output: Folder for the files.
        title: Of the page.
        options: As of `tour`.

    Returns:
        By label what was found.

    Raises:
        Exception: As of `tour`, and a ValueError if there is no checkpoint, one does not fit the model, or two labels name one folder.

    Example:
        >>> import tempfile
        >>> import torch
        >>> model, loss = torch.nn.Linear(3, 2), torch.nn.CrossEntropyLoss()
        >>> data = [(torch.rand(5, 3), torch.randint(2, (5,)))]
        >>> states = {f"step {k}": {name: k * p.detach() for name, p in model.named_parameters()} for k in (1, 2)}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     tours = tour_checkpoints(model, loss, data, states, output=folder)
        ...     list(tours), (Path(folder) / "film.gif").exists()
        (['step 1', 'step 2'], True)
    """
    if not isinstance(model, Module):
        raise TypeError(
            f"tour_checkpoints: the model must be a module, into which checkpoints are loaded, got {type(model).__name__}."
        )
    if not checkpoints:
        raise ValueError("tour_checkpoints: expected at least one checkpoint, got none.")
    options["finished"] = finished = options.get("finished") or Finished()
    output, tours = Path(output), dict[str, Tour]()
    folders = _folders(checkpoints)
    # what is the model's own, as its `state_dict()` is, would change as others are loaded
    own = {tensor.untyped_storage().data_ptr() for tensor in chain(model.parameters(), model.buffers())}
    states = [deepcopy(state) if _shares(state, own) else state for state in checkpoints.values()]
    with output_folder(output, 0, DRAWN), weights_kept(model):
        for (label, folder), state in zip(folders.items(), states, strict=True):
            _load(model, label, state)
            name = title or title_of(model, chosen(model, params))
            tours[label] = _toured(model, loss, data, params, output / folder, f"{name}, {label}", options)
    if Ranks(options.get("process_group")).rank:
        return tours
    draw(tours, output / PAGE, finished, title=title, progressbar=options.get("progressbar", True))
    finished.figures.append(film(tours, output / FILM))
    written = [path for found in tours.values() for path in found.paths]
    remove_stale(
        [output, *(found.paths[0].parent for found in tours.values())], [*written, output / FILM], _say(options)
    )
    return tours


@contextmanager
def weights_kept(model: Module) -> Iterator[None]:
    """Put a module's parameters and buffers back at the end, in place.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> before = model.weight.item()
        >>> with weights_kept(model):
        ...     _ = model.load_state_dict({"weight": torch.zeros(1, 1)})
        >>> model.weight.item() == before
        True
    """
    stores: list[Any] = [store for m in model.modules() for store in (m._parameters, m._buffers)]
    kept = [(store, name, t, t.detach().clone()) for store in stores for name, t in store.items() if t is not None]
    with_state = [m for m in model.modules() if type(m).get_extra_state is not Module.get_extra_state]
    extra = [(m, deepcopy(m.get_extra_state())) for m in with_state]
    try:
        yield
    finally:
        # not by `load_state_dict`, whose hooks may refuse what they have not given
        with torch.no_grad():
            for store, name, tensor, before in kept:
                if store.get(name) is not tensor:
                    store[name] = tensor
                tensor.copy_(before)
        for module, state in extra:
            module.set_extra_state(state)


def chosen(model: Module | ModelFunction, params: Mapping[str, Tensor] | None) -> Mapping[str, Tensor]:
    """The parameters that a tour looks at; without `params` those of the module that are trained, or all if none is."""
    if params is None:
        params = _trained(model)
    if params and not any(p.numel() for p in params.values()):
        raise ValueError(
            f"tour: the parameters {describe(list(params))} have 0 entries, so that no curvature is in them. Pass a model, or "
            "params=, with at least one entry."
        )
    return params


def _trained(model: Module | ModelFunction) -> Mapping[str, Tensor]:
    if not isinstance(model, Module):
        raise TypeError(
            f"tour: a {type(model).__name__} is taken as a function (params, X); pass its parameters, params={{name: tensor}}."
        )
    named = dict(model.named_parameters())
    if not named:
        raise ValueError(f"tour: the model {type(model).__name__} has no parameters.")
    return {name: p for name, p in named.items() if p.requires_grad} or named


def title_of(model: Any, params: Mapping[str, Tensor]) -> str:
    """A title for a model: the name of its class or function, and how many parameters are looked at."""
    name = type(model).__name__ if isinstance(model, Module) else getattr(model, "__name__", type(model).__name__)
    size = sum(p.numel() for p in params.values())
    return f"{name}, {size:,} parameter{'s' * (size != 1)}"


def _toured(
    model: Module | ModelFunction,
    loss: Callable[[Any, Any], Tensor],
    data: Iterable[tuple[Any, Any]],
    params: Mapping[str, Tensor] | None,
    folder: Path,
    title: str | None,
    options: TourOptions,
) -> Tour:
    """Compute and keep what fits; nothing is drawn."""
    params = chosen(model, params)
    risk = EmpiricalRisk(
        model,
        loss,
        params,
        data,
        reduction=options.get("reduction"),
        num_data=options.get("num_data"),
        batch_size_fn=options.get("batch_size_fn"),
        process_group=options.get("process_group"),
    )
    shapes = {name: tuple(shape) for name, shape in risk.space.shapes.items()}
    groups = options.get("groups")
    sizes = sizes_of(module_groups(shapes) if groups is None else groups, risk.space.dim, shapes)
    title, say = title or title_of(model, params), _say(options)
    problem = Problem(title, risk, sizes, folder, options.get("memory_budget"))
    size = FIGURES_BYTES if problem.too_large else expected_bytes([risk.space.dim**2 * risk.space.dtype.itemsize])
    with output_folder(folder, size, (MATRICES, BLOCKS, *DRAWN)):
        dtype = str(risk.space.dtype).removeprefix("torch.")
        say(f"{title}: {_batches(data)} on {risk.space.device} in {dtype}, to '{folder}'")
        return compute(
            problem,
            seed=options.get("seed", 0),
            check=options.get("check_deterministic", True),
            progressbar=options.get("progressbar", True),
            resume=options.get("resume", False),
            finished=options.get("finished"),
            say=say,
        )


def _say(options: TourOptions) -> Say:
    """What takes the lines about the progress."""
    say = options.get("say")
    if Ranks(options.get("process_group")).rank:
        return lambda line: None
    if say is not None:
        return say
    return partial(print, file=sys.stderr, flush=True) if options.get("progressbar", True) else lambda line: None


def _batches(data: Iterable[tuple[Any, Any]]) -> str:
    count = len(data) if isinstance(data, Sized) else None
    return "data" if count is None else "one batch" if count == 1 else f"{count:,} batches"


def _folders(labels: Iterable[Any]) -> dict[str, str]:
    """The name of a checkpoint's folder by its label as text; a ValueError if it is none, or that of another one."""
    found: dict[str, str] = {}
    taken = {name: f"the tour's own file {name!r}" for name in (PAGE, FILM)}
    for label in labels:
        folder = str(label).replace("/", "-").replace("\\", "-")
        if folder.strip() in ("", ".", "..") or "\0" in folder or len(folder.encode()) > 255:
            raise ValueError(f"tour_checkpoints: the label {label!r} names no folder. Give it another one.")
        # some file systems tell no cases apart
        if other := taken.get(folder.casefold()):
            raise ValueError(
                f"tour_checkpoints: the label {label!r} would name the folder {folder!r}, as {other} does. Rename it."
            )
        taken[folder.casefold()] = f"the label {label!r}"
        found[str(label)] = folder
    return found


def _shares(state: Mapping[str, Any] | str | Path, own: set[int]) -> bool:
    """Whether a checkpoint holds tensors in some storages."""
    tensors = [one for one in state.values() if isinstance(one, Tensor)] if isinstance(state, Mapping) else []
    return any(tensor.untyped_storage().data_ptr() in own for tensor in tensors)


def _load(model: Module, label: str, state: Mapping[str, Any] | str | Path) -> None:
    """Load a checkpoint into the module."""
    file = f" (file '{state}')" if isinstance(state, (str, Path)) else ""
    try:
        found = torch.load(state, map_location="cpu", weights_only=True) if isinstance(state, (str, Path)) else state
        model.load_state_dict(found)
    except (RuntimeError, TypeError, OSError, EOFError, UnpicklingError) as error:
        raise ValueError(
            f"tour_checkpoints: {label!r}{file} does not load into {type(model).__name__}: {' '.join(str(error).split())} "
            "Pass state_dicts of this model, or files that torch.save(model.state_dict(), path) has written."
        ) from None
