"""The state of a long computation in a file, from which it goes on after it was killed."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from curvops.files import read_about, read_tensors, versions, write_tensors
from curvops.space import describe

FORMAT = "checkpoint of a computation"
REMOVE = "Remove it to begin anew, or pass a Checkpoint with another path."
OURS = ("witness", "shared", "orders", "format", "versions")


class OtherComputation(ValueError):
    """A checkpoint is not of the computation that is asked for."""


class Unwritable(OSError):
    """A checkpoint cannot be written, and nothing was done before."""


@dataclass(frozen=True)
class Checkpoint:
    """Where a long computation keeps its state, and how often.

    Made again with the same checkpoint after it was killed, a computation goes on from what the file holds, and its result has
    the bits that it would have had (on the same device, with as many threads). The file is written whole or not at all,
    without pickle. It stays when the computation ends, so that what is finished is not computed again; removing it is
    yours. Nothing is kept where no checkpoint is passed.

    A file knows what it is a state of: the computation and its options, model, loss, data, and the versions of curvops
    and PyTorch. Where one of them is another, that is an error, and the file stays. So each computation has a path of its
    own.

    A file that cannot be written is an error at the beginning. Later, as on a disk that is full by then, it is a warning:
    the computation goes on, and the file keeps the state before.

    Args:
        path: The file, in a folder that is there. With ``process_group=``, or where parameters are cut over processes, each
            process of a Kronecker operator has files of its own beside it.
        every: Steps from one state to the next: batches of a Kronecker operator (small ones that go together count as
            one), products of estimates, `eigenpairs` and `spectral_density` (up to 64 that are taken together, fewer of
            long vectors, have no state between them). To write a state takes what it takes to write its tensors: of
            a Kronecker operator about as many numbers as its factors, of `eigenpairs` a basis, of estimates the vectors that they
            keep.

    Raises:
        ValueError: If ``every`` is no positive integer.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from curvops import Checkpoint, KFACLinearOperator
        >>> model, data = torch.nn.Linear(3, 2), [(torch.rand(5, 3), torch.rand(5, 2)) for _ in range(4)]
        >>> problem = model, torch.nn.MSELoss(), dict(model.named_parameters()), data
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     checkpoint = Checkpoint(f"{folder}/kfac.safetensors", every=2)
        ...     kfac = KFACLinearOperator(*problem, checkpoint=checkpoint)  # killed, it would go on when made again
        ...     torch.equal(KFACLinearOperator(*problem, checkpoint=checkpoint).to_dense(), kfac.to_dense())
        True
    """

    path: str | Path
    every: int = 100

    def __post_init__(self) -> None:
        if not isinstance(self.path, (str, Path)):
            raise TypeError(f"path: expected a path, got {type(self.path).__name__}.")
        if not isinstance(self.every, int) or self.every < 1:
            raise ValueError(f"every: expected a number of steps ≥ 1, got {self.every!r}.")

    def beside(self, part: str) -> Checkpoint:
        """The same with another file, in whose name there is a part more."""
        path = Path(self.path)
        return replace(self, path=path.with_name(f"{path.stem}.{part}{path.suffix}"))

    def about(self, witness: Mapping[str, Any]) -> dict[str, Any] | None:
        """What was written about the state; ``None`` if there is no file.

        Raises:
            ValueError: If the file is none of ours, or of something else than the ``witness`` says; it names what.
        """
        if not Path(self.path).exists():
            return None
        about = read_about(Path(self.path), FORMAT)
        before, now = about["witness"], _plain(witness)
        if differing := [name for name in {**before, **now} if before.get(name) != now.get(name)]:
            said = ", ".join(_change(name, before.get(name), now.get(name)) for name in differing)
            raise self.error(f"of another computation: {said}")
        return {name: value for name, value in about.items() if name not in OURS}

    def error(self, what: str) -> OtherComputation:
        """An error about a file that is not what was expected."""
        return OtherComputation(f"'{self.path}' is a checkpoint {what}. {REMOVE}")

    def tensors(self, device: torch.device) -> dict[str, Tensor]:
        """The tensors of the state; those that were one are one."""
        tensors, about = read_tensors(Path(self.path), FORMAT)
        # copies, which begin where allocated memory does: the bits of sums may depend on it
        moved = {name: tensor.to(device, copy=True) for name, tensor in tensors.items()}
        for name, order in about["orders"].items():
            moved[name] = moved[name].permute([order.index(axis) for axis in range(len(order))])
        return moved | {name: moved[first] for name, first in about["shared"].items()}

    def write(
        self, witness: Mapping[str, Any], tensors: Mapping[str, Tensor], about: Mapping[str, Any], first: bool = False
    ) -> None:
        """Write a state; a warning if that fails, an `Unwritable` if it is the ``first``, before which nothing was done."""
        known: dict[Any, str] = {}
        own: dict[str, Tensor] = {}
        shared, orders = {}, {}
        for name, t in tensors.items():
            mark = (t.data_ptr(), t.shape, t.stride(), t.dtype) if t.numel() else name
            if known.setdefault(mark, name) != name:
                shared[name] = known[mark]
                continue
            # in the order of memory, on which the bits of products may depend
            order = sorted(range(t.ndim), key=t.stride, reverse=True)
            if order != sorted(order) and t.permute(order).is_contiguous():
                t, orders[name] = t.permute(order), order
            own[name] = t
        facts = {**about, "witness": _plain(witness), "shared": shared, "orders": orders}
        try:
            write_tensors(Path(self.path), own, facts, FORMAT)
        except OSError as error:
            failed = f"checkpoint: '{self.path}' cannot be written ({error.strerror or error})"
            if first:
                raise Unwritable(f"{failed}. Pass a Checkpoint with another path.") from error
            warnings.warn(
                f"{failed}. The computation goes on; killed now, it would go on from an earlier state, if there is one.",
                RuntimeWarning,
                stacklevel=2,
            )


def _plain(witness: Mapping[str, Any]) -> dict[str, Any]:
    """A witness as it is read again, with the versions that results may depend on."""
    own = {name: version for name, version in versions().items() if name in ("curvops", "torch")}
    return json.loads(json.dumps({**witness, "versions": own}, default=str))


def _change(name: str, before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        return f"other {name} ({describe([key for key in {**before, **now} if before.get(key) != now.get(key)])})"
    short = all(len(str(value)) < 60 for value in (before, now))
    return f"{name} {before}, now {now}" if short else f"other {name}"
