"""Processes that have a share of the data each: what they must agree on, and what they add up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset

from curvops.digest import close, digest, probe, word
from curvops.sharding import Sharding
from curvops.space import describe

FAILED, COMPARES = 1, 2  # of a `Message`'s status
SMALL = 2**18  # numbers of a tensor up to which it is sent together with others
DIFFERENT = (
    "multiply different vectors. Give all of them the same: draw it from a generator with the same seed in each process, or "
    "broadcast it from one"
)
# of each group how many computations have begun, one within another: operators are made of others of the same group
_OPEN: Counter[Any] = Counter()


class RanksError(RuntimeError):
    """Processes of a group disagree, or one of them failed or is gone: raised by all of them."""

    group: Any = None


@dataclass(frozen=True)
class Message:
    """What each process tells the others where they meet, eight bytes a number."""

    status: int  # 0, or one of the following
    what: int  # a hash of what is being computed
    state: int  # a hash of the model's and the loss's tensors
    probe: tuple[float, float]  # two linear functions of the vectors that are multiplied
    size: int  # of its share of the data
    count: float  # its part of what a mean divides by

    def words(self) -> Tensor:
        """As words of 64 bits."""
        reals = torch.tensor([*self.probe, self.count], dtype=torch.float64, device="cpu").view(torch.int64)
        whole = torch.tensor([self.status, self.what, self.state, self.size], dtype=torch.int64, device="cpu")
        return torch.cat([whole, reals])

    @classmethod
    def read(cls, words: Tensor) -> Message:
        """From its words."""
        status, what, state, size = words[:4].tolist()
        first, second, count = words[4:].view(torch.float64).tolist()
        return cls(status, what, state, (first, second), size, count)


class Ranks:
    """The processes of a group of `torch.distributed`; without a group one process alone, which pays nothing.

    All collective calls are here. Each `add` of a buffer follows a `meet`, of 56 bytes a process, in which processes that
    failed or that compute something else are seen by all of them: then all raise, and none waits for another. A process
    that is gone, or that never comes to meet the others, is an error too, after the group's timeout at most.

    Args:
        group: The group, or ``None``.

    Raises:
        RuntimeError: If `torch.distributed` is not initialised, or the process is not of the group.
    """

    def __init__(self, group: Any = None) -> None:
        self._group = group
        self.sizes: list[int] | None = None  # of the shares, as last seen
        if group is None:
            return
        if not torch.distributed.is_initialized():
            raise RuntimeError(
                "process_group: torch.distributed is not initialised. Call torch.distributed.init_process_group() first, "
                "in a script that is started by torchrun."
            )
        if self.rank < 0:
            raise RuntimeError("process_group: this process is not of the group. Call this in its processes only.")

    @property
    def alone(self) -> bool:
        """Whether there is no group."""
        return self._group is None

    @cached_property
    def rank(self) -> int:
        """This process's number in the group."""
        return 0 if self.alone else int(torch.distributed.get_rank(self._group))

    @cached_property
    def number(self) -> int:
        """How many processes there are."""
        return 1 if self.alone else int(torch.distributed.get_world_size(self._group))

    @cached_property
    def device(self) -> torch.device:
        """Where messages must be."""
        nccl = "nccl" in str(torch.distributed.get_backend(self._group)).lower()
        return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")

    def afresh(self) -> Ranks:
        """The same processes with other data."""
        return Ranks(self._group)

    @property
    def start(self) -> int:
        """The place of this process's first datum in the whole data set, once the sizes are known."""
        return sum(self.sizes[: self.rank]) if self.sizes is not None else 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """A computation that ends with a meeting; if it fails before, the others learn it there."""
        if self.alone:
            yield
            return
        _OPEN[self._group] += 1
        try:
            yield
        except Exception as error:
            # all processes of the group that an error of theirs is of have it; those of another group wait
            known = isinstance(error, RanksError) and error.group is self._group
            if _OPEN[self._group] == 1 and not known:
                with suppress(RanksError):  # where nobody can be told, this process's own error says more
                    self._tell(error)
            raise
        finally:
            _OPEN[self._group] -= 1
            if not _OPEN[self._group]:
                del _OPEN[self._group]  # a group must not live longer than its owner lets it

    def meet(
        self,
        what: str,
        state: Mapping[str, Tensor] | None = None,
        vectors: Tensor | None = None,
        size: int = 0,
        count: float = 0.0,
        compares: bool = False,
        different: str = DIFFERENT,
    ) -> tuple[list[int], float, bool]:
        """The sizes of all shares, the sum of the counts and whether one ``compares``, once all processes are here.

        Args:
            what: What is computed, in words.
            state: Tensors that must be the same, bit by bit.
            vectors: Vectors that must be the same, up to rounding.
            size: Number of this process's data.
            count: Its part of the sum.
            compares: Whether it has something that must be compared with what others have.
            different: What the processes do whose vectors are not the same, and what to do about it.

        Raises:
            RanksError: In all processes, if one of them failed, or if they compute different things.
        """
        if self.alone:
            return [size], count, False
        own = Message(COMPARES * compares, word(what), digest(state or {}), probe(vectors), size, count)
        found = self._exchange(own)
        if any(message.status == FAILED for message in found):
            self._raise_failure()
        first = found[0]
        if any((message.what, message.state) != (first.what, first.state) for message in found):
            self._raise_difference(what, state or {})
        if not all(close(message.probe, first.probe) for message in found):
            raise self._error(f"{what}: the processes {different}.")
        sizes, compared = [message.size for message in found], any(message.status == COMPARES for message in found)
        return sizes, sum(message.count for message in found), compared

    def have_parts(self, shards: Mapping[str, Sharding]) -> bool:
        """Whether these are the very processes over which each of some tensors is cut."""
        if self.alone or not shards:
            return False
        own = set(torch.distributed.get_process_group_ranks(self._group))
        return all(sharding.all == own for sharding in shards.values())

    def expect_apart(self, shards: Mapping[str, Sharding]) -> None:
        """A ValueError where parameters are DTensors over processes of this group: their parts or gradients must not be added."""
        if self.alone:
            return
        own = set(torch.distributed.get_process_group_ranks(self._group))
        if cut := [name for name, sharding in shards.items() if own & sharding.over]:
            raise ValueError(
                f"process_group: {describe(cut)} are cut over processes of this group, or repeated on them (DTensors), where PyTorch adds "
                'up gradients itself. Place the parameters on the other axis of the mesh only, as on mesh["parts"].'
            )

    def add(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over the processes, all of which have met; the same bits in each of them."""
        if not self.alone:
            flat = tensor if tensor.is_contiguous() else tensor.contiguous()
            with self._reaching():
                torch.distributed.all_reduce(flat, group=self._group)
            if flat is not tensor:
                tensor.copy_(flat)
        return tensor

    def add_all(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their sums over the processes, small ones of one dtype together in one buffer."""
        if self.alone:
            return
        small: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            if tensor.numel() > SMALL:
                self.add(tensor)
            else:
                small.setdefault(tensor.dtype, []).append(tensor)
        for several in small.values():
            flat = self.add(torch.cat([tensor.flatten() for tensor in several]))
            for tensor, part in zip(several, flat.split([tensor.numel() for tensor in several]), strict=True):
                tensor.copy_(part.view(tensor.shape))

    def send(self, tensor: Tensor, source: int) -> Tensor:
        """A contiguous tensor of one process, in the place of those of the others, all of which have met."""
        if not self.alone:
            with self._reaching():
                torch.distributed.broadcast(tensor, group=self._group, group_src=source)
        return tensor

    def own(self, number: int) -> slice:
        """This process's range where so many things are divided among all, as equally as may be."""
        first, more = divmod(number, self.number)
        start = self.rank * first + min(self.rank, more)
        return slice(start, start + first + (self.rank < more))

    def join_columns(self, part: Tensor, number: int) -> Tensor:
        """Columns of all processes, which have met, each of which has its own (`own`) of so many ``[rows, number]``."""
        if self.alone:
            return part
        most = -(-number // self.number)
        padded = part.new_zeros(most, part.shape[0])
        padded[: part.shape[1]] = part.T
        found = [torch.empty_like(padded) for _ in range(self.number)]
        with self._reaching():
            torch.distributed.all_gather(found, padded, group=self._group)
        first, more = divmod(number, self.number)
        return torch.cat([columns[: first + (rank < more)] for rank, columns in enumerate(found)]).T

    def gather(self, value: Any) -> list[Any]:
        """Small objects of all processes, which have met."""
        if self.alone:
            return [value]
        found: list[Any] = [None] * self.number
        with self._reaching():
            torch.distributed.all_gather_object(found, value, group=self._group)
        return found

    def expect_same(self, what: str, facts: Mapping[str, Any]) -> None:
        """A RanksError in all processes that names what is different in some of them."""
        if self.alone:
            return
        self.meet(what)
        several = self.gather(dict(facts))
        for name in several[0]:
            for rank, other in enumerate(several):
                if other[name] != several[0][name]:
                    raise self._error(
                        f"{what}: the processes have different {name}: {_shown(several[0][name])} in process 0, "
                        f"{_shown(other[name])} in process {rank}. Only the data may differ."
                    )

    def _exchange(self, message: Message) -> list[Message]:
        words = message.words().to(self.device)
        found = [torch.empty_like(words) for _ in range(self.number)]
        with self._reaching():
            torch.distributed.all_gather(found, words, group=self._group)
        return [Message.read(words.cpu()) for words in found]

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        """What `torch.distributed` raises where it cannot reach a process, as a RanksError; the group is of no use then."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).split("] ", 1)[-1].split(". ")[0] or type(error).__name__  # not the place in the source
            raise self._error(
                f"a process of the group is gone, or did not come within the group's timeout ({reason}). Start all of them again."
            ) from error

    def _error(self, text: str) -> RanksError:
        """What all processes of the group raise."""
        error = RanksError(text)
        error.group = self._group
        return error

    def _tell(self, error: Exception) -> None:
        """Meet the others with the news that this process failed."""
        self._exchange(Message(FAILED, 0, 0, (0.0, 0.0), 0, 0.0))
        self.gather(f"{type(error).__name__}: {error}")

    def _raise_failure(self) -> None:
        texts = self.gather(None)
        failed = [(rank, text) for rank, text in enumerate(texts) if text is not None]
        more = f" So did {len(failed) - 1} others." if len(failed) > 1 else ""
        raise self._error(f"process {failed[0][0]} of {self.number} failed with {failed[0][1]}{more}")

    def _raise_difference(self, what: str, state: Mapping[str, Tensor]) -> None:
        several = self.gather((what, {name: digest({name: tensor}) for name, tensor in state.items()}))
        first_what, first_state = several[0]
        for rank, (its_what, its_state) in enumerate(several):
            if its_what != first_what:
                raise self._error(
                    f"the processes compute different things: process 0 {first_what}, process {rank} {its_what}."
                )
            if differing := [
                name for name in {**first_state, **its_state} if first_state.get(name) != its_state.get(name)
            ]:
                raise self._error(
                    f"{what}: {describe(differing)} differ between the processes 0 and {rank}. An operator has one model: broadcast "
                    "parameters and buffers from one process."
                )
        raise self._error(f"{what}: the processes differ.")


def share_of(data: Any, process_group: Any) -> Any:
    """This process's share of a data set, or of a list of batches: no datum twice, and none left out.

    Shares are consecutive and as equal as may be, so that random numbers belong to the same data for any number of
    processes. (A ``DistributedSampler`` repeats some data where they cannot be divided equally, which curvature counts
    twice.)

    Args:
        data: A data set with a length, for a ``DataLoader``, or a list.
        process_group: Processes of `torch.distributed`.

    Returns:
        A `torch.utils.data.Subset`; of a list its part.

    Raises:
        TypeError: If it has no length, as an iterable data set.

    Example:
        In a script that is started by ``torchrun --nproc-per-node 4 script.py``::

            group = torch.distributed.group.WORLD
            loader = DataLoader(share_of(dataset, group), batch_size=64)
            ggn = GGNLinearOperator(model, loss, params, loader, process_group=group)
    """
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise TypeError(
            f"share_of: expected a data set with a length or a list, got {type(data).__name__}. Let each process pass the data that it has."
        )
    own = Ranks(process_group).own(len(data))
    return data[own] if isinstance(data, (list, tuple)) else Subset(data, range(own.start, own.stop))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 300 else f"{text[:300]}…"
